"""What a tuning leaves: the chosen model in its fastest form, what trains it again, a card and a report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from peft_vit.base.errors import UserError
from peft_vit.base.files import read_bytes, write_whole
from peft_vit.core.records import RunRecord
from peft_vit.data import thumbnails_of
from peft_vit.deploy.measures.fastest import export_fastest
from peft_vit.deploy.page.class_blocks import fonts_for, no_font
from peft_vit.deploy.page.files import write_report
from peft_vit.deploy.page.model_page import CARD_FILE, card_head, card_text
from peft_vit.deploy.page.model_quality import model_quality
from peft_vit.fit.outcomes import with_meaning
from peft_vit.fit.own_images import refuse_among_images
from peft_vit.fit.page import TuningSummary, model_summary, tuning_document
from peft_vit.fit.result import Choice
from peft_vit.fit.state import MODEL_FOLDER, TUNE_FILE
from peft_vit.fit.tune_request import TuneRequest
from peft_vit.runs.records.storage import ADAPTER_FILE, FEATURES_FILE, HTML_FILE, RECORD_FILE, read_record
from peft_vit.runs.records.study_yaml import study_yaml

CONFIG_FILE = "config.yaml"


def check_output(request: TuneRequest) -> None:
    """Refuse an output among the images, and one where files of others would be replaced."""
    refuse_among_images(request.images, request.output)
    output = request.output.resolve()
    if not (output / TUNE_FILE).exists():
        for name in (MODEL_FOLDER, "figures", "tables", CONFIG_FILE, CARD_FILE, HTML_FILE):
            if (output / name).exists():
                problem = "exists already, and tune did not make it; move it away, or choose another --output"
                raise UserError(problem, file=request.output / name)


def write_output(choice: Choice, directory: Path, tell: Callable[[str], None] = print) -> None:
    """Write everything that a tuning leaves; what an earlier call left is replaced.

    Raises:
        UserError: if a run can't be restored, the model can't be exported, or a file can't be read or written.
    """
    try:
        _write(choice, directory, tell)
    except OSError as error:  # of reading as well as of writing: the error names the file
        problem = f"{error.strerror or error}; fix that, and the same command continues"
        raise UserError(problem, file=error.filename or directory) from None


def _write(choice: Choice, directory: Path, tell: Callable[[str], None]) -> None:
    run_dir, recipe = choice.final.folder, choice.recipe
    record, logits = read_record(run_dir / RECORD_FILE), choice.final.logits.astype(np.float32)
    record = with_meaning(record, choice.meaning, choice.folds, choice.final.learned, logits)
    tested = record.tested_calibration
    quality = model_quality(record, None if tested is None else tested.probability)
    model_folder = directory / MODEL_FOLDER
    exports = export_fastest(
        run_dir,
        model_folder,
        meaning=choice.meaning,
        bits=recipe.bits if recipe.when == "after" else None,
        fold_runs=[outcome.folder for outcome in choice.folds],
        max_bytes=choice.request.max_bytes,
        max_latency_s=choice.request.max_latency,
        tell=lambda text: tell(f"  {text}"),
    )
    summary = TuningSummary(choice, record, quality, exports)
    adapter, config = model_folder / ADAPTER_FILE, directory / CONFIG_FILE
    for name in (ADAPTER_FILE, *([] if record.features_sha256 is None else [FEATURES_FILE])):
        write_whole(model_folder / name, read_bytes(run_dir / name, limit_bytes=None))
    write_whole(model_folder / RECORD_FILE, (record.model_dump_json(indent=1) + "\n").encode())
    write_whole(config, configuration(choice, record).encode())
    library = "openvino" if exports.model.suffix == ".xml" else "onnx"
    head = card_head(model_summary(summary), library, choice.request.images.name or "images")
    document = tuning_document(summary, partial(thumbnails_of, record))
    write_report([document], {CARD_FILE: card_text(document, head, _use(summary))}, directory)
    if missing := fonts_for(record.class_names)[1]:
        tell(f"  {no_font(missing)}")
    for sentence in (*document.came_out, *exports.missed):
        tell(f"  {sentence}")
    for path in (exports.model, adapter, config, directory / CARD_FILE, directory / HTML_FILE):
        tell(f"  {path}")


def configuration(choice: Choice, record: RunRecord) -> str:
    """Return a study of the final run alone; run again it gives the same adapter, on the same kind of machine."""
    comments = [
        f"Trains {choice.recipe.title} again, as it was chosen for {choice.request.images}:",
        *_again(choice, record),
        f"The adapter's SHA-256 was {record.adapter_sha256}.",
    ]
    return study_yaml(record.spec, [record.spec.seed], suffix="", comments=[" ".join(one.split()) for one in comments])


def _again(choice: Choice, record: RunRecord) -> list[str]:
    """Return the commands that train the model again."""
    commands = [f"peft-vit run {CONFIG_FILE} --output again"]
    if choice.recipe.when == "after":
        commands.append(f"peft-vit export again/{record.spec.run_id} --bits {choice.recipe.bits} --output again.onnx")
    return commands


def _use(summary: TuningSummary) -> str:
    again = "\n".join(_again(summary.choice, summary.record))
    model = f"model/{summary.exports.model.name}"
    sets = " --coverage 0.9" if summary.record.calibrated and summary.record.calibrated.coverages else ""
    return (
        f"```\npeft-vit predict {model} IMAGES...{sets}\n\n# trains it again\n{again}\n"
        f'```\n\n```python\nimport peft_vit\n\nprint(peft_vit.load("{model}").predict("photo.jpg"))\n```\n\nThe '
        "file takes `images` (B, 3, S, S) and gives `logits`; how pixels become these, the classes and the "
        "temperature\nare in its metadata `peft_vit_model`. `model/adapter.safetensors` holds what was "
        "trained, without the backbone."
    )
