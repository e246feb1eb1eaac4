"""The types that recipe fields are made of, and the base of every section."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from efficientllm.config.gone import GONE
from efficientllm.errors import UsageError
from efficientllm.sizes import Position, exact_count, format_fraction, parse_count, parse_fraction

# Longest part of a bad value that a message repeats.
_SHOWN = 60
_YAML_KINDS = {"dictionary": "mapping of keys to values", "tuple": "list"}
_TAGS = ("<plain>", "<widths>", "<cost>", "<auto>", "<sources>")
# Context of a validation after which keys without effect are not refused, but left out of what is dumped.
LEAVE_OUT_IDLE = {"idle": "left out"}


class Trait(Enum):
    """What a field's own definition says of it, in its Annotated type.

    FREE: it says how a run is kept, shown, fitted into memory or computed, not what it is to learn, and so may change
    when the run is resumed (with other bits, but the same run). ARM: arms of a comparison set it anew, or go without.
    """

    FREE = "free"
    ARM = "arm"


@dataclass(frozen=True)
class Idle:
    """Says of a field that it has no effect where `when` holds of its section. why: the rest of a sentence, in which
    {0} is the section."""

    when: Callable[[Any], bool]
    why: str


class Section(BaseModel):
    """A mapping in a recipe: unknown keys and keys without effect are refused, null means the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    section: ClassVar[str] = ""

    @classmethod
    def having(cls, fact: Trait) -> set[str]:
        """The fields whose definition says so."""
        return {name for name, field in cls.model_fields.items() if fact in field.metadata}

    def _idle(self) -> dict[str, str]:
        """Fields that have no effect beside the others: name -> why. They are refused, and not dumped."""
        return {
            name: rule.why.format(self)
            for name, field in type(self).model_fields.items()
            for rule in field.metadata
            if isinstance(rule, Idle) and rule.when(self)
        }

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key in map(str, data):
            gone = GONE.get(f"{cls.section}.{key}".removeprefix("."))
            if gone is not None:
                raise PydanticCustomError("gone_key", "gone key", {"key": key, "instead": gone.instead})
            if key not in cls.model_fields:
                near = difflib.get_close_matches(key, cls.model_fields, 1)
                raise PydanticCustomError(
                    "unknown_key", "unknown key", {"key": key, "near": near, "keys": ", ".join(cls.model_fields)}
                )
        return {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _refuse_idle(self, info: ValidationInfo) -> Self:
        for name, why in self._idle().items():
            if name in self.model_fields_set and info.context is not LEAVE_OUT_IDLE:
                raise UsageError(f"{self.section}.{name} has no effect {why}: remove it, or set it to null")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_idle(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        idle = self._idle()
        return {name: value for name, value in handler(self).items() if name not in idle}


def explain(error: ValidationError) -> str:
    """The first problem in one sentence that starts with the field's dotted name.

    A key that there is not comes before all else: the field that is then missing is most often the one misspelt.
    """
    errors = error.errors()
    first = next((e for e in errors if e["type"] in ("unknown_key", "gone_key")), errors[0])
    field, context = _dotted(*first["loc"]), first.get("ctx", {})
    if first["type"] == "unknown_key":
        mend = f"the keys here are {context['keys']}"
        if context["near"]:
            mend = f"did you mean {_dotted(*first['loc'], *context['near'])}?"
        return f"{_dotted(*first['loc'], context['key'])} is not a recipe key: {mend}"
    if first["type"] == "gone_key":
        return f"{_dotted(*first['loc'], context['key'])} is gone: {context['instead']}"
    if first["type"] == "missing":
        return f"{field} is missing: add it to the recipe"
    if first["type"] == "value_error":
        return f"{field}: {context['error']}"
    message = re.sub(r"^\w+ should", "should", first["msg"]).partition(", unable")[0]
    message = re.sub(r"valid (dictionary|tuple).*", lambda match: _YAML_KINDS[match[1]], message)
    message = message.replace(" after validation", "")
    return f"{field} {message}" if ", not" in message else f"{field} {message}, not {_shown(first['input'])}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _dotted(*location: str | int) -> str:
    """data.train[0].weight for ("data", "train", 0, "weight"); union tags are left out."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location if part not in _TAGS]
    return "".join(parts).removeprefix(".") or "the recipe"


def union_side(value: object) -> str:
    """Tag of the side of a union that `value` is checked against: pydantic then reports one error, not one a side."""
    return "<widths>" if isinstance(value, Mapping | BaseModel) else "<plain>"


def _auto_side(value: object) -> str:
    """As `union_side`, for auto or a value of its own."""
    return "<auto>" if value == "auto" else "<plain>"


def one_or_more(value: object) -> object:
    """A list of one for a lone string, mapping or section."""
    return [value] if isinstance(value, str | Mapping | BaseModel) else value


def json_as(function: Callable[[Any], Any]) -> PlainSerializer:
    return PlainSerializer(function, when_used="json")


def _number(value: object) -> object:
    if isinstance(value, bool):  # YAML reads `yes` as true, which would pass as 1.0
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


def _interval(value: object) -> Position:
    position = Position.parse(value)
    if not position.value:
        raise ValueError("an interval cannot be zero: write one such as 10% or 5M")
    return position


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", value):
        raise ValueError(f"{value!r} is no device: write auto, cpu, cuda, cuda:1, mps or xpu")
    return value


Text = Annotated[str, Field(min_length=1)]
Real = Annotated[float, BeforeValidator(_number)]
Momentum = Annotated[Real, Field(ge=0, lt=1)]
Natural = Annotated[int, BeforeValidator(parse_count), json_as(exact_count)]
Count = Annotated[Natural, Field(gt=0)]
Share = Annotated[float, BeforeValidator(parse_fraction), json_as(format_fraction)]
Place = Annotated[Position, PlainValidator(Position.parse), json_as(str)]
Interval = Annotated[Position, PlainValidator(_interval), json_as(str)]
Device = Annotated[str, AfterValidator(_device)]
Auto = Annotated[Literal["auto"], Tag("<auto>")]
AutoCount = Annotated[Auto | Annotated[Count, Tag("<plain>")], Discriminator(_auto_side)]
AutoInterval = Annotated[Auto | Annotated[Interval, Tag("<plain>")], Discriminator(_auto_side)]
AutoPlace = Annotated[Auto | Annotated[Place, Tag("<plain>")], Discriminator(_auto_side)]
