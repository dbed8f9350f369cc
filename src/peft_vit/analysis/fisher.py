"""How far the score `fisher` is from the empirical Fisher: what runs that decided by it have recorded."""

from __future__ import annotations

from dataclasses import dataclass

from peft_vit.analysis.studies import Study
from peft_vit.config import ExperimentConfig
from peft_vit.records import FisherCheck


@dataclass(frozen=True)
class FisherAgreement:
    """One experiment's comparisons of minibatch and per-sample empirical Fisher, one a seed."""

    experiment: ExperimentConfig
    checks: tuple[FisherCheck, ...]

    @property
    def rhos(self) -> tuple[float, ...]:
        """Return Spearman's rho over the sites, of the seeds that have one."""
        return tuple(check.rho for check in self.checks if check.rho is not None)


def fisher_agreements(study: Study) -> tuple[FisherAgreement, ...]:
    """Return one for each experiment whose runs recorded the comparison."""
    found = []
    for experiment in study.experiments:
        checks = [run.record.fisher_check for run in study.of(experiment.name)]
        kept = tuple(check for check in checks if check is not None)
        if kept:
            found.append(FisherAgreement(experiment, kept))
    return tuple(found)
