"""What a worker process keeps between its runs, and what it inherits."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from peft_vit.backbones import read_weights
from peft_vit.config import BackboneConfig
from peft_vit.errors import UserError
from peft_vit.studies.executors import local
from peft_vit.studies.executors.local import WeightsOnce, environment

pytestmark = pytest.mark.part("runner")


def weights_file(folder, name: str) -> BackboneConfig:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int32), "c": torch.randn(2).bfloat16()}
    save_file(tensors, folder / name)
    return BackboneConfig(model="test_vit", weights="file", file=str(folder / name))


def test_weights_are_read_once_and_stay_what_they_were(tmp_path, monkeypatch) -> None:
    config, other = weights_file(tmp_path, "one.safetensors"), weights_file(tmp_path, "other.safetensors")
    reads = []
    monkeypatch.setattr(local, "read_weights", lambda config: reads.append(config) or read_weights(config))
    once = WeightsOnce()
    expected = read_weights(config)
    first = once(config)
    for tensor in first.tensors.values():
        tensor.zero_()  # a run may do with its tensors what it likes
    second = once(config)
    assert reads == [config]
    assert (second.name, second.sha256) == (expected.name, expected.sha256)
    assert second.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert second.tensors[name].dtype == tensor.dtype
        assert torch.equal(second.tensors[name], tensor)
    assert torch.equal(once(other).tensors["a"], read_weights(other).tensors["a"])
    assert torch.equal(once(config).tensors["a"], expected.tensors["a"])
    assert reads == [config, other, config]  # it keeps one


def test_a_file_that_is_missing_is_told_each_time(tmp_path) -> None:
    once = WeightsOnce()
    for _ in range(2):
        with pytest.raises(UserError, match="does not exist"):
            once(BackboneConfig(model="test_vit", weights="file", file=str(tmp_path / "none.safetensors")))


def test_variables_are_handed_down_and_taken_back(monkeypatch) -> None:
    monkeypatch.setenv("PEFT_VIT_TEST_SET", "mine")
    with environment({"PEFT_VIT_TEST_SET": "theirs", "PEFT_VIT_TEST_NEW": "new"}):
        assert os.environ["PEFT_VIT_TEST_SET"] == "mine"
        assert os.environ["PEFT_VIT_TEST_NEW"] == "new"
    assert os.environ["PEFT_VIT_TEST_SET"] == "mine"
    assert "PEFT_VIT_TEST_NEW" not in os.environ


def test_collections_of_a_run_look_at_what_it_made_alone() -> None:
    code = (
        "import gc, weakref\n"
        "from peft_vit.studies.executors.local import prepare_process\n"
        "prepare_process()\n"
        "class Cycle: pass\n"
        "cycle = Cycle()\n"
        "cycle.itself, gone = cycle, weakref.ref(cycle)\n"
        "del cycle\n"
        "print(gc.get_freeze_count() > 100 * len(gc.get_objects()), gc.collect() > 0, gone() is None)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "True True True\n"
