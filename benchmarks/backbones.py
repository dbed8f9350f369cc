"""Which backbones work, and what does on each: docs/reference/backbones.md.

    .venv/bin/python benchmarks/backbones.py check [PATTERN ...]
    .venv/bin/python benchmarks/backbones.py

`check` builds each architecture of timm's families (or those that a pattern names, `swin*`) with random weights, two
blocks a stage and small images, puts adapters on all its sites, and adds what works to results/backbones.csv. What
stands there already is passed by, so the same command continues. Without an argument only the tables are made anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pandas as pd
import timm
from common import RESULTS
from marks import filled

from peft_vit import cli
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.core.backbones import Architecture
from peft_vit.core.backbones.catalog import architecture_of, describe, native_size, size_step_of
from peft_vit.core.config import BackboneConfig, Library
from peft_vit.deploy.measures.check import LARGEST_MERGE_ERROR, LARGEST_ONNX_ERROR, Deviation, check_architecture

ROWS, DOCUMENT = RESULTS / "backbones.csv", RESULTS.parents[1] / "docs" / "reference" / "backbones.md"
TRANSFORMERS = "transformers"
# Types of models, each at the size of transformers' own defaults.
TYPES = (
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "clip",
    "clip_vision_model",
    "siglip",
    "siglip_vision_model",
    "siglip2",
    "siglip2_vision_model",
    "beit",
    "swin",
    "swinv2",
    "data2vec-vision",
    "vit_msn",
    "ijepa",
)
MODULES = {  # of timm, and what people call their models
    "vision_transformer": "ViT, DINO, DINOv2, CLIP, SigLIP, AIMv2",
    "vision_transformer_hybrid": "ViT with a convolutional stem",
    "deit": "DeiT, DeiT III, distilled",
    "eva": "EVA, EVA-02, DINOv3, PE, RoPE-ViT",
    "beit": "BEiT, BEiT v2",
    "swin_transformer": "Swin",
    "swin_transformer_v2": "Swin V2",
    "hiera": "Hiera",
    "naflexvit": "NaFlexViT",
    TRANSFORMERS: "transformers: one model a class",
}
# Settings of timm's classes for two blocks a stage.
_SHALLOW = {"swin": {"depths": (2, 2, 2, 2)}, "hiera": {"stages": (2, 2, 2, 2)}}
_SMALLEST = 64  # pixels: windows of several tokens in each stage of Swin
CHECKS = {"merged": LARGEST_MERGE_ERROR, "onnx": LARGEST_ONNX_ERROR, "peft": LARGEST_MERGE_ERROR}
COLUMNS = ("modules found", "all act", "merged", "ONNX", "PEFT reads our adapter")


def check(patterns: list[str]) -> None:
    """Check each architecture that is not in the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = pd.read_csv(ROWS).to_dict("records") if ROWS.exists() else []
    known = {(row["module"], row["model"]) for row in rows}
    for module in MODULES:
        names = TYPES if module == TRANSFORMERS else timm.list_models(module=module)
        for name in names:
            if (module, name) in known or not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                continue
            rows.append(checked(name, module))
            print(*rows[-1].values(), sep="  ", flush=True)
            content = pd.DataFrame(rows).sort_values(["module", "model"]).to_csv(index=False)
            write_atomically(ROWS, content.encode())


def checked(name: str, module: str) -> dict[str, object]:
    """Return the row of an architecture."""
    library: Library = "transformers" if module == TRANSFORMERS else "timm"
    backbone = BackboneConfig(library=library, model=name, weights="random")
    architecture = architecture_of(backbone)
    step = size_step_of(architecture)
    side = min(native_size(architecture), max(2 * step, -(-_SMALLEST // step) * step))
    try:
        describe(backbone, side)
    except UserError as error:  # Swin of transformers has windows of one size
        if error.field == "data.image_size":
            side = native_size(architecture)
    row: dict[str, object] = {"module": module, "model": name, "image_size": side}
    try:
        with ExitStack() as stack:
            found = check_architecture(_shallow(architecture, module, stack), side, peft=True)
    except UserError as error:
        return row | {"fault": str(error)}
    assert found.peft is not None
    idle = sorted({module.rpartition(".")[2] for module in found.peft_idle})
    row |= {"sites": len(found.sites), "act": found.effective, "fault": None}
    for column, outcome in (("merged", found.merged), ("onnx", found.files["onnx"]), ("peft", found.peft)):
        row |= _columns(column, outcome)
    return row | {"peft_idle": " ".join(idle)}


def _shallow(architecture: Architecture, module: str, stack: ExitStack) -> Architecture:
    """Let a model be built with two blocks a stage; one of timm within the stack."""
    if architecture.config is not None:
        content = json.loads(architecture.config)
        vision = content["config"].get("vision_config", content["config"])
        vision |= {"depths": [2] * len(vision["depths"])} if "depths" in vision else {"num_hidden_layers": 2}
        for of_stages in ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices"):
            vision.pop(of_stages, None)
        return replace(architecture, config=json.dumps(content))
    settings = next((found for start, found in _SHALLOW.items() if module.startswith(start)), {"depth": 2})
    if "sapiens" in architecture.name:  # Sapiens 2 names the heads of each block
        blocks = timm.create_model(architecture.name).blocks
        heads = (blocks[0].attn.num_kv_heads, blocks[len(blocks) // 2].attn.num_kv_heads)
        settings = {**settings, "num_kv_heads": heads}
    stack.enter_context(patch.object(timm, "create_model", partial(timm.create_model, **settings)))
    return architecture


def _columns(column: str, outcome: Deviation) -> dict[str, object]:
    error = None if outcome.error is None else float(f"{outcome.error:.1e}")
    return {f"{column}_error": error, f"{column}_fault": outcome.fault}


def passed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what each architecture passes, by column."""
    found = rows.sites.fillna(0) > 0
    columns = [found, found & (rows.act == rows.sites)]
    columns += [rows[f"{name}_error"].fillna(1.0) <= limit for name, limit in CHECKS.items()]
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def totals(rows: pd.DataFrame) -> str:
    """Return how many architectures of each family pass each check."""
    lines = [
        f"| models | architectures | {' | '.join(COLUMNS)} | PEFT's LoRA silently without effect |",
        f"| --- | ---: | {' | '.join(['---:'] * len(COLUMNS))} | ---: |",
    ]
    groups = [(title, rows[rows.module == module]) for module, title in MODULES.items()]
    for title, group in [*groups, ("**all**", rows)]:
        if len(group):
            cells = [str(count) for count in passed(group).sum()]
            idle = (group.peft_idle.fillna("") != "").sum()
            lines.append(f"| {title} | {len(group)} | {' | '.join(cells)} | {idle} |")
    share = ", ".join(f"{column} {100 * passed(rows)[column].mean():.1f} %" for column in COLUMNS)
    return "\n".join(lines) + f"\n\nOf all {len(rows)}: {share}."


def exceptions(rows: pd.DataFrame) -> str:
    """Return what does not pass, and why."""
    lines = ["| architecture | check | why |", "| --- | --- | --- |"]
    result = passed(rows)
    for place, row in rows.iterrows():
        for column, name in zip(COLUMNS, (None, None, *CHECKS), strict=True):
            if result.loc[place, column]:
                continue
            if pd.notna(row.fault):
                lines.append(f"| `{row.model}` | all | {_plain(row.fault)} |")
                break
            if name is None:
                why = f"{int(row.act)} of {int(row.sites)} sites act"
            else:
                fault, error = row[f"{name}_fault"], row[f"{name}_error"]
                why = _plain(fault) if pd.notna(fault) else f"differs by {error:.0e} of the largest logit"
            lines.append(f"| `{row.model}` | {column} | {why} |")
    return "\n".join(lines) if len(lines) > 2 else "None."


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("\x1b[96m", "").replace("\x1b[0m", "").split())


def each(rows: pd.DataFrame) -> str:
    """Return the names of each family, with an asterisk where PEFT's LoRA has no effect."""
    named = rows.model.map("`{}`".format) + (rows.peft_idle.fillna("") != "").map({True: "\\*", False: ""})
    parts = [(title, named[rows.module == module]) for module, title in MODULES.items()]
    return "\n\n".join(f"**{title}** ({len(names)}): {', '.join(names)}." for title, names in parts if len(names))


def tables(rows: pd.DataFrame) -> dict[str, str]:
    """Return the page's generated parts by their marks."""
    return {"totals": totals(rows), "exceptions": exceptions(rows), "each": each(rows)}


def main() -> None:
    """Check, or make the tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["check"], help="left out: only the tables are made anew")
    parser.add_argument("patterns", nargs="*", default=["*"], help="of architectures' names")
    asked = parser.parse_args()
    with cli.user_errors():
        if asked.what == "check":
            check(asked.patterns)
        rows = pd.read_csv(ROWS)
        write_atomically(DOCUMENT, filled(DOCUMENT.read_text(encoding="utf-8"), tables(rows)).encode())
        print(DOCUMENT)


if __name__ == "__main__":
    main()
