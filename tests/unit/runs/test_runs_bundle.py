"""Bundles: what they compute is what each model alone computes, files are read as written, others' are refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from done_runs import do, do_one, restored, with_settings
from PIL import Image
from safetensors.torch import save
from tiny_models import CARD, random_model

from peft_vit import Bundle
from peft_vit.api import open_classifier
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import adapted_modules, attach_adapters, site_adapters, store_in_bits
from peft_vit.core.backbones import Backbone, find_sites
from peft_vit.core.config import StartingRanksConfig
from peft_vit.deploy import load_low_bit, open_exported
from peft_vit.deploy.bundle import export_bundle
from peft_vit.deploy.formats.header import HEADER
from peft_vit.deploy.formats.packed_adapter import PackedAdapter, backbone_of
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import run_folder

pytestmark = pytest.mark.part("runner")
IMAGES = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
EVEN = StartingRanksConfig(rule="even", budget=200, unit="bytes")
MIXED = ["b", "a", "none", "b", "a"]


def write(model, card, folder, name, bits=32):
    """Write a model's adapter, and its backbone if it is the folder's first."""
    header, tensors = backbone_of(copy.deepcopy(model), card)
    (folder / "backbone.safetensors").write_bytes(save(tensors, metadata={HEADER: header.model_dump_json()}))
    packed = PackedAdapter.of_model(model, card, header, bits)
    (folder / f"{name}.safetensors").write_bytes(packed.content())
    return packed


def write_one(folder):
    """Write a model of rank 1 as the adapter a."""
    model = random_model("test_vit")
    attach_adapters(model, find_sites(model), 1, scale=1.0, seed=0)
    return write(model, CARD, folder, "a")


@pytest.mark.parametrize(
    "family",
    ["test_vit", "tiny_distilled", "tiny_swin_v2", "tiny_hiera", "tiny_eva02", "tiny_eva02_fused", "tiny_pool"],
)
def test_a_mixed_batch_is_what_each_model_says_alone(family, tmp_path, fill_adapters) -> None:
    card, models = CARD.model_copy(update={"model": family}), {}
    for seed, name in enumerate(("a", "b", "none")):
        model = random_model(family)
        classes = 5 - seed
        heads = {name: layer for name, layer in model.named_modules() if getattr(layer, "out_features", 0) == 5}
        for place, layer in heads.items():
            model.set_submodule(place, torch.nn.Linear(layer.in_features, classes))
        sites = find_sites(model)
        ranks = {site.name: 0 if name == "none" else (place + seed) % 3 for place, site in enumerate(sites)}
        attach_adapters(model, sites, ranks, scale=1.7, seed=seed)
        fill_adapters(model, seed)
        models[name] = model.eval()
        write(model, card.model_copy(update={"class_names": card.class_names[:classes]}), tmp_path, name)
    bundle = Bundle.load(tmp_path)
    assert bundle.names == ("a", "b", "none")
    mixed = bundle.logits(IMAGES, MIXED)
    for place, (name, logits) in enumerate(zip(MIXED, mixed, strict=True)):
        with torch.inference_mode():
            expected = models[name](torch.from_numpy(IMAGES[place : place + 1]))[0].numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
        (alone,) = bundle.logits(IMAGES[place : place + 1], name)
        np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-5 * scale)


def test_adapters_in_different_bits_and_of_different_pools_are_mixed(tmp_path, fill_adapters) -> None:
    kinds = {"a": (1, 8), "b": (16, 8), "c": (2, 16), "d": (1, 16)}  # bits, and inputs that share an update
    for seed, (name, (bits, pool)) in enumerate(kinds.items()):
        model = random_model("test_vit")
        sites = find_sites(model)
        ranks = {site.name: (place + seed) % 3 for place, site in enumerate(sites)}
        attach_adapters(model, sites, ranks, scale=1.7, seed=seed, pool=pool)
        fill_adapters(model, seed)
        write(model, CARD, tmp_path, name, bits)
    bundle, names = Bundle.load(tmp_path), ["d", "a", "c", "b", "a"]
    mixed = bundle.logits(IMAGES, names)
    for place, name in enumerate(names):
        (alone,) = bundle.logits(IMAGES[place : place + 1], name)
        np.testing.assert_allclose(mixed[place], alone, rtol=0, atol=1e-5 * np.abs(alone).max())
        assert (
            np.abs(mixed[place] - bundle.logits(IMAGES[place : place + 1], "b" if name != "b" else "a")[0]).max() > 0.01
        )


def test_many_images_pass_in_parts_of_some_tokens(tmp_path, fill_adapters, monkeypatch) -> None:
    for seed, name in enumerate(("a", "b")):
        model = random_model("test_vit")
        sites = find_sites(model)
        attach_adapters(model, sites, 1 + seed, scale=1.7, seed=seed)
        fill_adapters(model, seed)
        write(model, CARD, tmp_path, name)
    bundle, passes, features = Bundle.load(tmp_path), [], Backbone.features
    monkeypatch.setattr(Backbone, "features", lambda self, part: passes.append(len(part)) or features(self, part))
    for names in ("a", ["a", "b", "a", "b", "b"]):
        monkeypatch.setattr("peft_vit.deploy.bundle._ROWS_AT_ONCE", 10**9)
        together = bundle.logits(IMAGES, names)
        monkeypatch.setattr("peft_vit.deploy.bundle._ROWS_AT_ONCE", 2 * sites[0].tokens)
        for whole, part in zip(together, bundle.logits(IMAGES, names), strict=True):
            np.testing.assert_allclose(part, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
        monkeypatch.setattr("peft_vit.deploy.bundle._ROWS_AT_ONCE", 1)
        bundle.logits(IMAGES[:2], names[:2])
    assert passes == [5, 3, 2, 1, 1] * 2


@pytest.fixture
def runs(study, tmp_path) -> list[Path]:
    """Return the folders of two runs on one backbone: a probe and a LoRA on the same packed weights, or both seeds."""

    def done(*methods):
        records = do(study(*methods), tmp_path)
        return [run_folder(tmp_path, record.spec).rename(tmp_path / record.spec.experiment.name) for record in records]

    return done


@pytest.mark.parametrize("methods", [("qa_lora", "qa_linear"), ("lora", "adalora", "linear")])
def test_runs_become_a_bundle_and_back(runs, tmp_path, methods) -> None:
    made, folder = runs(*methods), tmp_path / "bundle"
    done = export_bundle(made[:1], folder)
    done += export_bundle(made[1:], folder)  # the same backbone, which gets more adapters
    assert [adapter.name for adapter in done] == list(methods)
    bundle, exact = Bundle.load(folder), Bundle(made[0], dict(zip(methods, made, strict=True)))
    names = [*methods, *methods][:4]
    both = zip(names, bundle.logits(IMAGES[:4], names), exact.logits(IMAGES[:4], names), strict=True)
    for place, (name, stored, logits) in enumerate(both):
        run = restore_run(tmp_path / name)
        with torch.inference_mode():
            expected = run.model(torch.from_numpy(IMAGES[place : place + 1]))[0].numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        np.testing.assert_allclose(stored, expected, rtol=0, atol=1e-2 * np.abs(expected).max())
        assert bundle.cards[name] == run.card.model_copy(update={"unlike": None})
    for adapter in done:
        content = (folder / f"{adapter.name}.safetensors").read_bytes()
        assert adapter.comparison.same_predictions == 1
        assert adapter.file_bytes == len(content)
        assert PackedAdapter.read(folder / f"{adapter.name}.safetensors").content() == content


def test_images_of_several_adapters_are_predicted_together(runs, tmp_path) -> None:
    made, folder = runs("lora", "linear"), tmp_path / "bundle"
    export_bundle(made, folder)
    bundle, file = Bundle.load(folder), tmp_path / "image.png"
    Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(file)
    together = bundle.predict([str(file), file], ["linear", "lora"], top=2)
    for name, said in zip(("linear", "lora"), together, strict=True):
        (alone,) = bundle.predict([file], name, top=2)
        assert said.file == alone.file == file
        assert (said.class_name, said.top[0][0]) == (alone.class_name, alone.top[0][0])
        assert said.probability == pytest.approx(alone.probability, abs=1e-5)


def refused(call, *said) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_does_not_belong_together_is_refused_in_one_line(runs, tmp_path) -> None:
    floats, packed, full = runs("lora", "qa_lora", "full")
    one_each = tmp_path / "one_each"
    refused(lambda: export_bundle([floats, packed], one_each), "qa_lora", "nf4 in groups of 16", "float32")
    assert not one_each.exists()
    refused(lambda: Bundle(packed, {"x": floats}), str(floats), "float32")
    refused(lambda: export_bundle([full], one_each), "full", "was trained, too")
    refused(lambda: export_bundle([floats, tmp_path / "other" / "lora"], one_each), "can't be the name of two")
    refused(lambda: Bundle.load(tmp_path), "backbone.safetensors")
    export_bundle([floats], one_each)
    refused(lambda: export_bundle([floats], one_each), "lora.safetensors", "--overwrite")
    export_bundle([floats], one_each, overwrite=True)
    bundle, file = Bundle.load(one_each), one_each / "lora.safetensors"
    refused(lambda: bundle.classifier("lara"), "'lara'", "lora")
    refused(lambda: bundle.logits(IMAGES, ["lora"]), "5 images, got 1")
    foreign = PackedAdapter.read(file)
    for field, value in {"model": "other_vit", "image_size": 48, "weights_sha256": "a" * 64}.items():
        card = foreign.header.card.model_copy(update={field: value})
        other = PackedAdapter(foreign.header.model_copy(update={"card": card}), foreign.tensors)
        refused(lambda other=other: bundle.add("x", other, file), str(file), str(value), "another bundle")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(lambda: Bundle.load(one_each), str(file), "was changed")


def test_what_can_not_be_asked_of_a_bundle_is_one_line(runs, tmp_path) -> None:
    (made,), folder = runs("lora"), tmp_path / "bundle"
    export_bundle([made], folder)
    bundle = Bundle.load(folder)
    assert bundle.logits(IMAGES[:0], []) == []
    exact = bundle.logits(IMAGES, "lora")
    for row, of_doubles in zip(exact, bundle.logits(IMAGES.astype(np.float64), "lora"), strict=True):
        np.testing.assert_array_equal(row, of_doubles)
    refused(lambda: bundle.logits(IMAGES[..., :16], "lora"), "(B, 3, 32, 32)", "(5, 3, 32, 16)")
    refused(lambda: bundle.logits(np.zeros((1, 3, 32, 32), np.uint8), "lora"), "normalised", "uint8")
    refused(lambda: bundle.logits(IMAGES[:0], "lara"), "'lara'")
    refused(lambda: bundle.predict("image.png", "lora"), "a list of images")
    refused(lambda: open_classifier(folder, "weights.pt"), "--weights", "bundle")
    refused(lambda: open_exported(folder / "backbone.safetensors"), "without a head", "--adapter")
    refused(lambda: Bundle(folder / "backbone.safetensors", {}).classifier("a"), "no adapters")


def test_runs_of_a_study_are_called_by_experiment_and_seed(study, tmp_path) -> None:
    folders = [run_folder(tmp_path, record.spec) for record in do(study("lora", "linear"), tmp_path)]
    assert {folder.name for folder in folders} == {"seed_0"}
    assert [one.name for one in export_bundle(folders, tmp_path / "bundle")] == ["lora-seed_0", "linear-seed_0"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_bias": torch.zeros(3)}, "head of 5 outputs"),
        ({"head_bias": torch.tensor(0.0)}, "head of 5 outputs"),
        ({"more": torch.zeros(1)}, "head of 5 outputs"),
        ({"head_bias": torch.full((5,), torch.nan)}, "not finite"),
        ({"codes": None}, "not finite"),
    ],
)
def test_tensors_that_are_no_adapter_of_the_header_are_refused(tmp_path, change, said) -> None:
    packed = write_one(tmp_path)
    changes = {name: packed.tensors[name] * torch.nan if of is None else of for name, of in change.items()}
    other = PackedAdapter(packed.header, {**packed.tensors, **changes})
    refused(lambda: Bundle.load(tmp_path).add("b", other, Path("here")), "here", said)


def test_offsets_that_are_all_zero_are_not_stored(runs, tmp_path) -> None:
    (made,), folder = runs("qa_lora"), tmp_path / "bundle"
    packed = [module.quantized for _, module in adapted_modules(restore_run(made).model)]
    assert all(one.offsets is not None and not one.offsets.any() for one in packed)
    export_bundle([made], folder)
    model, _ = load_low_bit(folder / "backbone.safetensors")
    stored = [module.quantized for _, module in adapted_modules(model)]
    assert all(one.offsets is None for one in stored)
    for before, after in zip(packed, stored, strict=True):
        assert torch.equal(before.dequantize(), after.dequantize())


def test_updates_for_more_inputs_at_once_than_divide_a_matrix_are_refused(tmp_path) -> None:
    """Each matrix has (12 or 48) // 5 of them, so the number of codes is right."""
    packed = write_one(tmp_path)
    sites = Backbone(random_model("test_vit")).sites
    values = sum(site.in_features // 5 + site.out_features for site in sites)
    other = PackedAdapter(
        packed.header.model_copy(update={"pool": 5}), {**packed.tensors, "codes": torch.zeros(values)}
    )
    refused(lambda: Bundle.load(tmp_path).add("b", other, Path("here")), "here", "for 5 inputs at once")


@pytest.mark.parametrize("change", [{"ranks": (1,)}, {"bits": 8}, {"head_bits": 4}, {"pool": 2}])
def test_a_header_that_tells_of_other_tensors_is_refused(tmp_path, change) -> None:
    packed = write_one(tmp_path)
    other = PackedAdapter(packed.header.model_copy(update=change), packed.tensors)
    refused(lambda: Bundle.load(tmp_path).add("b", other, Path("here")), "here")


STORED = {
    "after": ("lora", {"rank": 2, "adapter_bits": 4, "adapter_rounding": "after"}),
    "below one rank": ("lora", {"rank": None, "adapter_bits": 1, "ranks": EVEN}),
    "on packed weights": ("qa_lora", {"rank": None, "adapter_bits": 2, "ranks": EVEN}),
}


@pytest.mark.parametrize("case", STORED)
def test_a_run_in_few_bits_is_restored_and_stored_as_it_was_trained(study, tmp_path, case) -> None:
    method, settings = STORED[case]
    record = do_one(with_settings(study(method), method, **settings), tmp_path)
    run = restored(record, tmp_path)
    if "ranks" in settings:
        spent = record.rank_history[0]
        assert spent.unit == "bytes"
        assert 0.8 * EVEN.budget < spent.cost <= EVEN.budget
    (done,) = export_bundle([run_folder(tmp_path, record.spec)], tmp_path / "bundle")
    packed = PackedAdapter.read(tmp_path / "bundle" / f"{done.name}.safetensors")
    assert (packed.header.bits, packed.header.head_bits) == (settings["adapter_bits"], 8)
    if "ranks" in settings:
        stored = sum(packed.tensors[name].nbytes for name in ("codes", "scales"))
        assert spent.cost - 12 < stored <= spent.cost
    backbone = Backbone(run.model)
    factors = zip(backbone.sites, packed.updates(backbone.sites, pool=1), strict=True)
    updates = {site.module: [] for site in backbone.sites}
    for site, (right, left) in factors:
        updates[site.module].append(left.T @ right)
    for name, module in adapted_modules(run.model):
        expected = torch.cat([adapter.delta() for _, adapter in module.adapters()])  # (out, in)
        stored = torch.cat(updates[name])
        torch.testing.assert_close(stored, expected, rtol=1e-6, atol=1e-9)  # not float16's 1e-3: the same codes


def test_values_are_rounded_while_training_only_if_asked_for(study, tmp_path) -> None:
    model = random_model("test_vit")
    attach_adapters(model, find_sites(model), 1, scale=2.0, seed=0)
    adapter = next(iter(site_adapters(model).values()))
    exact = adapter.lora_A.detach().clone()
    for while_training, in_training in ((True, 2), (False, len(exact.unique()))):
        store_in_bits(model, 1, while_training=while_training)
        assert len(adapter.train().factors()[1].unique()) == in_training
        assert len(adapter.eval().factors()[1].unique()) == 2
