"""What a stranger calls first, and what is not imported or not needed before somebody asks for it."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import planted
import pytest
from written_runs import tiny_study

import peft_vit
from peft_vit.base.extras import EXTRAS
from peft_vit.core.config import load_study


def test_the_version_is_told(command) -> None:
    assert command("--version").out == f"peft-vit {metadata.version('peft-vit')}\n"
    assert peft_vit.__version__ == metadata.version("peft-vit")


def test_doctor_tells_all_on_one_screen(command, cache, without, monkeypatch) -> None:
    without("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path(cache, "some.bin").write_bytes(bytes(20_000_000))
    lines = command("doctor").out.splitlines()
    entries = {line[:13].strip(): line[14:] for line in lines if line[:13].strip()}
    assert len(lines) <= 24
    assert f"torch {metadata.version('torch')}" in entries["packages"]
    assert entries["threads"].startswith("1 in PyTorch; OMP_NUM_THREADS=1")
    assert entries["cache"].startswith(f"{cache}, 0.0")
    assert " 0.00 GB" not in entries["cache"]
    assert {"onnx", "report"} <= set(entries["extras"].split(", ")) < set(EXTRAS)
    assert f"{'':14}ray needs ray; run: pip install 'peft-vit[ray]'" in lines


def test_doctor_works_without_torch_and_says_that_nothing_else_does(command, cache, without) -> None:
    names = [name for name in sys.modules if name.split(".")[0] == "peft_vit" and name.startswith("peft_vit.runs")]
    without("torch", *names)
    said = command("doctor", code=1).out
    assert "unknown: ModuleNotFoundError" in said
    assert "cache" in said


@pytest.mark.parametrize("name", ["quickstart", "demo"])
def test_an_example_is_a_study(command, tmp_path, name) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(command("example", name).out)
    assert load_study(file).name == name


def test_it_is_refused_before_anything_is_read(tmp_path: Path, refused, without) -> None:
    without("matplotlib", "onnx")
    report = "error: a report needs the package matplotlib; run: pip install 'peft-vit[report]'"
    tuning = "error: tune needs the packages onnx and matplotlib; run: pip install 'peft-vit[tune]'"
    assert refused("report", tmp_path) == report
    assert refused("tune", tmp_path / "no images") == tuning
    assert not list(tmp_path.iterdir())


def test_tables_in_a_terminal_need_neither_torch_nor_what_draws(tmp_path: Path) -> None:
    """In another process, where nothing that an extra brings can be imported."""
    for place, seeds in (("a", (0, 1)), ("b", (2, 3))):
        planted.write(tmp_path / place, planted.quickstart(seeds))
    code = (
        "import sys\nfrom peft_vit.base.extras import EXTRAS\n"
        "for name in {name for needed in EXTRAS.values() for name in needed} - {'torch'}: sys.modules[name] = None\n"
        "from peft_vit.cli import main\n"
        "for command, *folders in (('recommend', 'a'), ('status', 'a'), ('compare', 'a', 'b')):\n"
        "    try:\n        main([command, *folders])\n"
        "    except SystemExit as done:\n        print(command, done.code)\n"
        "assert 'torch' not in sys.modules"
    )
    done = python(code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall("^(recommend|status|compare) ([0-9]+)$", done.stdout, re.MULTILINE) == [
        ("recommend", "0"), ("status", "0"), ("compare", "0")
    ]  # fmt: skip


def test_the_command_that_an_error_names_needs_no_index_for_this_package() -> None:
    """pip takes what an extra names from the installed package; here all of it is there, so nothing is fetched."""
    command = ["install", "--dry-run", "--no-index", "--disable-pip-version-check", f"peft-vit[{','.join(EXTRAS)}]"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
    assert "Would install" not in done.stdout


# --- what is imported, in processes of their own ---


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


LIGHT = """
import os, sys
before = set(sys.modules)
import peft_vit
brought = {name.split(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names
assert brought == {"peft_vit"}, brought  # so that it takes a few hundredths of a second
peft_vit.tune, peft_vit.train, peft_vit.load_results, peft_vit.AdaLoraConfig, peft_vit.QaLoraConfig
from peft_vit.cli import main
os.environ |= {"_PEFT_VIT_COMPLETE": "complete_bash", "COMP_WORDS": "peft-vit exa", "COMP_CWORD": "1"}
sys.argv[0] = "peft-vit"
for arguments in ([], ["--help"]):  # as bash asks which commands begin with `exa`
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
    os.environ.pop("_PEFT_VIT_COMPLETE", None)
assert not {"torch", "timm", "numpy", "pandas"} & set(sys.modules)
import peft_vit.data
assert not {"datasets", "pyarrow", "torchvision", "transformers"} & set(sys.modules)
"""


def test_nothing_is_imported_before_it_is_needed() -> None:
    done = python(LIGHT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "example"


HEAVY = (
    "bitsandbytes datasets jinja2 matplotlib onnx onnxruntime openvino pandas peft pyarrow rich scipy.optimize "
    "scipy.sparse scipy.special scipy.stats sklearn statsmodels transformers typer"
)
TRAINING = """
import json
import sys
from pathlib import Path

def loaded(stage):
    print(json.dumps({stage: [name for name in sys.argv[2].split() if name in sys.modules]}))

from peft_vit.core.config import study_from_mapping
from peft_vit.runs.execute import run_one
from peft_vit.runs.scheduling.plan import plan_study

loaded("imports")
mapping, file = json.loads(sys.argv[1]), Path("tiny.yaml")
for planned in plan_study(study_from_mapping(mapping, file=file), Path("out"), file=file).runs:
    record = run_one(planned.spec).record
    assert record.status == "done", record.traceback
    loaded(planned.spec.experiment.name)
"""


@pytest.mark.usefixtures("cache")
def test_a_run_loads_only_what_it_uses(images: Path, tmp_path: Path) -> None:
    """Each of these libraries would take up to 100 MB of a worker's memory."""
    mapping = tiny_study("nf4", "linear", images=images)
    done = python(TRAINING, json.dumps(mapping), HEAVY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = {stage: names for line in done.stdout.splitlines() for stage, names in json.loads(line).items()}
    probe = loaded.pop("linear")
    assert loaded == {"imports": [], "nf4": []}
    assert "sklearn" in probe  # which a linear probe is fitted by, so the names are those that Python knows
