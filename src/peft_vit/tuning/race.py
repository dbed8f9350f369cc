"""The race: candidates against the reference, fold by fold, until the smallest is shown to lose no more than the
margin.

All candidates have the same folds, new ones for each repetition. Comparisons stop at declared numbers of pairs, with
the level of the whole family held (`statistics.sequential`), and their variance is that of repeated folds (Nadeau &
Bengio, Machine Learning 52 (2003)): the correlation of folds bounds what more repetitions can tell, so three are the
most. Folds that hardly scatter show no more than their images can (`statistics.lost_images`). Once a candidate is
shown, all larger ones are left; once it is shown to lose, or hopeless, it is left itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from peft_vit.statistics.sequential import SequentialResult, StoppingRule, follow, next_look
from peft_vit.tasks import DecidingMetric
from peft_vit.tuning.result import Candidate

LOOKS = (5, 10, 15)  # pairs: whole repetitions of five folds
Scores = Mapping[str, Sequence[float]]  # by candidate, of the folds in their order, as far as they are done


@dataclass(frozen=True)
class RaceResult:
    """What a race came to.

    Attributes:
        candidates: smallest first, the reference among them.
        reference: name of one.
        chosen: likewise.
        shown: it was shown to be good enough, or nothing smaller is open.
        why: a sentence.
        open: names of comparisons that time has left open.
    """

    candidates: tuple[Candidate, ...]
    reference: str
    chosen: str
    shown: bool
    why: str
    open: tuple[str, ...]


def rule_of(margin_share: float, correlation: float, images: int) -> StoppingRule:
    """Return what every comparison is asked, and when it stops."""
    return StoppingRule("non-inferiority", margin_share, LOOKS, correlation=correlation, images=images)


def images_that_count(counts: Sequence[int], different: int | None, metric: DecidingMetric) -> int:
    """Return how many images limit what the folds can show, see `StoppingRule.images`: copies count once.

    Of balanced accuracy each class is as good as the rarest: of C classes with n images and more, in which shares of
    q_c are lost, nothing is seen lost with at most ``prod (1 - q_c)^n <= (1 - mean q_c)^(C n)``, so C n images count.

    Args:
        counts: images of each class that are not sealed.
        different: of them, a copy not counted; None: all are.
        metric: what decides.
    """
    images = sum(counts)
    counted = len(counts) * min(counts) if metric.equal_classes else images
    return max(1, counted * (images if different is None else different) // images)


def still_racing(candidates: Sequence[Candidate], courses: Sequence[SequentialResult]) -> list[str]:
    """Return the candidates that go on: the open ones that are smaller than any that was shown."""
    of = {one.name: one for one in courses}
    going: list[str] = []
    for candidate in candidates:  # smallest first
        course = of.get(candidate.name)
        if course is None:
            continue
        if course.noninferiority == "supported":
            break
        if course.stopped is None:
            going.append(candidate.name)
    return going


def race(
    candidates: Sequence[Candidate],
    reference: str,
    rule: StoppingRule,
    run: Callable[[Sequence[str], int], Scores],
    fits: Callable[[Candidate], bool],
    tell: Callable[[str], None],
) -> RaceResult:
    """Race until nothing that matters is open, or time is over.

    Args:
        candidates: smallest first, the reference among them.
        reference: its name.
        rule: of the comparisons.
        run: does the folds of some candidates, up to a number, and returns all scores so far, of as many as were done.
        fits: whether a candidate keeps within the limits; the reference may not.
        tell: told how comparisons stand.
    """
    racing = [one for one in candidates if not one.left_out and one.name != reference]
    scores: Scores = run([], 0)
    courses = _courses(racing, reference, scores, rule)
    stuck: set[str] = set()  # a fold failed, or has no time in this call
    while going := [name for name in still_racing(racing, courses) if name not in stuck]:
        taking_part, pairs = next_look(courses, going)
        scores = run([reference, *taking_part], pairs)
        before, courses = courses, _courses(racing, reference, scores, rule)
        for course in courses:
            if course not in before:
                tell(f"  {line(course)}")
        if len(scores.get(reference, ())) < pairs:  # time is over
            break
        stuck.update(name for name in taking_part if len(differences(scores, name, reference)) < pairs)
    told = tuple(_told(one, reference, scores, courses) for one in candidates)
    return _chosen(told, reference, courses, rule, fits)


def _courses(
    racing: Sequence[Candidate], reference: str, scores: Scores, rule: StoppingRule
) -> tuple[SequentialResult, ...]:
    found = {one.name: differences(scores, one.name, reference) for one in racing}
    return follow(found, rule) if found else ()


def differences(scores: Scores, name: str, reference: str) -> list[float]:
    """Return the paired differences of a candidate, as far as both have them."""
    pairs = zip(scores.get(name, ()), scores.get(reference, ()), strict=False)
    return [own - other for own, other in pairs]


def line(course: SequentialResult) -> str:
    """Return how a comparison stands, in a line."""
    if not course.looks:
        return f"{course.name}: not looked at yet"
    look = course.looks[-1]
    interval = f"{100 * look.difference:+.1f} [{100 * look.low:+.1f}, {100 * look.high:+.1f}] points"
    verdict = {"supported": "keeps within the margin", "refuted": "loses more than the margin"}
    said = verdict.get(
        course.noninferiority or "", {"futile": "hopeless", "maximum": "not decided"}.get(course.stopped or "", "open")
    )
    return f"{course.name}: {interval} after {look.pairs} folds: {said}"


def _told(candidate: Candidate, reference: str, scores: Scores, courses: Sequence[SequentialResult]) -> Candidate:
    own = scores.get(candidate.name, ())
    paired = differences(scores, candidate.name, reference)
    return replace(
        candidate,
        score=statistics.fmean(own) if own else None,
        pairs=len(paired),
        difference=statistics.fmean(paired) if paired else None,
        course=next((one for one in courses if one.name == candidate.name), None),
    )


def _chosen(
    candidates: tuple[Candidate, ...],
    reference: str,
    courses: Sequence[SequentialResult],
    rule: StoppingRule,
    fits: Callable[[Candidate], bool],
) -> RaceResult:
    """Choose the smallest that is shown; the reference, if all smaller ones are shown to lose; else guess."""
    racing = [one for one in candidates if one.course is not None]
    open_ = tuple(still_racing(racing, courses))
    margin = f"{100 * rule.margin:g} point{'' if rule.margin == 0.01 else 's'}"
    shown = next((one for one in racing if one.course.noninferiority == "supported"), None)
    if shown is not None:
        why = f"shown not to lose {margin} against {reference}, the smallest that was"
        return RaceResult(candidates, reference, shown.name, True, why, open_)
    of_reference = next(one for one in candidates if one.name == reference)
    if fits(of_reference) and all(one.course.noninferiority == "refuted" for one in racing):
        why = f"all that are smaller are shown to lose more than {margin}" if racing else "nothing smaller could race"
        return RaceResult(candidates, reference, reference, True, why, open_)
    guess = best_guess([one for one in candidates if fits(one)], of_reference)
    why = f"the best guess: nothing smaller was shown to keep within {margin} of {reference}, nor all to lose more"
    return RaceResult(candidates, reference, guess.name, False, why, open_)


def best_guess(candidates: Sequence[Candidate], reference: Candidate) -> Candidate:
    """Return the smallest whose mean over its folds is not below the reference's on the same folds.

    If there is none, the one that comes closest. What was shown to lose more than the margin is not taken, unless there
    is nothing else.
    """

    def behind(one: Candidate) -> float:
        if one.name == reference.name:
            return 0.0
        return math.inf if one.difference is None else -one.difference

    sound = [one for one in candidates if one.course is None or one.course.noninferiority != "refuted"]
    known = sound if any(behind(one) < math.inf for one in sound) else list(candidates)
    return next((one for one in known if behind(one) <= 0), min(known, key=behind))
