"""Servers of the user's own as methods beside those of ``METHODS``: any that answers OpenAI's chat completions.

One that runs already is given by its address and only ever asked: nothing starts, freezes or stops it. One that is
given by its command line is started, frozen and stopped like our engines. Either chooses the format of its weights
and its arithmetic by itself, so its greedy texts may differ from those of ``ar`` without being wrong.
"""

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

import httpx

from bench.errors import BenchError
from bench.methods import EngineSettings, Launch, Method

__all__ = ["PORT", "server_methods", "without_folders"]

PORT = "{port}"
"""What stands in a command line for the port that the server is to listen on."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FOLDERS = re.compile(r"(^|=)[/~][^=]*/")


def server_methods(texts: Sequence[str], taken: Collection[str]) -> tuple[Method, ...]:
    """The methods of ``--server`` flags, in their order.

    Args:
        texts: ``NAME=ADDRESS`` or ``NAME=COMMAND`` each; an address begins with ``http://``, a command line is split
            as a shell would and has ``{port}`` in it.
        taken: the names of the other methods.

    Raises:
        BenchError: a name is empty or taken, an address is not one of plain HTTP, or a command line cannot be split or
            lacks the port.
    """
    servers: dict[str, Method] = {}
    for text in texts:
        name, _, server = (part.strip() for part in text.partition("="))
        where = f'--server "{text}"'
        if not name or not name.isprintable():
            raise BenchError(f"{where}: a name is needed in front of the equals sign")
        if name in taken or name in servers:
            raise BenchError(f'{where}: the name "{name}" is taken already')
        servers[name] = _running(name, server, where) if _SCHEME.match(server) else _started(name, server, where)
    return tuple(servers.values())


def without_folders(words: Sequence[str]) -> tuple[str, ...]:
    """A command line without the folders of absolute paths: reports are published, and folders name people."""
    return tuple(_FOLDERS.sub(r"\1", word) for word in words)


def _running(name: str, server: str, where: str) -> Method:
    address = _address(server, where)

    def launch(_settings: EngineSettings, _port: int) -> Launch:
        return Launch((), address=address)

    return Method(name, "a server that ran already", launch, external=address)


def _started(name: str, server: str, where: str) -> Method:
    try:
        words = [str(Path(word).expanduser()) if word.startswith("~/") else word for word in shlex.split(server)]
    except ValueError as error:
        raise BenchError(f"{where}: the command line cannot be split into words: {error}") from error
    if not any(PORT in word for word in words):
        raise BenchError(
            f'{where}: expected the address of a running server (http://…), or a command line with "{PORT}" where the '
            f'server is told its port, got "{server}"'
        )

    def launch(_settings: EngineSettings, port: int) -> Launch:
        return Launch(tuple(word.replace(PORT, str(port)) for word in words))

    shown = shlex.join(without_folders(words)).replace(f"'{PORT}'", PORT)
    return Method(name, "a server started by its own command line", launch, external=shown)


def _address(text: str, where: str) -> str:
    """The base URL of a server, without the ``/v1`` that OpenAI's clients want at the end of it."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise BenchError(f'{where}: "{text}" is not an address: {error}') from error
    # Reports are published: an address with a password in it, or a key in its query, must not get there.
    if url.scheme != "http" or not url.host or url.userinfo or url.query or url.fragment:
        raise BenchError(f'{where}: expected http://HOST:PORT and nothing but a path behind it, got "{text}"')
    return f"http://{url.netloc.decode('ascii')}{url.path.rstrip('/').removesuffix('/v1').rstrip('/')}"
