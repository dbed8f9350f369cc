"""On a model of each family every method trains, comes back, merges, goes to ONNX, OpenVINO, PEFT and into a report."""

import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import tiny_transformers
import torch
from exported_files import logits_of
from small_methods import ADALORA, EXPERIMENTS
from tiny_models import TINY_EVAS
from torch import nn
from written_runs import TRAINING, stopped_and_continued, tiny_study

from peft_vit.core.adapters.peft_format import import_peft
from peft_vit.core.backbones import Architecture, load_backbone
from peft_vit.core.backbones.catalog import build_model
from peft_vit.core.config import BackboneConfig
from peft_vit.deploy import export_onnx, export_openvino, load_low_bit, merge, save_low_bit
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.records.storage import read_record

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("cache")

FAMILIES = ("tiny_swin", "tiny_beit", "tiny_hiera", "tiny_swin_v2", "tiny_distilled", "tiny_naflex")
WAYS = ("tiny_swin", "tiny_naflex")  # that go the whole way; of the others each step is tried by itself
OTHERS = ("tiny_pool", "tiny_hybrid")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def cases(*names: str, everywhere: tuple[str, ...], quick: tuple[str, ...]) -> pytest.MarkDecorator:
    """Return methods by models: all on two models, some of them on each; those that are not quick are slow."""
    cases = []
    for model in (*TINY_EVAS, *FAMILIES, *OTHERS):
        for name in names if model in ("tiny_dinov3", "tiny_swin") else everywhere:
            slow = model != "tiny_dinov3" and (model != "tiny_swin" or name not in quick)
            cases.append(pytest.param(model, name, marks=[pytest.mark.slow] if slow else []))
    return pytest.mark.parametrize(("model", "name"), cases)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IMAGES)


OURS, THEIRS = ("linear", "lora", "adaptive"), ("theirs", "theirs_adaptive", "dora")
PACKED = ("int4", "int4_adaptive", "mixed")


@cases(
    "full", *OURS, *THEIRS, *PACKED, everywhere=("full", "adaptive", "dora", *PACKED[1:]), quick=("adaptive", "mixed")
)
def test_a_run_comes_back_and_its_merged_model_computes_the_same_here_and_from_a_file(
    run_of, model, tmp_path, name
) -> None:
    run = restore_run(run_of(name, model))
    expected = logits(run.model)
    merged = merge(run.model, run.card)
    tolerance = {"float": 1e-5, "offsets": 2e-2}[merged.how]  # offsets are rounded to float16
    torch.testing.assert_close(logits(merged.model), expected, rtol=0, atol=tolerance)
    save_low_bit(merged.model, tmp_path / "model.safetensors", run.card)
    loaded, _ = load_low_bit(tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(merged.model))


@cases("adaptive", "int4", everywhere=("int4",), quick=())
def test_onnxruntime_computes_the_same(run_of, model, tmp_path, name) -> None:
    pytest.importorskip("onnxscript")
    run = restore_run(run_of(name, model))
    merged = merge(run.model, run.card)
    export_onnx(merged.model, tmp_path / "model.onnx", run.card)
    predict = partial(logits_of, tmp_path / "model.onnx")
    torch.testing.assert_close(predict(IMAGES), logits(merged.model), rtol=0, atol=1e-4)


@cases("int4", everywhere=("int4",), quick=())
def test_openvino_computes_the_same(run_of, model, tmp_path, name) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    run = restore_run(run_of(name, model))
    merged = merge(run.model, run.card)
    export_openvino(merged.model, tmp_path / "model.xml", run.card)
    predict = partial(logits_of, tmp_path / "model.xml")
    expected = logits(merged.model)
    # Offsets are rounded once more, as zero points in float16.
    torch.testing.assert_close(predict(IMAGES), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@cases(*OURS, *THEIRS, everywhere=("adaptive", "theirs_adaptive"), quick=("adaptive",))
def test_peft_loads_an_export_over_the_plain_model_and_so_do_we(run_of, model, tmp_path, command, name) -> None:
    run_dir = run_of(name, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command("export", run_dir, "--format", "peft", "--output", tmp_path / "out")
    start = load_backbone(BackboneConfig(model=model, weights="random"), image_size=32, num_classes=3, seed=1)
    plain = build_model(Architecture("timm", model), 32, 3)
    plain.load_state_dict(start.model.state_dict())
    past = [module for module in plain.modules() if getattr(module, "q_bias", None) is not None]
    assert any("qkv_bias_separate" in str(entry.message) for entry in caught) == bool(past)
    for attention in past:  # docs/reference/backbones.md: timm would go past PEFT's layer
        attention.qkv_bias_separate = True
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    expected = logits(restore_run(run_dir).model)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    if name not in ("linear", "dora"):  # import_peft takes LoRA
        ours = build_model(Architecture("timm", model), 32, 3)
        ours.load_state_dict(start.model.state_dict())
        import_peft(ours, tmp_path / "out")
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)


@cases("int4_adaptive", "full", "mixed", everywhere=("int4_adaptive",), quick=("int4_adaptive",))
def test_a_stopped_run_comes_to_the_same_end(run_of, model, tmp_path, name) -> None:
    whole = read_record(run_of(name, model) / "record.json")
    again = stopped_and_continued(whole.spec, tmp_path)
    assert again.error is None
    assert outcome_digest(again) == outcome_digest(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("model", [*WAYS, "transformers siglip2"])
def test_from_a_study_to_predictions(images, tmp_path, command, model) -> None:
    library, _, kind = model.rpartition(" ")
    backbone = {"model": model, "weights": "random"}
    if library:
        tiny_transformers.folder_of(kind, tmp_path / "base")
        backbone = {"library": library, "model": str(tmp_path / "base"), "weights": "file"}
    macs = {key: value for key, value in ADALORA.items() if key != "total_rank_budget"} | {"total_mac_budget": 100_000}
    file, results = tmp_path / "way.yaml", tmp_path / "results"
    sections = {"adaptive": {"adalora": macs}, "mixed": {}, "linear": {"training": {}}}
    experiments = [{"name": name, "training": TRAINING, **EXPERIMENTS[name], **more} for name, more in sections.items()]
    mapping = tiny_study(images=images, backbone=backbone, experiments=experiments, measures={"removal_images": 6})
    file.write_text(json.dumps(mapping | {"seeds": [0, 1]}))
    command("run", file, "--output", results)
    command("report", results)
    page = (results / "report" / "report.html").read_text()
    record = read_record(results / "tiny" / "adaptive" / "seed_0" / "record.json")
    assert record.spec.data.interpolation == ("bilinear" if library else None)
    kinds = {site.matrix for site in record.sites}
    assert len(kinds) >= 5
    assert all(kind in page for kind in kinds)
    files = sorted(images.rglob("*.png"))[::12]
    for name, kinds_of_files in (("adaptive", ("onnx", "safetensors", "peft")), ("mixed", ("onnx", "safetensors"))):
        run_dir = results / "tiny" / name / "seed_0"
        wanted = _predicted(command("predict", run_dir, *files).out)
        for kind in kinds_of_files:
            exported = tmp_path / f"{name}.{kind}"
            command("export", run_dir, "--format", kind, "--output", exported)
            weights = ("--weights", tmp_path / "base" if library else "random") if kind == "peft" else ()
            predicted = _predicted(command("predict", exported, *files, *weights).out)
            assert predicted.keys() == wanted.keys()
            assert all(predicted[at][0] == wanted[at][0] for at in files)
            assert all(predicted[at][1] == pytest.approx(wanted[at][1], abs=2e-3) for at in files)
        folder = tmp_path / f"{name}.pretrained"
        printed = command("export", run_dir, "--format", "pretrained", "--output", folder).out
        assert "100.00 % of predictions equal" in printed
        predicted = _predicted(command("predict", folder, *files).out)
        assert {at: said[0] for at, said in predicted.items()} == {at: said[0] for at, said in wanted.items()}


def test_check_tries_openvino_where_it_is_asked_for(command, refused, without) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    arguments = ("check", "tiny_pool", "--image-size", 32)
    printed = command(*arguments, "--openvino").out
    assert "ONNX: differs by" in printed
    assert "OpenVINO: differs by" in printed
    without("openvino")
    assert "pip install 'peft-vit[openvino]'" in refused(*arguments, "--openvino")


def _predicted(printed: str) -> dict[Path, tuple[str, float]]:
    header, *rows = [line.split("\t") for line in printed.splitlines()]
    assert header == ["file", "class", "probability"]
    return {Path(file): (name, float(probability)) for file, name, probability in rows}
