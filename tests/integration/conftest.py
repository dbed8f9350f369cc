"""What tests of finished runs share: weights out of a file, images in a folder, and one run of each method on them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_methods import EXPERIMENTS
from written_runs import run_and_write

from peft_vit.cli import main
from peft_vit.config import study_from_mapping
from peft_vit.studies import plan_study


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write random weights of timm's test_vit for 32 px."""
    file = tmp_path_factory.mktemp("weights") / "base.safetensors"
    torch.manual_seed(5)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), file)
    return file


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 48 images of three classes, each of its colour."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
        (root / f"class_{label}").mkdir()
        for number in range(16):
            pixels = rng.normal(colour, 70, (20, 30, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class_{label}" / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def run_of(
    images: Path, weights: Path, _session_cache: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return the folder of a finished run of a method, on these weights or on another model; it is done once."""

    @cache
    def do(name: str, model: str = "test_vit") -> Path:
        folder = tmp_path_factory.mktemp(name)
        start = {"weights": "file", "file": str(weights)} if model == "test_vit" else {"weights": "random"}
        data = {"dataset": "image-folder", "path": str(images), "validation_images": 12, "test_images": 12}
        training = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
        mapping = {
            "name": "tiny",
            "seeds": [0],
            "threads": 1,
            "device": "cpu",
            "precision": "fp32",
            "backbone": {"model": model, **start},
            "data": {"image_size": 32, **data},
            "experiments": [{"name": name, "training": training, **EXPERIMENTS[name]}],
        }
        file = folder / "tiny.yaml"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFT_VIT_CACHE", _session_cache)
            (planned,) = plan_study(study_from_mapping(mapping, file=file), folder, file=file).runs
            record = run_and_write(planned.spec, folder)
        assert record.status == "done", record.traceback
        return folder / planned.spec.run_id

    return do


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a call of the command line: what it printed, after checking its exit code; of bad input the one line."""

    def call(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert ended.value.code == code, said.err
        if code != 2:
            return said.out
        assert said.err.startswith("error: ")
        (line,) = said.err.splitlines()
        return line

    return call
