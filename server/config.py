"""Layering the settings: a preset, over it the environment, over that the flags.

A value that is unknown or not allowed is an error in whichever layer it stands, also when a higher layer would have
replaced it: a preset with a mistake in it should not work by luck.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml
from pydantic import ValidationError

from server.errors import ConfigError
from server.settings import Settings
from server.settings_catalogue import catalogue, nearest

DEFAULT_PRESET = "smollm2-cpu"
ENVIRONMENT_PREFIX = "SLIPSTREAM_"

_PRESETS = Path(__file__).resolve().parent.parent / "configs"

# Kubernetes puts such variables into every container of a namespace that has a service named "slipstream".
_SERVICE_LINK = re.compile(r"SLIPSTREAM_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)")


@dataclass(frozen=True, slots=True)
class Given:
    """A value before it is read: ``source`` says where it stands, for messages."""

    key: str
    value: object
    source: str


def load_settings(config: str, environ: Mapping[str, str], flags: Mapping[str, object]) -> Settings:
    """Read a preset and lay the environment and the flags over it.

    Args:
        config: name of a shipped preset, or the path of a YAML file.
        environ: the process environment; ``SLIPSTREAM_SECTION__NAME`` sets ``section.name``.
        flags: values by ``section.name``.

    Raises:
        ConfigError: a value is unknown, malformed or out of range, or two do not go together.
    """
    values: dict[str, dict[str, object]] = {}
    for given in (*_from_preset(config), *_from_environment(environ), *_from_flags(flags)):
        section, _, name = given.key.partition(".")
        values.setdefault(section, {})[name] = read_value(given)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        reasons = "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
        raise ConfigError(reasons) from error


def read_value(given: Given) -> object:
    """The value as its setting's type.

    Raises:
        ConfigError: the setting does not exist or does not take this value.
    """
    setting = catalogue().get(given.key)
    if setting is None:
        raise ConfigError(f"{given.source}: unknown setting {given.key!r} (value {given.value!r}); {_hint(given.key)}")
    try:
        return setting.parse(given.value)
    except ValueError as error:
        raise ConfigError(f"{given.source}: {given.key} = {given.value!r} is not allowed; it takes {error}") from error


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def preset_path(config: str) -> Path:
    """The file behind ``--config``.

    Raises:
        ConfigError: there is no such preset or file.
    """
    if config in preset_names():
        return _PRESETS / f"{config}.yaml"
    path = Path(config).expanduser()
    if path.is_file():
        return path
    close = get_close_matches(config, preset_names(), n=1)
    nearest_preset = f"; nearest: {close[0]}" if close else ""
    raise ConfigError(
        f"--config {config}: no such file, and no such preset; presets: {', '.join(preset_names())}{nearest_preset}"
    )


def _from_preset(config: str) -> Iterator[Given]:
    path = preset_path(config)
    for section, names in _read_mapping(path).items():
        if section not in Settings.model_fields and not isinstance(names, dict):
            yield Given(str(section), names, str(path))
        elif names is None:
            continue  # a section with everything in it commented out
        elif not isinstance(names, dict):
            raise ConfigError(f"{path}: {section} = {names!r} is not allowed; it takes settings, one a line, indented")
        else:
            for name, value in names.items():
                yield Given(f"{section}.{name}", value, str(path))


def _read_mapping(path: Path) -> dict[object, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{path}:{where} not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections ({', '.join(Settings.model_fields)}) with settings below them")
    return content


def _from_environment(environ: Mapping[str, str]) -> Iterator[Given]:
    for variable, value in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or _is_service_link(variable, value):
            continue
        # Compose files often pass `NAME=${NAME:-}`: an empty variable is one that was not set.
        if value:
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".", 1)
            yield Given(key, value, f"environment variable {variable}")


def _is_service_link(variable: str, value: str) -> bool:
    if not _SERVICE_LINK.fullmatch(variable):
        return False
    return variable != "SLIPSTREAM_PORT" or "://" in value


def _from_flags(flags: Mapping[str, object]) -> Iterator[Given]:
    for key, value in flags.items():
        yield Given(key, value, f"flag --{key}")


def _hint(key: str) -> str:
    """The nearest known setting and what it takes, or else what there is to choose from."""
    if setting := nearest(key):
        return f"nearest known setting: {setting.key}, which takes {setting.allowed}"
    section = key.partition(".")[0]
    names = [known for known in catalogue() if known.startswith(f"{section}.")]
    if names:
        return f"known settings there: {', '.join(names)}"
    return f"settings are named section.name, with the sections {', '.join(Settings.model_fields)}"
