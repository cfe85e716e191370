"""HTTP clients for servers on this machine."""

import ssl

import httpx

__all__ = ["asynchronous_client", "client"]

# Engines are asked over plain HTTP. Loading the certificates that httpx loads by default takes longer than many of
# the requests that are measured; this context has none, so it trusts nobody.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def client(base_url: str, timeout: float) -> httpx.Client:
    """A client for single questions.

    Args:
        base_url: of the server, without a trailing slash.
        timeout: seconds without a byte after which a request fails.
    """
    # trust_env: a proxy that the environment names is not for this machine.
    return httpx.Client(base_url=base_url, timeout=timeout, trust_env=False, verify=_NO_CERTIFICATES)


def asynchronous_client(base_url: str, timeout: float, connections: int) -> httpx.AsyncClient:
    """A client for loads; as ``client``, and it never waits for one of its own ``connections``."""
    return httpx.AsyncClient(
        base_url=base_url,
        timeout=httpx.Timeout(timeout, connect=10.0, pool=None),
        # A connection each: llama.cpp's server closes idle ones, now and then in the face of the next request.
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
        trust_env=False,
        verify=_NO_CERTIFICATES,
    )
