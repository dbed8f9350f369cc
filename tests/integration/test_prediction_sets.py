"""`predict --coverage`, from a file that says how far its model can be believed."""

import pytest

from peft_vit.deployment import Calibrated, open_exported
from peft_vit.runs.export import export_run_to_file

KNOWN = Calibrated(images=60, temperature=3.0, coverages=(0.8, 0.9), thresholds=(0.4, 0.999))


@pytest.mark.parametrize(("format", "ending"), [("onnx", "onnx"), ("safetensors", "safetensors")])
def test_files_say_how_far_they_can_be_believed(run_of, images, tmp_path, command, refused, format, ending) -> None:
    run, file, image = run_of("lora"), tmp_path / f"model.{ending}", images / "class_1" / "00.png"
    export_run_to_file(run, file, format, calibrated=KNOWN)
    assert open_exported(file).card.calibrated == KNOWN
    name, label, sure = command("predict", file, image).out.split("\t")
    assert name == str(image)
    assert float(sure) < float(command("predict", run, image).out.split("\t")[2])  # calibrated: not so sure
    _, *found = command("predict", file, image, "--coverage", "0.9").out.strip().split("\t")
    assert found[0] == label
    assert sorted(found[::2]) == ["class_0", "class_1", "class_2"]  # 1 - p is below 0.999 for all
    assert [float(p) for p in found[1::2]] == sorted((float(p) for p in found[1::2]), reverse=True)
    assert sum(float(p) for p in found[1::2]) == pytest.approx(1, abs=2e-4)
    line = refused("predict", file, image, "--coverage", "0.95")
    assert line == (f"error: {file}: coverage: expected 0.8 to 0.9, for which the model has thresholds; got 0.95")
    line = refused("predict", run, image, "--coverage", "0.9")
    assert "coverage: is of models that `peft-vit tune` has made, and this one holds no thresholds" in line
