"""A PEFT adapter goes on training on somebody's own images, and comes out as one that PEFT loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from written_runs import run_and_write

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import site_adapters
from peft_vit.core.adapters.peft_format import CONFIG_FILE, TENSORS_FILE, import_peft, start_sha256
from peft_vit.core.config import study_from_mapping
from peft_vit.core.records import RunRecord
from peft_vit.deploy.restore import restore_run
from peft_vit.fit import intake, sizes
from peft_vit.fit.fit import Fit
from peft_vit.fit.request import TrainRequest
from peft_vit.runs.planned import PlannedRun
from peft_vit.runs.records.storage import read_record
from peft_vit.runs.scheduling.plan import plan_study

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("cache")

MODEL = ("--model", "test_vit", "--image-size", "32", "--threads", "1")
INPUT = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_model(weights: Path):
    model = timm.create_model("test_vit", img_size=32)
    model.load_state_dict(load_file(weights))
    model.reset_classifier(3)
    return model


@pytest.fixture(scope="module")
def adapter(weights, tmp_path_factory) -> Path:
    """Save a PEFT LoRA adapter with a head of 3 classes, its factors random, as if trained."""
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    theirs = peft.get_peft_model(plain_model(weights), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    return folder


def changed(adapter: Path, folder: Path, tensors=None, **config) -> Path:
    shutil.copytree(adapter, folder)
    (folder / CONFIG_FILE).write_text(json.dumps(json.loads((folder / CONFIG_FILE).read_text()) | config))
    if tensors is not None:
        save_file(tensors(load_file(folder / TENSORS_FILE)), folder / TENSORS_FILE)
    return folder


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(INPUT)


def planned(adapter: Path, images: Path, weights: Path, out: Path) -> PlannedRun:
    settings = {"model": "test_vit", "weights": str(weights), "image_size": 32, "threads": 1}
    length = {"steps": 20, "learning_rate": 1e-2}
    request = TrainRequest(images=images, method="lora", seed=0, init_adapter=adapter, **settings, **length)
    fit = Fit(request, lambda _: None)
    with fit.opened:
        intake.look(fit)
        fit.folder = out.with_suffix(".fit")
        intake.keep_images(fit)
        recipe = sizes.usual_recipe(fit, "test_vit", 32, 20)
        mapping = fit.study("own-images", recipe, [0], [fit.experiment(recipe)], folds=None)
    (run,) = plan_study(study_from_mapping(mapping, file=images), out, file=images).runs
    return run


def imported(adapter: Path, images: Path, weights: Path, out: Path) -> RunRecord:
    """Do in this process what the command does in a worker."""
    return run_and_write(planned(adapter, images, weights, out).spec, out)


@pytest.mark.usefixtures("in_this_process")
def test_training_goes_on_from_peft_and_back_to_it(adapter, images, weights, tmp_path, command) -> None:
    before = logits(peft.PeftModel.from_pretrained(plain_model(weights), adapter))
    start = plain_model(weights)
    import_peft(start, adapter)
    torch.testing.assert_close(logits(start), before, rtol=0, atol=1e-5)

    asked = ("--method", "lora", "--init-adapter", adapter, *MODEL, "--weights", weights)
    length = ("--steps", "20", "--learning-rate", "1e-2", "--shots", "4")
    command("train", images, *asked, *length, "--output", tmp_path / "out")
    (run,) = (tmp_path / "out").glob("0001-lora-*")
    record = read_record(run / "imported" / "seed_0" / "record.json")
    assert (record.status, record.warnings) == ("done", [])
    assert record.spec.data.shots_per_class == 4
    assert record.provenance.start_sha256 == start_sha256(adapter)
    assert record.spec.experiment.lora.start == str(adapter)
    assert [(s.name, s.matrix) for s in record.sites[:2]] == [("blocks.0.attn.qkv", "qkv"), ("blocks.0.mlp.fc1", "fc1")]
    assert set(record.rank_history[0].ranks.values()) == {3}
    assert record.parameters.final == 6 * 2 * 3 * (64 + 192) + 3 * 65

    trained = logits(restore_run(run).model)
    assert (trained - before).abs().max() > 0.01
    command("export", run, "--format", "peft", "--output", tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(plain_model(weights), tmp_path / "again")
    torch.testing.assert_close(logits(theirs), trained, rtol=0, atol=1e-5)
    command("report", tmp_path / "out")


@pytest.mark.slow
def test_a_finished_run_knows_its_start_and_is_restored_without_it(adapter, images, weights, tmp_path) -> None:
    mine, out = changed(adapter, tmp_path / "mine"), tmp_path / "out"
    first = imported(mine, images, weights, out)
    assert planned(mine, images, weights, out).done
    config = json.loads((mine / CONFIG_FILE).read_text())
    (mine / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 9.0}))
    with pytest.raises(UserError, match="was made with another adapter under the same path"):
        planned(mine, images, weights, out)
    shutil.rmtree(mine)
    restored = restore_run(out / first.spec.run_id).model
    assert [adapter.scale for adapter in site_adapters(restored).values()] == [1.5] * 12
    again = imported(adapter, images, weights, tmp_path / "again")
    torch.testing.assert_close(
        logits(restored), logits(restore_run(tmp_path / "again" / again.spec.run_id).model), rtol=0, atol=0
    )


@pytest.mark.parametrize("case", ["other size", pytest.param("none", marks=pytest.mark.slow)])
def test_a_head_that_does_not_fit_starts_afresh_and_says_so(adapter, images, weights, tmp_path, case) -> None:
    def with_such_a_head(tensors):
        heads = {name: tensors.pop(name) for name in list(tensors) if ".head." in name}
        assert len(heads) == 2
        return tensors if case == "none" else tensors | {name: torch.cat([one, one]) for name, one in heads.items()}

    mine = changed(
        adapter, tmp_path / "mine", with_such_a_head, **({"modules_to_save": None} if case == "none" else {})
    )
    record = imported(mine, images, weights, tmp_path / "out")
    (warning,) = record.warnings
    brought = "no head" if case == "none" else "a head of 6 classes"
    assert f"brings {brought} and these images have 3, so a new head is trained" in warning
    assert record.test.n == 10
    head = record.provenance.head_init_sha256
    assert head != imported(adapter, images, weights, tmp_path / "with").provenance.head_init_sha256


def test_doubts_about_the_base_are_said_once(adapter, images, weights, tmp_path) -> None:
    same = changed(adapter, tmp_path / "same", base_model_name_or_path="timm/test_vit.r160_in1k")
    assert imported(same, images, weights, tmp_path / "out").warnings == []
    mine = changed(adapter, tmp_path / "mine", base_model_name_or_path="timm/vit_tiny_patch16_224")
    base = {"weights_name": "file other.safetensors", "weights_sha256": "0" * 64}
    (mine / "peft_vit.json").write_text(json.dumps(base | {"class_names": ["class_1", "class_0", "class_2"]}))
    named, trained, classes = imported(mine, images, weights, tmp_path / "other").warnings
    assert "'timm/vit_tiny_patch16_224'" in named
    assert "other.safetensors" in trained
    assert "0" * 64 in trained
    assert "['class_1', 'class_0', 'class_2']" in classes


@pytest.fixture
def refusal(refused, images: Path, weights: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a call of the training with an adapter: the one line that it prints, after checking that no run began."""

    def call(adapter: Path, images: Path = images) -> str:
        start = ("--method", "lora", "--init-adapter", adapter, *MODEL, "--weights", weights)
        line = refused("train", images, *start, "--steps", "20", "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return line

    return call


def test_what_is_no_adapter_or_does_not_fit_is_one_line_before_any_work(adapter, tmp_path, refusal) -> None:
    """All that can be wrong with an adapter is tried in tests/oracle/test_adapters_peft_format.py."""

    def narrow(tensors):
        return {name: t[:, :32].contiguous() if "lora_A" in name else t for name, t in tensors.items()}

    for name, tensors, config, said in (
        ("dora", None, {"use_dora": True}, "use_dora: True changes what the adapter computes"),
        ("narrow", narrow, {}, "expected shape (3, 64), got (3, 32)"),
    ):
        mine = changed(adapter, tmp_path / name, tensors, **config)
        line = refusal(mine)
        assert all(part in line for part in ("--init-adapter: ", str(mine), said))
    mine = changed(adapter, tmp_path / "mine")
    for content in ("[]", "{"):  # a note on the base that is none
        (mine / "peft_vit.json").write_text(content)
        assert "peft_vit.json" in refusal(mine)
    assert "name a folder that PEFT has saved" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert CONFIG_FILE in refusal(tmp_path / "empty")
    shutil.copy(adapter / CONFIG_FILE, tmp_path / "empty")
    assert TENSORS_FILE in refusal(tmp_path / "empty")
    assert "no images" in refusal(adapter, tmp_path / "no images")
