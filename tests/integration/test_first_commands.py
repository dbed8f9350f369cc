"""What a stranger calls first: --version, doctor, example, and completion of what is typed."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import peft_vit
from peft_vit import doctor
from peft_vit.config import load_study
from peft_vit.extras import EXTRAS


@pytest.fixture
def no_network(monkeypatch) -> None:
    def unreachable() -> str:
        raise OSError("no route to host\x1b[2J")

    monkeypatch.setattr(doctor, "_ask_index", unreachable)
    monkeypatch.setattr(doctor, "_ask_hub", lambda: "https://hub.example")


def test_the_version_is_told(command) -> None:
    assert command("--version").out == f"peft-vit {metadata.version('peft-vit')}\n"
    assert peft_vit.__version__ == metadata.version("peft-vit")


@pytest.mark.usefixtures("no_network")
def test_doctor_tells_all_on_one_screen(command, cache, without, monkeypatch) -> None:
    without("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path(cache, "some.bin").write_bytes(bytes(20_000_000))
    lines = command("doctor").out.splitlines()
    found = {line[:13].strip(): line[14:] for line in lines if line[:13].strip()}
    assert len(lines) <= 24
    assert f"torch {metadata.version('torch')}" in found["packages"]
    assert found["threads"].startswith("1 in PyTorch; OMP_NUM_THREADS=1")
    assert found["cache"].startswith(f"{cache}, 0.0")
    assert " 0.00 GB" not in found["cache"]
    assert found["package index"] == "not reachable: no route to host\\x1b[2J"
    assert found["hub"].startswith("https://hub.example, reachable, ")
    assert {"onnx", "report"} <= set(found["extras"].split(", ")) < set(EXTRAS)
    assert f"{'':14}ray needs ray; run: pip install 'peft-vit[ray]'" in lines


@pytest.mark.usefixtures("no_network")
def test_doctor_works_without_torch_and_says_that_nothing_else_does(command, cache, without) -> None:
    names = [name for name in sys.modules if name.split(".")[0] == "peft_vit" and name.startswith("peft_vit.runs")]
    without("torch", *names)
    said = command("doctor", code=1).out
    assert "can't be told: ModuleNotFoundError" in said
    assert "cache" in said


def test_an_answer_that_never_comes_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_LONGEST_WAIT_S", 0.0)
    waiting = doctor._ask({"hub": lambda: os.read(os.pipe()[0], 1).decode()})  # nobody writes into this pipe
    assert [line.text for line in waiting()] == ["not reachable: no answer in 0 s"]


@pytest.mark.parametrize("name", ["quickstart", "demo"])
def test_an_example_is_a_study(command, tmp_path, name) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(command("example", name).out)
    assert load_study(file).name == name


def test_completion_needs_no_torch() -> None:
    """As bash asks: which commands begin with `exa`."""
    code = (
        "import sys\nsys.argv[0] = 'peft-vit'\nfrom peft_vit.cli import main\ntry:\n    main([])\n"
        "finally:\n    assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    )
    asked = {"_PEFT_VIT_COMPLETE": "complete_bash", "COMP_WORDS": "peft-vit exa", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **asked}
    )
    assert (done.stdout.split(), done.returncode) == (["example"], 0), done.stderr
