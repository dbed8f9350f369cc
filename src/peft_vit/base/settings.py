"""What sections of a configuration and requests of commands have in common: frozen models, said once, fully checked.

A request's fields are options of the command line and parameters in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from peft_vit.base.errors import UserError, problem_of

Kind = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]  # of a matrix, in its model's own words
Target = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.*?\[\]!\-]{1,256}$")]  # a kind, or a pattern of names
MATRICES: tuple[str, ...] = ("query", "key", "value", "out", "fc1", "fc2")  # of a plain block
# Where an adapter may sit in one: on a matrix, or on the fused query, key and value, which PEFT takes as one module.
SITE_MATRICES: tuple[str, ...] = ("qkv", *MATRICES)


class Frozen(BaseModel):
    """Values that nothing changes; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


AS_WRITTEN = "what a person wrote: a setting equal to its default was still meant to do something"


def is_given(config: BaseModel, field: str, info: ValidationInfo) -> bool:
    """Tell whether a setting asks for something: null does not, nor do 0 and false where the default is as little.

    In what a person wrote a default counts as asked for; a record spells out every default, so there other values do.
    """
    value, default = getattr(config, field), type(config).model_fields[field].default
    if value is None or not (value or default):
        return False
    return field in config.model_fields_set if info.context == AS_WRITTEN else bool(value != default)


class OnlyWith:
    """In the annotation of a setting: it has an effect only while another one has some value.

        top_k: Annotated[int | None, OnlyWith(allocation_strategy="top_k")] = None

    Args:
        remedy: what to do instead, where that is not to give the other one such a value.
        setting: the other one, and its value, or a tuple of several; None: it is left out; `...`: it is given.
    """

    def __init__(self, *, remedy: str = "", **setting: Any) -> None:
        ((self.other, values),) = setting.items()
        self.values = values if isinstance(values, tuple) else (values,)
        self.remedy = remedy

    def problem(self, config: Settings) -> str | None:
        """Return why the setting has no effect in a configuration, and what to do; None: it has one."""
        value = getattr(config, self.other)
        if value in self.values or (... in self.values and value is not None):
            return None
        other = config.spelled(self.other)
        if self.values == (None,):
            return f"has no effect with {other}; {self.remedy or 'remove one of the two'}"
        if value is None:
            return f"has no effect without {other}; {self.remedy or f'remove it, or give {other}'}"
        remedy = self.remedy or f"remove it, or set {config.spelled(self.other, *self.values)}"
        return f"has no effect with {config.spelled(self.other, value)}; {remedy}"


class Settings(Frozen):
    """Settings that a person writes: one that has no effect with the others is refused, see `OnlyWith`."""

    @classmethod
    def spelled(cls, field: str, *values: Any) -> str:
        """Return a setting, and its value or several, as a person writes it; requests of commands have options."""
        words = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
        listed = " or ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)
        return f"{field}: {listed}" if values else field

    @model_validator(mode="after")
    def _has_an_effect(self, info: ValidationInfo) -> Self:
        problems = {
            name: message
            for name, field in type(self).model_fields.items()
            for condition in field.metadata
            if isinstance(condition, OnlyWith) and is_given(self, name, info) and (message := condition.problem(self))
        }
        refuse(self, problems)
        return self


def refuse(config: BaseModel, problems: Mapping[str, str]) -> None:
    """Refuse settings in a validator, each at its own place.

    Args:
        config: the section that is validated.
        problems: what is wrong with each of its settings, and what to do; empty: nothing is.
    """
    if problems:
        raise ValidationError.from_exception_data(
            type(config).__name__,
            [
                InitErrorDetails(
                    type=PydanticCustomError("refused", "{message}", {"message": message}),
                    loc=tuple(field.split(".")),
                    input=None,
                )
                for field, message in problems.items()
            ],
        )


def exactly_one(config: BaseModel, *fields: str) -> None:
    """Refuse a section, in a validator, that does not give just one of some settings."""
    given = [field for field in fields if getattr(config, field) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(fields)}; got {' and '.join(given) or 'none'}")


def without_repeats(problem: str) -> AfterValidator:
    """Refuse a tuple in which something occurs twice."""

    def check(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError(problem)
        return values

    return AfterValidator(check)


class AdapterConfig(Settings):
    """What all adapters have."""

    scale: float = Field(
        default=2.0, gt=0, description="alpha / rank of the LoRA paper; it stays the same when the rank changes"
    )
    targets: Annotated[tuple[Target, ...], without_repeats("names a matrix twice; remove one")] = Field(
        default=MATRICES,
        min_length=1,
        description="Kinds of matrices, or patterns of names such as `blocks.*.attn.qkv`. The default, the six "
        "of a plain block, stands for all that the model has",
    )


@dataclass(frozen=True)
class Option:
    """In the annotation of a field: how it is typed, where that does not follow from its name and its type.

    Attributes:
        name: of the option, as in --model, or of the argument.
        typed: its type on the command line; None: that of the field.
        is_argument: it has a place, and no name.
        metavar: what the help writes for its value; empty: its type.
        keys: of a configuration that are filled in with it, beside that of the field's name.
    """

    name: str = ""
    typed: Any = None
    is_argument: bool = False
    metavar: str = ""
    keys: tuple[str, ...] = ()


class Request(Settings):
    """What a command is asked for: each field has a type, a default and a description, which is the option's help.

    `OnlyWith` in a field's annotation says which others it goes with. Values are converted, as "3" to 3.
    """

    model_config = ConfigDict(strict=False)

    @classmethod
    def option(cls, field: str) -> Option:
        """Return how a field is typed."""
        option = next((entry for entry in cls.model_fields[field].metadata if isinstance(entry, Option)), Option())
        name = field.upper() if option.is_argument else f"--{field.replace('_', '-')}"
        return replace(option, name=option.name or name)

    @classmethod
    def parameter(cls, field: str) -> str:
        """Return how a field is called in Python: as its option is, max_latency for --max-latency."""
        name = cls.option(field).name.lstrip("-").replace("-", "_").lower()
        return field if iskeyword(name) else name

    @classmethod
    def spelled(cls, field: str, *values: Any) -> str:
        """Return an option, and its value or several, as they are typed."""
        return f"{cls.option(field).name} {' or '.join(str(value) for value in values if value is not True)}".rstrip()

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return what is asked for, by the names of the fields.

        Raises:
            UserError: if a name is none of these, a value is not of its type, or two do not go together; in one line
                that names the option.
        """
        try:
            return cls.model_validate(values, context=AS_WRITTEN)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        raise UserError(problem_of(first), field=cls.option(field).name if field in cls.model_fields else field)


@contextmanager
def named_as_parameters(request: type[Request], held: Path) -> Iterator[None]:
    """Name options in errors as the parameters that they are in Python, and files below `held` as `images`."""
    parameters = {request.option(field).name: request.parameter(field) for field in request.model_fields}
    try:
        yield
    except UserError as error:
        message = re.sub(r"--[a-z][a-z-]*", lambda match: parameters.get(match[0], match[0]), error.message)
        field, file = error.field and parameters.get(error.field, error.field), error.file
        if file is not None and file.startswith(str(held)):
            field, file = field or "images", None
        raise UserError(message, file=file, field=field, details=error.details) from None
