"""Flags made from the settings, so that a setting is declared once and has its flag, help text and range."""

import argparse
import os
from collections.abc import Mapping, Sequence

from server.config import DEFAULT_PRESET, load_settings, preset_names
from server.settings import Settings
from server.settings_catalogue import Setting, catalogue


def add_settings_flags(parser: argparse.ArgumentParser, sections: Sequence[str] | None = None) -> None:
    """Add ``--config`` and a flag ``--section.name`` for every setting.

    Args:
        parser: where they go.
        sections: only these; by default all of them.
    """
    parser.add_argument(
        "--config",
        default=DEFAULT_PRESET,
        metavar="PRESET",
        help=f"preset ({', '.join(preset_names())}) or YAML file to start from; default {DEFAULT_PRESET}",
    )
    for section in sections or Settings.model_fields:
        description = (Settings.model_fields[section].annotation or Settings).__doc__
        group = parser.add_argument_group(section, description)
        for setting in catalogue().values():
            if setting.key.split(".")[0] == section:
                _add_flag(group, setting)


def settings_usage(command: str) -> str:
    """A usage line that does not list every setting."""
    return f"slipstream {command} [--config PRESET] [--SECTION.NAME VALUE] ..."


def settings_of(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that a command was started with: preset, then environment, then flags.

    Raises:
        ConfigError: one of them is unknown or not allowed.
    """
    flags = {key: value for key, value in vars(args).items() if key in catalogue()}
    return load_settings(args.config, environ, flags)


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """Add the flag of one setting; its text is read later, with every other layer's."""
    flag = f"--{setting.key}"
    default = "none" if setting.field.default is None else setting.field.default
    help_text = f"{setting.field.description}; {setting.allowed}; default {default}".replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text)
    else:
        metavar = f"{{{','.join(setting.choices)}}}" if setting.choices else (setting.unit or "value").upper()
        group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=help_text)
