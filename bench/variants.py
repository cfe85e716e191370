"""Variants: our engine with drafting on and other settings, as methods of their own beside those of ``METHODS``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.errors import BenchError
from bench.methods import EngineSettings, Launch, Method, settings_text

__all__ = ["variant_methods"]

_BASE = "slipstream"


def variant_methods(texts: Sequence[str], known: Mapping[str, Method]) -> tuple[Method, ...]:
    """The methods of ``--variant`` flags, in their order.

    Args:
        texts: ``NAME:SECTION.NAME=VALUE,SECTION.NAME=VALUE`` each.
        known: the other methods; ``slipstream`` among them is what variants are variants of.

    Raises:
        BenchError: a name is empty or taken, a pair is malformed or twice there, or the engine does not know a setting
            or does not take its value.
    """
    variants: dict[str, Method] = {}
    for text in texts:
        name, _, pairs = text.partition(":")
        name = name.strip()
        where = f'--variant "{text}"'
        if not name or not name.isprintable():
            raise BenchError(f"{where}: a name is needed in front of the colon")
        if name in known or name in variants:
            raise BenchError(f'{where}: the name "{name}" is taken already')
        variants[name] = _variant(name, _settings(pairs, where), known[_BASE], where)
    return tuple(variants.values())


def _variant(name: str, settings: Mapping[str, str], base: Method, where: str) -> Method:
    arguments = tuple(_argument(key, value, where) for key, value in settings.items())

    def launch(shared: EngineSettings, port: int) -> Launch:
        return base.launch(replace(shared, engine_args=(*shared.engine_args, *arguments)), port)

    return replace(
        base, name=name, summary=f"our engine with {settings_text(settings)}", launch=launch, settings=settings
    )


def _settings(pairs: str, where: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pair in pairs.split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        if not key or not value:
            raise BenchError(f'{where}: expected section.name=value behind the colon, got "{pair.strip()}"')
        if key in settings:
            raise BenchError(f"{where}: {key} is given twice")
        settings[key] = value
    return settings


def _argument(key: str, value: str, where: str) -> str:
    """The flag of one setting, checked before minutes are spent on starting engines."""
    from server.config import Given, read_value
    from server.errors import ConfigError

    try:
        read = read_value(Given(key, value, where))
    except ConfigError as error:
        raise BenchError(str(error)) from error
    if isinstance(read, bool):
        return f"--{key}" if read else f"--no-{key}"
    return f"--{key}={value}"
