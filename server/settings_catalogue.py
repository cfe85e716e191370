"""The settings seen one by one: how each is named, what it takes, and how a single value of it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from server.settings import Settings

_KINDS: Mapping[type, str] = {int: "a whole number", float: "a number", Path: "a path", str: "text"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. ``key`` is ``section.name``, as in presets and flags."""

    key: str
    field: FieldInfo

    @property
    def unit(self) -> str:
        """``tokens``, ``GiB``, ...; empty where there is none."""
        extra = self.field.json_schema_extra
        return str(extra.get("unit", "")) if isinstance(extra, dict) else ""

    @property
    def kind(self) -> type:
        """``bool``, ``int``, ``float``, ``str`` or ``Path``; ``str`` for a choice."""
        if self.choices:
            return str
        annotation: Any = self.field.annotation
        inner = [part for part in get_args(annotation) if part is not NoneType]
        found: Any = inner[0] if inner else annotation
        kind: type = get_args(found)[0] if get_origin(found) is Annotated else found
        return kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that a choice takes; empty for anything else."""
        return get_args(self.field.annotation) if get_origin(self.field.annotation) is Literal else ()

    @property
    def allowed(self) -> str:
        """What a value has to be, for messages and help: ``a whole number from 1 to 32 (tokens)``."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "true or false"
        unit = f" ({self.unit})" if self.unit else ""
        return f"{_KINDS[self.kind]}{self._range()}{unit}"

    def _range(self) -> str:
        words = []
        for limit in self.field.metadata:
            match limit:
                case Ge(low):
                    words.append(f"from {low}")
                case Gt(low):
                    words.append(f"above {low}")
                case Le(high):
                    words.append(f"to {high}")
                case Lt(high):
                    words.append(f"below {high}")
                case MinLen():
                    words.append("that is not empty")
        return "".join(f" {word}" for word in words)

    def parse(self, value: object) -> object:
        """Read one value, which may be text.

        Raises:
            ValueError: it is not ``allowed``.
        """
        # pydantic would read true as 1: a preset that says `port: true` is a mistake, not port 1.
        if isinstance(value, bool) and self.kind is not bool:
            raise ValueError(self.allowed)
        try:
            return _adapter(self.key).validate_python(value)
        except ValidationError as error:
            raise ValueError(self.allowed) from error


@cache
def catalogue() -> Mapping[str, Setting]:
    """Every setting by key, in the order of declaration."""
    found = {}
    for section, section_field in Settings.model_fields.items():
        section_type = section_field.annotation
        assert isinstance(section_type, type)
        assert issubclass(section_type, BaseModel)
        for name, field in section_type.model_fields.items():
            key = f"{section}.{name}"
            found[key] = Setting(key, field)
    return MappingProxyType(found)


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    """A validator of this field alone, from the section's own declaration."""
    return TypeAdapter(catalogue()[key].field.rebuild_annotation(), config={"allow_inf_nan": False})


def nearest(word: str) -> Setting | None:
    """The setting most like ``word``, which may lack its section; ``None`` when nothing is like it."""
    names = {key: key for key in catalogue()} | {key.split(".")[1]: key for key in catalogue()}
    close = get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return catalogue()[names[close[0]]] if close else None
