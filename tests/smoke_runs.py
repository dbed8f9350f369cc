"""What the smoke run of any configuration leaves: a record that says what it is. Its file: test_runs_execute.py."""

from pathlib import Path

from written_runs import run_and_write

from peft_vit.core.config import METHOD_KINDS, PROBE_L2, AdaLoraConfig, QaLoraConfig
from peft_vit.core.records import RunSpec
from peft_vit.runs.records.storage import read_record, run_folder


def check_smoke_run(spec: RunSpec, results_dir: Path) -> None:
    """Do a smoke run, and check all that it leaves."""
    record = run_and_write(spec, results_dir)
    assert (record.status, record.error) == ("done", None)
    assert record == read_record(run_folder(results_dir, record.spec) / "record.json")
    assert record.spec.smoke
    assert record.provenance is not None
    assert record.test is not None
    assert record.parameters is not None
    assert record.bytes is not None
    assert record.provenance.random_weights
    assert record.provenance.weights_sha256 is None
    assert "random" in (record.provenance.weights_name or "")
    assert len(record.steps) == (len(PROBE_L2) if record.spec.experiment.is_probe else 8)
    assert record.validation == next(e.metrics for e in record.evaluations if e.step == record.chosen_step)
    assert next(e for e in record.evaluations if e.step == record.chosen_step).deployable
    assert record.test.n == record.split_sizes["test"]
    measures = record.spec.measures
    assert tuple(record.latency_s) == measures.latency_batches
    method, parameters = record.spec.experiment.method, record.parameters
    before_ranks = record.chosen_step == 0 and "adalora" in method  # which come with the first step
    has_updates = record.spec.experiment.has_adapters and not before_ranks
    assert (record.removal is not None) == (has_updates and measures.removal_images is not None)
    if record.removal is not None:  # more images are asked for than the 8 that a smoke run has
        assert record.removal.images == record.split_sizes["validation"]
        last = record.rank_history[-1].ranks
        assert record.removal.site_loss_rise.keys() == {name for name, rank in last.items() if rank}
    binary = len(record.class_names) == 2
    assert (record.test.auroc is not None) == binary
    if method in ("adalora", "qa_adalora"):
        adalora = record.spec.experiment.need(AdaLoraConfig)
        budget = adalora.budget
        assert adalora.final_steps is not None
        assert [entry.step for entry in record.importance_history] == list(range(1, 9 - adalora.final_steps))
        assert {entry.unit for entry in record.rank_history} == {budget.unit}
        assert all(entry.budget is not None and entry.spent <= entry.budget for entry in record.rank_history)
        assert record.rank_history[-1].budget == budget.total
        if budget.unit == "ranks":
            assert sum(record.rank_history[-1].ranks.values()) == budget.total
        assert parameters.peak >= parameters.initial
    else:
        assert parameters.initial == parameters.final == parameters.peak
    assert (
        (record.quantization is not None)
        == (method in ("qa_linear", "qa_lora", "qa_adalora"))
        == bool(record.bits_history)
    )
    head_alone = METHOD_KINDS[method].trains == "head" or before_ranks
    assert (parameters.final == parameters.head) == head_alone
    if method == "full":
        assert parameters.final == parameters.head + parameters.backbone_total
        assert record.bytes.frozen_bytes == 0
    assert record.bytes.trainable_bytes == 4 * parameters.final
    assert 4 * parameters.final < record.bytes.adapter_file_bytes < 4 * parameters.final + 50_000
    if record.quantization is not None:
        qa_lora = record.spec.experiment.need(QaLoraConfig)
        if qa_lora.adaptive_bits is None:
            bits = qa_lora.quantization_bits
            assert bits is not None
            per_group = 32 / qa_lora.group_size  # bits of scale and offset, shared; without groups far less
            assert bits < record.quantization.bits_per_weight <= bits + per_group
        else:
            assert record.bit_allocation is not None
            assert record.bit_allocation.spent_bytes <= record.bit_allocation.budget_bytes
