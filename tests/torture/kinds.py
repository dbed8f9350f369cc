"""What is spoiled, how, and what the package then does with it: one function a kind of file.

To add a kind, write a function that returns its targets, and name it in KINDS.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mutations
import numpy as np
import onnx
from mutations import Mutation, Nasty, Target, is_one_line
from safetensors.torch import load, save
from sound_files import EXAMPLES, SIDE, SoundFiles

from peft_vit.base.errors import UserError, named
from peft_vit.base.files import checkpoint_folders
from peft_vit.core.adapters.peft_format import base_mismatches
from peft_vit.core.backbones import load_backbone
from peft_vit.core.config import BackboneConfig, DataConfig, load_study
from peft_vit.core.records import RunSpec
from peft_vit.core.training import Checkpoints
from peft_vit.core.training.checkpoint import STATE_FILE, TENSORS_FILE, read_checkpoint
from peft_vit.data import open_index
from peft_vit.data.pixels import cached_pixels
from peft_vit.data.splits import make_splits
from peft_vit.deploy import open_exported, predict_files
from peft_vit.deploy.formats import runtimes, torch_files
from peft_vit.deploy.restore import open_model
from peft_vit.lab.analysis import analyze, load_studies, read_results
from peft_vit.lab.report.result_tables import history_table
from peft_vit.runs.costs.timing_run import MeasuredCosts, cache_costs
from peft_vit.runs.execute import run_one
from peft_vit.runs.records.progress import (
    LOCK_FILE,
    PROGRESS_FILE,
    find_studies,
    status_lines,
    study_lock,
    study_status,
)
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, STUDY_FILE, read_record, run_folder
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.scheduler import StudyStore


def configurations(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """YAML of studies: the examples, and small ones on every data set."""
    folder = sound.inputs / "yaml"
    folder.mkdir()
    for source in (*EXAMPLES.glob("*.yaml"), *(sound.inputs / "data").glob("*.yaml")):
        (folder / source.name).write_bytes(source.read_bytes())
    files = sorted(folder.iterdir())

    def target(file: Path) -> Target:
        def plan() -> None:
            study = load_study(file)
            for run in plan_study(study, sound.out, file=file, smoke=True).runs:
                assert run_folder(sound.out, run.spec).is_relative_to(sound.out)

        spoil = (mutations.of_lines(nasty.texts), mutations.of_lines(nasty.texts), nasty.of_bytes(*files))
        return Target(file, spoil, plan, places=True)

    return [target(file) for file in files]


def records(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """record.json, read for reports and for predictions."""

    def analysis(file: Path) -> Callable[[], object]:
        def read() -> None:
            read_record(file)
            for study in load_studies(sound.results):
                analyze(study)
            history_table(sound.results)

        return read

    targets = []
    for name in ("plain", "adaptive", "quantized"):
        file = sound.run(name) / RECORD_FILE
        spoil = (mutations.of_json(nasty.texts), mutations.of_json(nasty.texts), nasty.of_bytes())
        targets += [
            Target(file, spoil, analysis(file), places=True),
            Target(file, spoil, predicting(sound, file.parent), places=True),
        ]
    return targets


def predicting(sound: SoundFiles, model: Path, weights: str | None = None) -> Callable[[], object]:
    """Return a call that opens a model and predicts an image with it."""
    return lambda: list(predict_files(open_model(model, weights), [sound.image]))


def adapters(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """adapter.safetensors of a run, whose record is made to bear its hash."""

    def target(folder: Path) -> Target:
        record = json.loads((folder / RECORD_FILE).read_text())

        def believed(content: bytes) -> dict[Path, bytes]:
            signed = {**record, "adapter_sha256": hashlib.sha256(content).hexdigest()}
            return {folder / RECORD_FILE: json.dumps(signed).encode()}

        spoil = (mutations.of_safetensors(nasty.texts), nasty.of_bytes())
        return Target(folder / ADAPTER_FILE, spoil, predicting(sound, folder), believed)

    return [target(sound.run(name)) for name in ("plain", "adaptive", "quantized")]


def models(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """What `peft-vit export` writes, signed again after the change."""
    targets = []
    low_bit = sound.inputs / "model.safetensors"
    inner = (mutations.of_safetensors(nasty.texts), nasty.of_bytes())
    spoil = (*(_signed(mutation, _sign_low_bit) for mutation in inner), *inner)
    targets.append(Target(low_bit, spoil, predicting(sound, low_bit)))
    by_onnx = sound.inputs / "model.onnx"
    if by_onnx.exists():
        inner = (_in_onnx_card(nasty), nasty.of_bytes())
        spoil = (*(_signed(mutation, _sign_onnx) for mutation in inner), nasty.of_bytes())
        targets.append(Target(by_onnx, spoil, predicting(sound, by_onnx)))
        targets += _openvino(sound, nasty)
    folder, weights = sound.inputs / "peft", str(sound.inputs / "weights.safetensors")

    def open_peft() -> None:
        classifier = open_exported(folder, weights)
        base_mismatches(folder, "test_vit", "weights", None, ["a"])
        list(predict_files(classifier, [sound.image]))

    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            ways: tuple[Mutation, ...] = (mutations.of_json(nasty.texts), nasty.of_bytes())
        else:
            ways = (mutations.of_safetensors(nasty.texts), nasty.of_bytes())
        targets.append(Target(file, ways, open_peft))
    return targets


def _openvino(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """Both files of a model for OpenVINO, likewise."""
    description = sound.inputs / "model.xml"
    weights = description.with_suffix(".bin")
    before = (description.read_bytes(), weights.read_bytes())

    def sign(content: bytes) -> bytes:
        return _sign_openvino(content, before[1])

    def believed(content: bytes) -> dict[Path, bytes]:
        return {description: _sign_openvino(before[0], content)}

    plain, opens = nasty.of_bytes(), predicting(sound, description)
    return [
        Target(description, (_signed(plain, sign), plain), opens, names=(weights,)),
        Target(weights, (plain,), opens, believed, names=(description,)),
    ]


def _signed(mutation: Mutation, sign: Callable[[bytes], bytes]) -> Mutation:
    def mutate(rng: Random, content: bytes) -> bytes:
        content = mutation(rng, content)
        try:
            return sign(content)
        except Exception:  # so broken that nobody can sign it: it goes as it is
            return content

    return mutate


def _sign_low_bit(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    header = torch_files.LowBitHeader.model_validate_json(metadata[torch_files.HEADER])
    tensors = load(content)
    signed = header.signed(torch_files.tensor_content(header, tensors)).model_dump_json()
    return bytes(save(tensors, metadata={**metadata, torch_files.HEADER: signed}))


def _sign_onnx(content: bytes) -> bytes:
    proto = onnx.load_from_string(content)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    header = runtimes.Header.model_validate_json(metadata[runtimes.HEADER])
    signed = header.signed(runtimes.onnx_content(header.card, proto)).model_dump_json()
    proto.metadata_props.add(key=runtimes.HEADER, value=signed)
    return bytes(proto.SerializeToString())


def _sign_openvino(description: bytes, weights: bytes) -> bytes:
    digest = re.search(rb"&quot;sha256&quot;:&quot;([0-9a-f]{64})", description)
    assert digest is not None
    unsigned = description.replace(digest[1], runtimes.UNSIGNED.encode(), 1)
    signed = hashlib.sha256(b"".join(runtimes.openvino_content(unsigned, weights))).hexdigest()
    return description.replace(digest[1], signed.encode(), 1)


def _in_onnx_card(nasty: Nasty) -> Mutation:
    def mutate(rng: Random, content: bytes) -> bytes:
        proto = onnx.load_from_string(content)
        for entry in proto.metadata_props:
            changed = mutations.changed_value(rng, json.loads(entry.value), nasty.texts)
            entry.value = json.dumps(changed)
        return bytes(proto.SerializeToString())

    return mutate


def weights(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """Weights of a backbone, as safetensors and as .pth."""

    def target(file: Path, *spoil: Mutation) -> Target:
        config = BackboneConfig(model="test_vit", weights="file", file=str(file))
        return Target(file, spoil, lambda: load_backbone(config, image_size=SIDE, num_classes=3, seed=0))

    return [
        target(sound.inputs / "weights.safetensors", mutations.of_safetensors(nasty.texts), nasty.of_bytes()),
        target(
            sound.inputs / "weights.pth", _in_zip(nasty.of_bytes(), "data.pkl", zipfile.ZIP_STORED), nasty.of_bytes()
        ),
    ]


def _in_zip(inner: Mutation, ending: str = "", method: int = zipfile.ZIP_DEFLATED) -> Mutation:
    """Return a mutation of one member of a zip, or of its name."""

    def mutate(rng: Random, content: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        index = rng.choice([index for index, (name, _) in enumerate(members) if name.endswith(ending)])
        name, data = members[index]
        if rng.random() < 0.8:
            members[index] = (name, inner(rng, data))
        else:
            members[index] = (inner(rng, name.encode()).decode(errors="replace")[:60_000] or "x", data)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
        return stream.getvalue()

    return mutate


def data_sets(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """Archives, tables and packed arrays of every data set, and single images."""
    plain = nasty.of_bytes()
    packed = mutations.within(gzip.decompress, lambda content: gzip.compress(content, 1), plain)
    lines = mutations.of_lines(nasty.texts)
    folder = sound.inputs / "data"
    images = sound.inputs / "images"
    files: list[tuple[str, Path, tuple[Mutation, ...]]] = [
        ("elpv", next((folder / "elpv").iterdir()), (_in_zip(plain), _in_zip(lines, "labels.csv"), plain)),
        ("image-folder", folder / "images.zip", (_in_zip(plain), plain)),
        ("csv", folder / "csv" / "images.csv", (lines, plain)),
        ("hf", folder / "hf" / "data" / "train-00000-of-00001.parquet", (plain,)),
        ("tiny-imagenet", folder / "tiny-imagenet" / "words.txt", (lines, plain)),
        ("tiny-imagenet", folder / "tiny-imagenet" / "val" / "val_annotations.txt", (lines, plain)),
        *((name, next((folder / name).iterdir()), (plain,)) for name in ("cifar10", "cifar100")),
        *(("fashion-mnist", file, (packed, plain)) for file in sorted((folder / "fashion-mnist").iterdir())),
    ]
    targets = [
        Target(
            file,
            spoil,
            _decoding(name, _path_of(configuration), configuration),
            names=(configuration, *([folder / "hf"] if name == "hf" else [])),  # and the row, of an image in a table
        )
        for name, file, spoil in files
        for configuration in [folder / f"{name}.yaml"]
    ]
    for image in sorted((images / "class_0").iterdir())[:5]:
        others = [file for file in images.rglob("*.*") if file.suffix != image.suffix]
        ways = [nasty.of_bytes(*others[:3])]
        if image.suffix == ".png":
            ways.append(mutations.of_png(plain))
        targets.append(Target(image, tuple(ways), _decoding("image-folder", images)))
    return targets


def _path_of(configuration: Path) -> Path:
    return Path(json.loads(configuration.read_text())["data"]["path"])


def _decoding(name: Any, path: Path, configuration: Path | None = None) -> Callable[[], object]:
    """Return a call that opens a data set, splits it, and decodes a few of its images.

    Data that does not suffice for the splits that a configuration asks for is a fault of both, and the latter is named.
    """
    config = DataConfig(dataset=name, path=str(path), image_size=14, validation_images=6, test_images=6)

    def read() -> None:
        index = open_index(config)
        with named(configuration):
            make_splits(index, config, 0)
        pixels = cached_pixels(index, np.arange(min(8, len(index.labels))), 14)
        assert pixels.dtype == np.uint8

    return read


def caches(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """Files of the package's own cache: decoded images, remembered hashes, and what runs cost."""
    tiny = sound.inputs / "tiny.yaml"
    images = _decoding("image-folder", sound.inputs / "images")

    def plan_with_costs() -> dict[str, RunSpec]:
        unknown: dict[str, RunSpec] = {}

        def measure(kinds: Mapping[str, RunSpec]) -> dict[str, MeasuredCosts]:
            unknown.update(kinds)
            return {}

        plan_study(load_study(tiny), sound.out, file=tiny, measure=measure)
        return unknown

    for kind in plan_with_costs().values():
        cache_costs(kind, MeasuredCosts(start_s=2.0, step_s=0.01, image_s=0.001, peak_memory_bytes=10**8, images=24))
    cases: list[tuple[str, Callable[[], object]]] = [("pixels", images), ("hashes", images), ("costs", plan_with_costs)]
    targets = []
    for name, read in cases:
        read()
        files = [file for file in (sound.cache / name).rglob("*") if file.is_file()]
        file = min(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
        ways = (mutations.of_json(nasty.texts), nasty.of_bytes()) if file.suffix == ".json" else (nasty.of_bytes(),)
        targets.append(Target(file, ways, read))
    return targets


def studies(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """study.json, the lock's file and a run's progress.json, as `status`, `report` and `run` read them."""
    copy = sound.out / "results"

    def status(results: Path) -> None:
        for folder in find_studies(results):
            for line in status_lines(study_status(folder)):
                assert is_one_line(line), line

    def status_while_locked(results: Path) -> None:
        with (results / "tiny" / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            status(results)

    def summary() -> None:
        for study in read_results(sound.interrupted).studies:
            assert len(study.unfinished) == 1

    def go_on() -> None:
        file = sound.inputs / "tiny.yaml"
        plan_study(load_study(file), sound.results, file=file)

    def begin() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound.interrupted, copy)
        with study_lock(copy / "tiny") as lock:
            for line in StudyStore(lock, ("adaptive/seed_0",)).notices:
                assert is_one_line(line), line

    def ways(results: Path) -> tuple[Callable[[], None], Callable[[], None]]:
        return partial(status, results), partial(status_while_locked, results)

    opened = [
        (sound.results, STUDY_FILE, (*ways(sound.results), go_on)),
        (sound.results, LOCK_FILE, (*ways(sound.results), go_on)),
        (sound.interrupted, f"adaptive/seed_0/{PROGRESS_FILE}", (*ways(sound.interrupted), summary, begin)),
    ]
    spoil = (mutations.of_json(nasty.texts), nasty.of_bytes())
    return [
        Target(results / "tiny" / name, spoil, read, places=True)
        for results, name, all_ways in opened
        for read in all_ways
    ]


def checkpoints(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """The newest checkpoint of an interrupted run, with hashes that vouch for the change."""
    (planned,) = plan_study(
        load_study(sound.inputs / "interrupted.yaml"), sound.interrupted, file=sound.inputs / "interrupted.yaml"
    ).runs
    run = sound.interrupted / planned.spec.run_id
    folders = checkpoint_folders(run)
    newest = folders[max(folders)]
    copy = sound.out / "interrupted"

    def go_on() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound.interrupted, copy)
        finished = run_one(planned.spec, checkpoints=Checkpoints(copy / planned.spec.run_id, 3600))
        if finished.record.status == "failed":  # as the command says it, in one line that names the checkpoint
            raise UserError(finished.record.error or "")

    def believed(name: str) -> Callable[[bytes], dict[Path, bytes]]:
        def change(content: bytes) -> dict[Path, bytes]:
            tensors = content if name == TENSORS_FILE else (newest / TENSORS_FILE).read_bytes()
            try:
                saved = json.loads((newest / STATE_FILE).read_bytes() if name == TENSORS_FILE else content)
                saved = {key: value for key, value in saved.items() if key != "sha256"}
                saved["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
                digest = hashlib.sha256(json.dumps(saved).encode()).hexdigest()
            except (ValueError, AttributeError, RecursionError):  # no JSON, or no mapping, any more
                return {}
            return {newest / STATE_FILE: json.dumps({"sha256": digest, **saved}).encode()}

        return change

    names = (copy / planned.spec.run_id,)
    targets = []
    for name, way in (
        (STATE_FILE, mutations.of_json(nasty.texts)),
        (TENSORS_FILE, mutations.of_safetensors(nasty.texts)),
    ):
        for opened in (lambda: read_checkpoint(newest), go_on):
            spoil = (way, nasty.of_bytes())
            targets.append(Target(newest / name, spoil, opened, believed(name), names))
        targets.append(Target(newest / name, (nasty.of_bytes(),), go_on, names=names))
    return targets


KINDS: dict[str, Callable[[SoundFiles, Nasty], list[Target]]] = {
    "configuration": configurations,
    "record": records,
    "adapter": adapters,
    "exported model": models,
    "weights": weights,
    "data set": data_sets,
    "cache": caches,
    "study": studies,
    "checkpoint": checkpoints,
}
