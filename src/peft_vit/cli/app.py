"""The application that commands are added to, some of them generated from what they are asked for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, TypeVar

import typer
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from peft_vit.base.settings import Option, Request
from peft_vit.core.config import named_as_typed

_Request = TypeVar("_Request", bound=Request)
ROWS_FILE = "Also write the values, unrounded, to this .csv or .json file."
INTERRUPTED = 130  # what shells report for SIGINT
OVERWRITE = "Replace the file that --output names."

GROUPS = {  # of --help, in its order
    "Your images": (
        "label",
        "review",
        "train",
        "tune",
        "predict",
        "test",
        "embed",
        "similar",
        "export",
        "bench",
        "runs",
    ),
    "Studies": ("run", "plan", "status", "report", "recommend", "compare"),
    "Help": ("doctor", "models", "datasets", "check", "example"),
}


class Grouped(TyperGroup):
    """A command line whose help lists commands by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group, in the order of GROUPS."""
        for group, names in GROUPS.items():
            with formatter.section(group):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(200)) for name in names])


app = typer.Typer(
    name="peft-vit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes take a third of the time of --help
    cls=Grouped,
    help="Fine-tune Vision Transformers on your images with LoRA, AdaLoRA and QA-LoRA, and see how sure a result is.",
)


def command(
    request: type[_Request], *, names_keys: bool = False
) -> Callable[[Callable[[_Request], None]], Callable[[_Request], None]]:
    """Add a function of a request as a command of its name, whose arguments and options are the request's fields.

    Args:
        request: what the function takes.
        names_keys: whether its errors name keys of a study's file, not the options that fill them in.
    """

    def add(function: Callable[[_Request], None]) -> Callable[[_Request], None]:
        parameters = [_parameter(name, field, request.option(name)) for name, field in request.model_fields.items()]

        @functools.wraps(function)
        def call(**typed: Any) -> None:
            given = {option.name: typed[option.name] for option in parameters if typed[option.name] != option.default}
            with nullcontext() if names_keys else named_as_typed(request):
                function(request.of(**given))

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # which typer reads
        call.__annotations__ = {option.name: option.annotation for option in parameters}
        app.command()(call)
        return function

    return add


def _parameter(name: str, field: FieldInfo, option: Option) -> inspect.Parameter:
    """Return a field as a parameter that typer understands."""
    kind: Any = option.typed or field.annotation
    default = inspect.Parameter.empty if field.is_required() else None if option.typed else field.default
    if option.typed and default is None:
        kind = kind | None
    info: Any
    if option.is_argument:
        info = typer.Argument(help=field.description, show_default=False, metavar=option.name)
    else:
        bounds = {type(limit): limit for limit in field.metadata}
        least, most = getattr(bounds.get(Ge), "ge", None), getattr(bounds.get(Le), "le", None)
        info = typer.Option(option.name, help=field.description, min=least, max=most, metavar=option.metavar or None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _print_version(requested: bool) -> None:
    if requested:
        from importlib import metadata

        print(f"peft-vit {metadata.version('peft-vit')}")
        raise typer.Exit


@app.callback()
def _of_no_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...
