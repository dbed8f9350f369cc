"""What a command is asked for, said once: a model's fields are options of the command line and parameters in Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ConfigDict, ValidationError

from peft_vit.errors import UserError, problem_of
from peft_vit.settings import AS_WRITTEN, Settings


@dataclass(frozen=True)
class Option:
    """In the annotation of a field: how it is typed, where that does not follow from its name and its type.

    Attributes:
        name: of the option, as in --model.
        typed: its type on the command line; None: that of the field.
        is_argument: it has a place, and no name.
    """

    name: str = ""
    typed: Any = None
    is_argument: bool = False


class Request(Settings):
    """What a command is asked for: each field has a type, a default and a description, which is the option's help.

    `OnlyWith` in a field's annotation says which others it goes with. Values are converted, as "3" to 3.
    """

    model_config = ConfigDict(strict=False)

    @classmethod
    def option(cls, field: str) -> Option:
        """Return how a field is typed."""
        found = next((one for one in cls.model_fields[field].metadata if isinstance(one, Option)), Option())
        name = field.upper() if found.is_argument else found.name or f"--{field.replace('_', '-')}"
        return Option(name, found.typed, found.is_argument)

    @classmethod
    def spelled(cls, field: str, *values: Any) -> str:
        """Return an option, and its value or several, as they are typed."""
        return f"{cls.option(field).name} {' or '.join(str(value) for value in values if value is not True)}".rstrip()

    @classmethod
    def of(cls, **asked: Any) -> Self:
        """Return what is asked for, by the names of the fields.

        Raises:
            UserError: if a name is none of these, a value is not of its type, or two do not go together; in one line
                that names the option.
        """
        try:
            return cls.model_validate(asked, context=AS_WRITTEN)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        raise UserError(problem_of(first), field=cls.option(field).name if field in cls.model_fields else field)


@contextmanager
def named_as_parameters(request: type[Request]) -> Iterator[None]:
    """Name options in errors as the parameters that they are in Python."""
    parameters = {request.option(field).name: field for field in request.model_fields}
    try:
        yield
    except UserError as error:
        message = re.sub(r"--[a-z][a-z-]*", lambda found: parameters.get(found[0], found[0]), error.message)
        field = None if error.field is None else parameters.get(error.field, error.field)
        raise UserError(message, file=error.file, field=field, details=error.details) from None
