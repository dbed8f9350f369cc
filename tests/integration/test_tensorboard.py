"""What TensorBoard's own reader finds in the event files equals the records they were made from."""

import shutil
from pathlib import Path

import pytest

from peft_vit.base.errors import UserError
from peft_vit.lab.analysis.tensorboard import EVENTS_FILE, export_to_tensorboard
from peft_vit.runs.records.storage import read_record, run_folder, write_result

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.part("runner")
NAMES = ("triplets", "int4_adaptive")


@pytest.fixture(scope="module")
def results(run_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of two finished runs."""
    folder = tmp_path_factory.mktemp("results")
    for name in NAMES:
        shutil.copytree(run_of(name), folder / "tiny" / name / "seed_0")
    return folder


def read_back(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {scalar.step: scalar.value for scalar in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_its_reader_finds_what_the_records_say(results, tmp_path) -> None:
    assert export_to_tensorboard(results, tmp_path / "logs") == 2
    for name in NAMES:
        record = read_record(results / "tiny" / name / "seed_0" / "record.json")
        scalars = read_back(tmp_path / "logs" / "tiny" / name / "seed_0")
        expected = {
            "train/loss": {row.step: row.loss for row in record.steps},
            "train/learning_rate": {row.step: row.learning_rate for row in record.steps},
            "validation/accuracy": {entry.step: entry.metrics.accuracy for entry in record.evaluations},
            "test/nll": {record.chosen_step: record.test.nll},
            "rank/mean": {entry.step: sum(entry.ranks.values()) / len(entry.ranks) for entry in record.rank_history},
            "rank/blocks.0.attn.out": {entry.step: entry.ranks["blocks.0.attn.out"] for entry in record.rank_history},
        }
        if name == "triplets":
            expected["train/penalty/orthogonality"] = {r.step: r.penalties["orthogonality"] for r in record.steps}
            assert "bits/mean" not in scalars
        else:
            expected["train/quantized_share"] = {row.step: row.quantized_share for row in record.steps}
            assert scalars["bits/mean"] == {
                0: pytest.approx(32 + record.quantization.bits_per_weight),
                4: pytest.approx(6.0),
            }
        for tag, values in expected.items():
            assert scalars[tag] == pytest.approx(values, rel=1e-6), tag  # event files hold float32
        assert set(scalars["train/loss"]) == set(range(1, 7))


def test_a_study_that_goes_on_is_exported_again(results, tmp_path, command, refused) -> None:
    export_to_tensorboard(results / "tiny" / NAMES[0], tmp_path / "logs")
    (first,) = (tmp_path / "logs").rglob("*tfevents*")
    before = first.read_bytes()
    arguments = ("export", results, "--format", "tensorboard", "--output", tmp_path / "logs")
    assert "holds files already" in refused(*arguments)
    said = command(*arguments, "--overwrite").out
    assert said == f"2 runs: {tmp_path / 'logs'}\nNext: tensorboard --logdir {tmp_path / 'logs'}\n"
    assert len(list((tmp_path / "logs").rglob("*tfevents*"))) == 2
    assert (first.name, first.read_bytes()) == (EVENTS_FILE, before)


def test_what_it_refuses(results, tmp_path, without) -> None:
    record = read_record(results / "tiny" / NAMES[0] / "seed_0" / "record.json")
    failed = record.model_copy(update={"status": "failed", "steps": []})
    write_result(tmp_path / "failed", failed, None)
    with pytest.raises(UserError, match="no run is finished yet"):
        export_to_tensorboard(tmp_path / "failed", tmp_path / "logs")
    with pytest.raises(UserError, match="does not exist"):
        export_to_tensorboard(tmp_path / "nothing", tmp_path / "logs")
    leading_out = record.model_copy(update={"spec": record.spec.model_copy(update={"study": "../../elsewhere"})})
    file = run_folder(tmp_path / "evil" / "a" / "b", record.spec) / "record.json"
    file.parent.mkdir(parents=True)
    file.write_text(leading_out.model_dump_json())
    with pytest.raises(UserError, match=r"record\.json: spec\.study: "):
        export_to_tensorboard(tmp_path / "evil", tmp_path / "logs")
    assert not (tmp_path.parent / "elsewhere").exists()
    without("tensorboard")
    with pytest.raises(UserError, match=r"pip install 'peft-vit\[tensorboard\]'"):
        export_to_tensorboard(results, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
