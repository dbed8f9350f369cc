"""A run repeats bit for bit, is paired with the other methods', reads the test split once, and fails in its record."""

import errno
import hashlib
import subprocess

import numpy as np
import pytest
import torch
from done_runs import do, restored, specs, with_data, with_settings
from written_runs import planned, run_and_write

from peft_vit.base.errors import DivergedError, UserError
from peft_vit.core.adapters import current_ranks
from peft_vit.core.adapters.footprint import trainable_parameters
from peft_vit.core.backbones import load_run_backbone
from peft_vit.core.training.images import HoldoutImages
from peft_vit.runs import execute as run
from peft_vit.runs.execute import run_one
from peft_vit.runs.records.storage import ADAPTER_FILE, read_record, run_folder
from peft_vit.runs.this_machine import machine
from peft_vit.runs.this_machine.machine import git_state, hash_arrays, package_versions

pytestmark = pytest.mark.part("runner")
START_AS_THE_MODEL = ("lora", "adalora", "peft_lora", "peft_adalora")
METHODS = ("linear", "full", *START_AS_THE_MODEL, "qa_lora", "qa_adalora")


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[:-1]), METHODS[-1]]
)
def test_the_same_seed_repeats_the_weights_and_another_does_not(study, tmp_path, method) -> None:
    if method.startswith("peft"):
        pytest.importorskip("peft")
    first, other = do(study(method, seeds=(0, 1)), tmp_path / "a")
    (again,) = do(study(method), tmp_path / "b")
    assert again.adapter_sha256 == first.adapter_sha256 != other.adapter_sha256
    content = (run_folder(tmp_path / "b", again.spec) / ADAPTER_FILE).read_bytes()
    assert hashlib.sha256(content).hexdigest() == again.adapter_sha256
    for a, b in zip(first.steps, again.steps, strict=True):
        assert (a.loss, a.gradient_norm, a.penalties) == (b.loss, b.gradient_norm, b.penalties)
    assert (first.validation, first.test, first.rank_history) == (again.validation, again.test, again.rank_history)
    # A probe draws nothing: of the same images it is the same, whatever the seed.
    assert (first.steps[0].loss == other.steps[0].loss) == (method == "linear")


@pytest.mark.slow
def test_methods_are_paired_within_a_seed_whose_split_each_seed_draws(study, tmp_path) -> None:
    config = with_data(study(*METHODS, seeds=(0, 1), epochs=1, batch_size=4), test_split="per_seed")
    pytest.importorskip("peft")
    draws, splits, first_losses = ({0: set(), 1: set()} for _ in range(3))
    for record in do(config, tmp_path):
        p = record.provenance
        if record.spec.experiment.method in START_AS_THE_MODEL:
            first_losses[record.spec.seed].add(record.steps[0].loss)
        if record.spec.experiment.method != "linear":  # which draws neither
            draws[record.spec.seed].add((p.head_init_sha256, p.data_order_sha256))
        splits[record.spec.seed].add((p.split_sha256, tuple(record.predictions.images)))
        assert (p.random_weights, p.threads) == (True, 1)
    assert [len(losses) for losses in first_losses.values()] == [1, 1]  # the same images through the same model
    for drawn in (draws, splits):
        (first,), (second,) = drawn[0], drawn[1]
        assert all(before != after for before, after in zip(first, second, strict=True))


@pytest.mark.part("controller")
@pytest.mark.parametrize("method", ["lora", "adalora", "qa_lora", "qa_adalora"])
def test_the_saved_adapter_gives_the_recorded_counts_and_test_results(study, tmp_path, method) -> None:
    (record,) = do(study(method), tmp_path)
    model = restored(record, tmp_path).model
    assert trainable_parameters(model) == record.parameters.final
    assert current_ranks(model) == record.rank_history[-1].ranks
    if method == "adalora":
        assert record.parameters.final < record.parameters.initial <= record.parameters.peak
        assert sum(record.rank_history[-1].ranks.values()) == 40
        assert record.steps[0].penalties["orthogonality"] > 0
        weights = sum(
            rank * (site.in_features + site.out_features + 1)
            for site in record.sites
            for rank in [record.rank_history[-1].ranks[site.name]]
        )
        assert record.parameters.final == weights + record.parameters.head
        # Two moments a value; step counts of 4 bytes a tensor add little. Ranks stand since step 4.
        assert 0 <= record.bytes.optimizer_bytes - 8 * record.parameters.final <= 4 * (3 * 36 + 2)


@pytest.mark.part("controller")
def test_a_budget_in_parameters_is_one_for_the_counted_parameters(study, tmp_path) -> None:
    config = with_settings(study("adalora"), "adalora", total_rank_budget=None, total_parameter_budget=7000)
    (record,) = do(config, tmp_path)
    last = record.rank_history[-1]
    assert (last.unit, last.budget) == ("parameters", 7000)
    assert 7000 - 129 < last.spent == record.parameters.final - record.parameters.head <= 7000
    assert sum(last.ranks.values()) < last.spent
    assert record.rank_history[0].spent == record.parameters.initial - record.parameters.head


def test_the_test_split_is_opened_once_after_training(study, tmp_path, monkeypatch) -> None:
    opened, trained = [], []
    open_split, train = HoldoutImages.open, run.train

    def counting_open(self):
        opened.append(len(trained))
        return open_split(self)

    def counting_train(*args, **settings):
        result = train(*args, **settings)
        assert opened == []
        trained.append(result)
        return result

    monkeypatch.setattr(HoldoutImages, "open", counting_open)
    monkeypatch.setattr(run, "train", counting_train)
    (record,) = do(study("lora"), tmp_path)
    assert opened == [1]
    assert record.test.n == 30
    assert record.chosen_step == trained[0].chosen.step


def test_a_diverged_run_is_a_failed_record(study, tmp_path) -> None:
    (spec,) = specs(study("full", learning_rate=1e30, clip_norm=None, optimizer="sgd"), tmp_path)
    record = run_and_write(spec, tmp_path)
    assert record.status == "failed"
    assert record.error.startswith("DivergedError: the ")
    assert "lower the learning rate" in record.error
    assert len(record.error.splitlines()) == 1
    assert "Traceback" in record.traceback
    assert record.provenance is record.parameters is record.test is None
    folder = run_folder(tmp_path, spec)
    assert [file.name for file in folder.iterdir()] == ["record.json"]
    assert read_record(folder / "record.json") == record


def asks_for_too_much() -> None:
    torch.empty(1 << 50)


def raises(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (asks_for_too_much, "out_of_memory"),
        (raises(MemoryError()), "out_of_memory"),
        (raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")), "out_of_memory"),
        (raises(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")), "out_of_memory"),
        (raises(RuntimeError("shapes cannot be multiplied")), "error"),
        (raises(UserError("out of memory")), "error"),
        (raises(OSError(errno.ENOSPC, "x")), "disk_full"),
        (raises(OSError(errno.EDQUOT, "x")), "disk_full"),
        (raises(OSError(errno.EIO, "x")), "io"),
        (raises(ConnectionError()), "io"),
        (raises(DivergedError("x")), "diverged"),
        (raises(RecursionError()), "error"),
    ],
)
def test_failures_are_told_apart(study, tmp_path, monkeypatch, action, kind) -> None:
    (spec,) = specs(study("lora"), tmp_path)
    monkeypatch.setattr("peft_vit.runs.execute.load_data", lambda *arguments, **named: action())
    record = run_one(spec).record
    assert (record.status, record.failure) == ("failed", kind)


def test_a_setting_without_effect_is_said_in_the_record(study, tmp_path) -> None:
    loud = with_settings(study("qa_lora"), "qa_lora", gradient_scaling_factor=2.0)
    (record,), (quiet,) = do(loud, tmp_path / "a"), do(study("qa_lora"), tmp_path / "b")
    assert len(record.warnings) == 1
    assert "gradient_scaling_factor 2.0 nearly cancels under AdamW" in record.warnings[0]
    assert quiet.warnings == []


def test_weights_too_small_for_float16_scales_are_said_in_the_record(study, tmp_path, monkeypatch) -> None:
    def with_a_tiny_layer(*arguments, **named):
        loaded = load_run_backbone(*arguments, **named)
        with torch.no_grad():
            loaded.model.blocks[0].attn.qkv.weight.mul_(1e-8)
        return loaded

    monkeypatch.setattr(run, "load_run_backbone", with_a_tiny_layer)
    (record,) = do(study("qa_lora"), tmp_path)
    (warning,) = record.warnings
    assert warning.startswith("blocks.0.attn.qkv: float16 is too coarse for the nf4 scales of 768 of 768 groups")


def test_a_class_without_a_test_image_is_said_in_plan_and_record(study, tmp_path, recwarn) -> None:
    plan = planned(with_data(study("linear"), test_images=9), tmp_path)
    record = run_one(plan.runs[0].spec).record
    (gap,) = [text for text in record.warnings if "no test image" in text]
    missing = set(range(10)) - set(record.predictions.labels)
    assert f"no test image is of class '{min(missing)}'" in gap
    assert list(plan.notices) == record.warnings
    predicted, labels = np.array(record.predictions.predicted), np.array(record.predictions.labels)
    recalls = [np.mean(predicted[labels == k] == k) for k in set(labels)]
    assert record.test.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert [str(entry.message) for entry in recwarn if "Images: " in str(entry.message)] == []


def test_the_commit_of_another_repository_is_not_recorded(tmp_path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    own, installed = tmp_path / "own.py", tmp_path / ".venv" / "installed.py"
    installed.parent.mkdir()
    own.touch()
    installed.touch()
    assert git_state(own) == (None, None)
    git("init")
    git("add", "own.py")
    git("commit", "-m", "theirs")
    assert git_state(own) == (git("rev-parse", "HEAD"), True)
    assert git_state(installed) == (None, None)


def test_a_commit_made_during_a_study_is_not_the_code_that_runs(monkeypatch) -> None:
    first = machine.loaded_git_state()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git was asked again"))
    assert machine.loaded_git_state() == first


def test_provenance() -> None:
    versions = package_versions()
    assert versions["torch"] == torch.__version__
    assert "transformers" not in versions  # nothing of timm's models depends on it
    assert "transformers" in package_versions("transformers")
    commit, dirty = git_state()
    assert (commit is None) == (dirty is None)
    a = np.arange(6, dtype=np.int64)
    different = [[a], [a.reshape(2, 3)], [a.astype(np.int32)], [a, a], [torch.arange(6) + 1], []]
    assert len({hash_arrays(arrays) for arrays in different}) == len(different)
    assert hash_arrays([a]) == hash_arrays([torch.arange(6)])
    assert hash_arrays([a.reshape(2, 3).T]) == hash_arrays([a.reshape(2, 3).T.copy()])


@pytest.mark.part("controller")
@pytest.mark.part("trainer")
def test_adaptive_ranks_on_quantized_sites_leave_both_histories(study, tmp_path) -> None:
    (record,) = do(study("qa_adalora"), tmp_path)
    first, last = record.rank_history[0].ranks, record.rank_history[-1]
    assert {site.matrix for site in record.sites} == {"out", "fc2"}  # qa_lora's targets
    assert sum(first.values()) > last.spent == last.budget == 40
    ceilings = {site.name: site.in_features // 16 for site in record.sites}
    assert all(entry.ranks[name] <= ceilings[name] for entry in record.rank_history for name in ceilings)
    assert [entry.step for entry in record.rank_history] == [0, 2, 3, 4]
    float_bits, packed = (set(entry.bits_per_weight.values()) for entry in record.bits_history)
    assert (float_bits, packed) == ({32 + 6.0}, {6.0})
    assert [entry.step for entry in record.bits_history] == [0, 4]
    assert record.quantization.bits_per_weight == 6.0
    assert [row.quantized_share for row in record.steps] == [0, 0.25, 0.5, 0.75, 1, 1]
    values = sum(
        rank * (site.in_features // 16 + site.out_features) for site in record.sites for rank in [last.ranks[site.name]]
    )
    assert record.parameters.final == values + record.parameters.head
    assert not any("nothing" in text for text in record.warnings)
