"""A run on weights that stay in their file until they are packed is the run on copies, to the bit."""

from pathlib import Path

import pytest
import timm
import torch
from done_runs import do, with_settings
from safetensors.torch import load_file, save_file

from peft_vit.backbones import weights as tensor_file
from peft_vit.config import BackboneConfig
from peft_vit.records import ADAPTER_FILE, run_folder
from peft_vit.runs.restore import restore_run

pytestmark = pytest.mark.part("runner")


@pytest.mark.parametrize(
    ("method", "schedule"),
    [("qa_lora", "constant"), ("qa_lora", "linear"), ("qa_adalora", "constant"), ("qa_linear", "constant")],
)
def test_mapped_weights_are_trained_on_as_copies_are(study, tmp_path, monkeypatch, method, schedule) -> None:
    torch.manual_seed(3)
    tensors = timm.create_model("test_vit", img_size=32).state_dict()
    torch.save(tensors, tmp_path / "copied.pth")
    save_file(tensors, tmp_path / "mapped.safetensors")
    monkeypatch.setattr(tensor_file, "_SMALLEST_MAPPED_BYTES", 1)
    config = with_settings(study(method), "qa_lora", quantization_schedule=schedule)
    found = []
    for name in ("copied.pth", "mapped.safetensors"):
        backbone = BackboneConfig(model="test_vit", weights="file", file=str(tmp_path / name))
        (record,) = do(config.model_copy(update={"backbone": backbone}), tmp_path / Path(name).stem)
        folder = run_folder(tmp_path / Path(name).stem, record.spec)
        with torch.no_grad():
            logits = restore_run(folder).model(torch.ones(2, 3, 32, 32))
        found.append((record, load_file(folder / ADAPTER_FILE), logits))
    (copied, adapter, logits), (mapped, same_adapter, same_logits) = found
    assert adapter.keys() == same_adapter.keys()
    assert all(torch.equal(tensor, same_adapter[name]) for name, tensor in adapter.items())
    assert torch.equal(logits, same_logits)
    for field in ("test", "validation", "quantization"):
        assert getattr(copied, field) == getattr(mapped, field)
    assert [step.loss for step in copied.steps] == [step.loss for step in mapped.steps]
