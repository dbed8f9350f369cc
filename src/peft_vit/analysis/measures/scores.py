"""Measures of the scores that adaptive ranks were decided with, and of what leaving adapters out costs."""

from __future__ import annotations

import math
from statistics import fmean

from peft_vit.analysis.comparison import same_problem, same_source
from peft_vit.analysis.measures.evidence import Evidence, Group, Measured, Subject, each_run, joined, together
from peft_vit.analysis.studies import Run
from peft_vit.statistics import spearman

_SCORES = ("importance_history",)
_FEWEST_SITES = 3  # with two, a rank correlation is 1 or -1 whatever they are


def attention_over_mlp(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return log2 of the mean final score of attention sites over that of MLP sites; a score is a mean per triplet."""
    without = "without positive scores of attention and of MLP sites"
    return each_run(evidence, of, _SCORES, _attention_over_mlp, without)


def _attention_over_mlp(run: Run) -> float | None:
    scores = run.last_scores()
    attention = [scores[s.name] for s in run.record.sites if s.name in scores and s.role == "attention"]
    mlp = [scores[s.name] for s in run.record.sites if s.name in scores and s.role == "mlp"]
    if not attention or not mlp or fmean(attention) <= 0 or fmean(mlp) <= 0:
        return None
    return math.log2(fmean(attention) / fmean(mlp))


def rank_correlation(left: dict[str, float], right: dict[str, float]) -> float | None:
    """Return Spearman's rho over the sites that both have; None for fewer than three, a constant or not finite one."""
    common = sorted(name for name in left.keys() & right.keys() if math.isfinite(left[name] + right[name]))
    if len(common) < max(_FEWEST_SITES, len(left.keys() & right.keys())):
        return None
    return spearman([left[name] for name in common], [right[name] for name in common])


def between_seeds(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return Spearman's rho of the final scores of two seeds, over disjoint pairs of seeds: 1st and 2nd, 3rd and 4th.

    All pairs of seeds would share runs, and no test for independent values could be used; the mean over all of them
    stands in `analysis.importance`. Where each seed draws its own images out of one data set, agreement holds over
    these too, which is more than was asked; the note says so.
    """
    return tuple(_between_seeds(subject) for subject in evidence.subjects(of, _SCORES))


def _between_seeds(subject: Subject) -> Measured:
    runs = sorted(subject.runs, key=lambda run: run.seed)
    formed = list(zip(runs[::2], runs[1::2], strict=False))
    pairs = [(a, b) for a, b in formed if same_problem(a) == same_problem(b) or _drawn_by_seed(a, b)]
    refused = f"{len(formed) - len(pairs)} pair(s) refused: other weights, images or splits"
    drawn = "each seed draws its own images" if any(_drawn_by_seed(a, b) for a, b in pairs) else ""
    rhos = {f"{a.seed}-{b.seed}": rank_correlation(a.last_scores(), b.last_scores()) for a, b in pairs}
    known = {label: rho for label, rho in rhos.items() if rho is not None}
    odd = f"seed {runs[-1].seed} has no partner" if len(runs) % 2 else ""
    constant = [label for label in rhos if label not in known]
    undefined = f"scores are all equal, not finite, or of too few sites: seeds {joined(constant)}" if constant else ""
    return Measured(
        subject=subject.name,
        values=tuple(known.values()),
        labels=tuple(known),
        n_of="pairs of seeds",
        note=together(subject.note, odd, refused if len(pairs) < len(formed) else "", drawn, undefined),
    )


def _drawn_by_seed(a: Run, b: Run) -> bool:
    """Return whether two runs of one study differ in nothing but which images of one data set their seeds drew."""
    asked = a.record.spec.data
    return (
        asked == b.record.spec.data
        and (asked.tests_by_seed or asked.train_subset == "per_seed")
        and same_source(a) == same_source(b)
    )


def against_harm(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return Spearman's rho, over sites with rank, between last scores and the loss rise when a site is left out."""
    without = "whose scores or losses are all equal, not finite, or of too few sites"
    return each_run(evidence, of, (*_SCORES, "removal"), _against_harm, without)


def _against_harm(run: Run) -> float | None:
    removal = run.record.removal
    return None if removal is None else rank_correlation(run.last_scores(), removal.site_loss_rise)


def cost_of_removing_mlp(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return the validation accuracy that is lost when the updates of MLP sites are left out."""
    return each_run(evidence, of, ("removal",), _cost_of_removing_mlp, "without a site in that group")


def _cost_of_removing_mlp(run: Run) -> float | None:
    removal = run.record.removal
    if removal is None or "mlp" not in removal.group_accuracy:
        return None
    return removal.accuracy - removal.group_accuracy["mlp"]
