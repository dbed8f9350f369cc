"""One line says how far the score fisher is from the empirical Fisher, with its n; none where nothing was recorded."""

import planted
import pytest

from peft_vit.analysis import analyze
from peft_vit.records import FisherCheck, RunRecord
from peft_vit.report.document import Paragraph
from peft_vit.report.sections import study_documents

pytestmark = pytest.mark.part("importance analysis")
NAME = "adalora_top_k_fisher"


def check(rho: float | None, sites: int) -> FisherCheck:
    values = {site.name: 1.0 for site in planted.sites()[:sites]}
    return FisherCheck(images=32, minibatch=values, per_sample=values, rho=rho)


def with_checks(*checks: FisherCheck | None) -> list[RunRecord]:
    experiment = planted.experiments()[NAME]
    return [planted.record(experiment, seed, 0.8, changes={"fisher_check": c}) for seed, c in enumerate(checks)]


def lines(records: list[RunRecord]) -> list[str]:
    study = planted.study_of(records)
    (document,) = study_documents([analyze(study)])
    blocks = document.sections["Layer importance patterns"]
    return [block.text for block in blocks if isinstance(block, Paragraph)]


@pytest.mark.parametrize(
    ("checks", "found"),
    [
        ([check(0.9, 72), check(0.7, 40)], "over the 40–72 sites with rank: 0.80 (from 0.70 to 0.90), n = 2 seeds."),
        ([check(0.9, 72), None], "over the 72 sites with rank: 0.90, n = 1 seed."),
        ([check(None, 72)], "over the 72 sites with rank: undefined, one of both is constant, n = 0 seeds."),
    ],
)
def test_the_line(checks: list[FisherCheck | None], found: str) -> None:
    (line,) = lines(with_checks(*checks))
    assert line.startswith(f"{NAME}: the score fisher (minibatch empirical Fisher) against the per-sample")
    assert "same 32 training images" in line
    assert found in line


def test_without_a_check_there_is_no_line() -> None:
    assert lines(with_checks(None, None)) == []
