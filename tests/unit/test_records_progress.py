"""A progress file gives back what was written; whatever else is in it counts as not there, and a record decides."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vit.runs.records.progress import (
    PROGRESS_FILE,
    Attempt,
    Owner,
    RunFiles,
    RunStatus,
    read_run_files,
    run_status,
)

pytestmark = pytest.mark.part("runner")

RUN = "a/seed_0"
ATTEMPT = Attempt(number=2, state="failed", started_at="2030-01-01T00:00:00+00:00", worker="µ", error='a\n"b"')
WHOLE = ATTEMPT.model_dump_json().encode()
FAULT = "its progress.json can't be read and counts as not there"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / RUN).mkdir(parents=True)
    return folder


def looked_at(study, content: bytes) -> RunFiles:
    (study / RUN / PROGRESS_FILE).write_bytes(content)
    return read_run_files(study, RUN)


def test_what_was_written_is_read_and_what_a_newer_version_adds_is_passed_over(study) -> None:
    assert looked_at(study, WHOLE) == RunFiles(ATTEMPT, None, False, "")
    more = json.dumps(json.loads(WHOLE) | {"node": "7"}).encode()
    assert looked_at(study, more).attempt == ATTEMPT
    (study / RUN / PROGRESS_FILE).unlink()
    assert read_run_files(study, RUN) == RunFiles(None, None, False, "")


CHANGED = [{"number": 0}, {"number": "x"}, {"number": None}, {"state": "done"}, {"started_at": 7}, {"worker": [1]}]


@settings(max_examples=200)
@given(
    st.binary(max_size=300)
    | st.integers(0, len(WHOLE) - 1).map(lambda length: WHOLE[:length])
    | st.sampled_from([json.dumps(json.loads(WHOLE) | change).encode() for change in CHANGED])
)
def test_anything_else_is_not_there(study, content) -> None:
    assert looked_at(study, content) == RunFiles(None, None, False, FAULT)


def test_a_run_is_under_way_only_while_the_one_that_began_it_works_on_the_study(study) -> None:
    looked_at(study, ATTEMPT.model_copy(update={"state": "running", "total_steps": 9}).model_dump_json().encode())
    (study / RUN / "checkpoint-4").mkdir()
    before, after = (
        Owner(pid=7, host="h", since=since, command="c")
        for since in ("2029-12-31T23:59:59+00:00", "2030-01-01T00:00:01+00:00")
    )
    running = RunStatus(RUN, "running", 2, "µ, since 2030-01-01T00:00:00+00:00, checkpoint at step 4 of 9")
    pending = RunStatus(RUN, "pending", 2, "continues from step 4 of 9")
    for owner, skipped, status in (
        (before, False, running),
        (before, True, running),
        (after, False, pending),
        (None, False, pending),
        (None, True, RunStatus(RUN, "skipped", 2, "continues from step 4 of 9")),
    ):
        assert run_status(study, RUN, owner, skipped=skipped) == status
    (study / RUN / "checkpoint-4").rmdir()
