"""Sound files of every kind that the package reads, made by the package itself: what the torture tests then spoil."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sample_sets import sample_path
from small_methods import study_mapping
from tiny_studies import METHODS, with_adalora

from peft_vit.core.config import load_study
from peft_vit.core.training import Checkpoints, Interrupted
from peft_vit.deploy.export import export_run_to_file, export_run_to_peft
from peft_vit.runs.execute import run_one
from peft_vit.runs.planned import Plan
from peft_vit.runs.records.progress import LOCK_FILE, study_lock
from peft_vit.runs.records.storage import run_folder, write_study_file
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.scheduler import StudyStore, study_file

SIDE = 32
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_TRAINING = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "compute": "float"}
_EXPERIMENTS: dict[str, dict[str, Any]] = {
    "plain": {"method": "lora", "lora": {"rank": 2}},
    "adaptive": {"method": "adalora", **with_adalora(update_frequency=1, warmup_steps=1, final_steps=1)},
    "quantized": {
        "method": "qa_lora",
        "qa_lora": {**METHODS["qa_lora"]["qa_lora"], "quantization_schedule": "constant"},
    },
}


class SoundFiles:
    """Where everything lies below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = root / "in"  # what is read, and must stay as it is
        self.out = root / "out"  # what is given as --output
        self.cache = root / "cache"  # the package's
        self.outside = root / "outside"  # what malicious names and programs are after: nothing may ever appear here
        self.marker = self.outside / "ran"  # comes to be if a file's code is run
        self.writable = (self.out, self.cache, root / "home", root / "tmp")
        self.results = self.inputs / "results"  # three finished runs of the study `tiny`
        self.interrupted = self.inputs / "interrupted"  # the same study with one run, of which half is done
        self.image = self.inputs / "images" / "class_0" / "00.png"

    def run(self, experiment: str) -> Path:
        """Return the folder of a run: plain, adaptive or quantized."""
        return self.results / "tiny" / experiment / "seed_0"

    def fault_outside(self) -> str | None:
        """Return what was made outside, where nothing may be, and clear it away."""
        if not (names := [path.name for path in self.outside.iterdir()]):
            return None
        shutil.rmtree(self.outside)
        self.outside.mkdir()
        return f"something was made outside: {names}"

    def environment(self) -> dict[str, str]:
        """Return variables for processes that are to stay in these folders and without a network."""
        return {
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "PEFT_VIT_CACHE": str(self.cache),
            "MPLCONFIGDIR": str(self.root / "home" / "matplotlib"),
            "HF_HUB_OFFLINE": "1",
            "PIP_NO_INDEX": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.root / "tmp" / "inductor"),  # torch sets it, and children inherit it
        }


def make_sound_files(root: Path, *, onnx: bool = True) -> SoundFiles:
    """Make images, data sets, weights, runs and exported models below a new folder, in some seconds."""
    sound = SoundFiles(root)
    for folder in (*sound.writable, sound.outside, sound.inputs):
        folder.mkdir(parents=True)
    os.environ |= sound.environment()
    torch.set_num_threads(1)
    _make_images(sound.inputs / "images")
    _make_weights(sound.inputs)
    _do_runs(sound)
    export_run_to_peft(sound.run("plain"), sound.inputs / "peft")
    export_run_to_file(sound.run("quantized"), sound.inputs / "model.safetensors", "safetensors")
    if onnx:
        export_run_to_file(sound.run("quantized"), sound.inputs / "model.onnx", "onnx")
        export_run_to_file(sound.run("quantized"), sound.inputs / "model.xml", "openvino")
    _make_data_sets(sound.inputs)
    return sound


def _make_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(8):
            pixels = rng.normal(colour, 70, (12, 18, 3)).clip(0, 255).astype(np.uint8)
            suffix = (".png", ".jpg", ".bmp", ".webp", ".png", ".jpg", ".png", ".png")[number]
            Image.fromarray(pixels).save(folder / f"class_{label}" / f"{number:02}{suffix}")


def _make_weights(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = timm.create_model("test_vit", img_size=SIDE).state_dict()
    save_file(state, folder / "weights.safetensors")
    torch.save(state, folder / "weights.pth")


def configuration(inputs: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the study `tiny` on some data."""
    return study_mapping(
        [{"name": name, **experiment} for name, experiment in _EXPERIMENTS.items()],
        backbone={"model": "test_vit", "weights": "file", "file": str(inputs / "weights.safetensors")},
        data={"image_size": SIDE, "validation_images": 6, "test_images": 6, **data},
        training=_TRAINING,
    )


def _do_runs(sound: SoundFiles) -> None:
    """Do three runs as a driver would, in this process; and half of another one in a directory of its own."""
    mapping = configuration(sound.inputs, {"dataset": "image-folder", "path": str(sound.inputs / "images")})
    with _begun(mapping, sound.inputs / "tiny.yaml", sound.results) as (plan, store):
        for planned in plan.runs:
            store.started(planned.spec.name, "torture", planned.total_steps)
            finished = run_one(planned.spec)
            if finished.adapter is None:
                raise RuntimeError(finished.record.traceback)
            store.ended(finished.record, finished.adapter, finished.features)
    mapping["experiments"] = mapping["experiments"][1:2]
    with _begun(mapping, sound.inputs / "interrupted.yaml", sound.interrupted) as (plan, store):
        (planned,) = plan.runs
        store.started(planned.spec.name, "torture", planned.total_steps)
        steps: list[int] = []
        checkpoints = Checkpoints(run_folder(sound.interrupted, planned.spec), 0)
        try:
            run_one(
                planned.spec,
                checkpoints=checkpoints,
                on_progress=lambda progress: steps.append(progress.step),
                should_stop=lambda: len(steps) == 3,
            )
        except Interrupted:
            store.interrupted(planned.spec.name)


@contextmanager
def _begun(mapping: dict[str, Any], file: Path, results: Path) -> Iterator[tuple[Plan, StudyStore]]:
    file.write_text(json.dumps(mapping))  # JSON is YAML
    study = load_study(file)
    plan = plan_study(study, results, file=file)
    with study_lock(results / study.name) as lock:
        names = {run.spec.name for run in plan.runs}
        content = study_file(study, names, smoke=False, data_sha256=plan.data_sha256)
        write_study_file(lock.folder, content)
        yield plan, StudyStore(lock, content.runs)
        left = (lock.folder / LOCK_FILE).read_bytes()
    (lock.folder / LOCK_FILE).write_bytes(left)  # as if its owner had been killed


def _make_data_sets(inputs: Path) -> None:
    """Put a small set of each format below `data`, with the configuration of a study on it beside."""
    folder = inputs / "data"
    paths = {"image-folder": folder / "images.zip", "elpv": folder / "elpv" / "elpv.zip"}
    for name in ("fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "csv", "hf"):
        path = sample_path(name)
        source = path if path.is_dir() else path.parent
        shutil.copytree(source, folder / name)
        paths[name] = folder / name if path.is_dir() else folder / name / path.name
    (folder / "elpv").mkdir()
    for name, source in (("image-folder", inputs / "images"), ("elpv", sample_path("elpv"))):
        with zipfile.ZipFile(paths[name], "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(source.rglob("*.*")):
                archive.write(file, file.relative_to(source))
    for name, path in paths.items():
        data = {"dataset": name, "path": str(path)}
        (folder / f"{name}.yaml").write_text(json.dumps(configuration(inputs, data), indent=1))  # JSON is YAML
