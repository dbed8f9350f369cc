"""What tests of finished runs share: weights out of a file, and one run of each experiment on them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from written_runs import run_and_write

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
def do_runs(
    weights: Path, _session_cache: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Path]]:
    """Do one run of each experiment on these weights, or another backbone; return folders by the experiments' names."""

    def do(
        experiments: dict[str, dict[str, object]], backbone: dict[str, str] | None = None, **data: object
    ) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("runs")
        mapping = {
            "name": "tiny",
            "seeds": [0],
            "threads": 1,
            "device": "cpu",
            "precision": "fp32",
            "backbone": backbone or {"model": "test_vit", "weights": "file", "file": str(weights)},
            "data": {"image_size": 32, **data},
            "experiments": [
                {"name": name, "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}, **experiment}
                for name, experiment in experiments.items()
            ],
        }
        file = folder / "tiny.yaml"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFT_VIT_CACHE", _session_cache)
            plan = plan_study(study_from_mapping(mapping, file=file), folder, file=file)
            for planned in plan.runs:
                record = run_and_write(planned.spec, folder)
                assert record.status == "done", record.traceback
        return {planned.spec.experiment.name: folder / planned.spec.run_id for planned in plan.runs}

    return do
