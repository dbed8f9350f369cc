"""How often `peft-vit tune` chooses a model that truly loses more than the margin, over simulated tunings.

Stand-ins take the place of runs, and everything else is the command's own: learning rates, who races, comparisons that
stop, the choice. What is planted: the true accuracy of every candidate. A candidate's score on fold j of J is

    truth + s (sqrt(rho) U + sqrt(1 - rho) E_j),    U, E_j standard normal,    rho = n_test / (n_train + n_test)

as Nadeau & Bengio (Machine Learning 52, 2003) have it for repeated folds: U is what all share, for they train on much
the same images. Learning rates differ by 2 points, validation scores have the scatter of as many images.

    python benchmarks/tune_error.py --tunings 200
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from peft_vit.forecasting.time_limit import Limit
from peft_vit.tasks.classification import ACCURACY
from peft_vit.tuning.context import TuningContext
from peft_vit.tuning.probes import BackboneChoice
from peft_vit.tuning.race import RaceResult
from peft_vit.tuning.rates import RATES
from peft_vit.tuning.running import Outcome, Outcomes
from peft_vit.tuning.schedule import Schedule
from peft_vit.tuning.stages import choose_rates, prepare_race
from peft_vit.tuning.state import State, TuneFile
from peft_vit.tuning.tune_request import TuneRequest

MARGIN = 1.0  # points
_COUNTS = (205, 205)  # images outside the holdout: 512 labels, of which a fifth is
_SCATTER = 0.012  # s: of a difference on 82 images, about
_VALIDATION = 65  # images
_MODEL, _SIZE = "test_vit", 32
_LOSSES = (0.0, 0.0, 0.003, 0.0101, 0.015, 0.02, 0.03)  # of candidates, as shares; the margin is 0.01


@dataclass
class StandIns:
    """Runs that take no time, and tell the time that they would have taken.

    Attributes:
        truth: accuracy by name of a candidate.
        rho: correlation of folds.
        rng: of this tuning.
        run_s: seconds of a run that takes steps; probes take a tenth.
        now: seconds on the clock.
    """

    truth: Mapping[str, float]
    rho: float
    rng: np.random.Generator
    run_s: float
    now: float = 0.0
    done: dict[str, Outcomes] = field(default_factory=dict)
    shared: dict[str, float] = field(default_factory=dict)
    images: dict[tuple[int, int], float] = field(default_factory=dict)

    def __call__(
        self, mapping: Mapping[str, Any], limit: Limit, only: tuple[Sequence[str], Sequence[int]] | None = None
    ) -> Outcomes:
        """Return what came of a study's runs, as far as there is time."""
        done = self.done.setdefault(mapping["name"], {})
        names = [one["name"] for one in mapping["experiments"] if only is None or one["name"] in only[0]]
        methods = {one["name"]: one["method"] for one in mapping["experiments"]}
        for seed in mapping["seeds"] if only is None else only[1]:
            for name in names:
                seconds = self.run_s * (0.1 if methods[name] in ("linear", "qa_linear") else 1.0)
                if (name, seed) in done or limit.left_s < seconds:
                    continue
                self.now += seconds
                done[name, seed] = self._outcome(name, seed)
        return done

    def _outcome(self, name: str, seed: int) -> Outcome:
        kind = next((one for one in sorted(self.truth, key=len, reverse=True) if name.startswith(one)), "lora_r8")
        rate_loss = 0.02 if f"{RATES[0]:g}".replace(".", "-") in name else 0.0
        truth = self.truth[kind] - rate_loss
        shared = self.shared.setdefault(name, self.rng.standard_normal())
        test = truth + _SCATTER * (np.sqrt(self.rho) * shared + np.sqrt(1 - self.rho) * self.rng.standard_normal())
        images = self.images.setdefault(
            (len(self.done), seed), self.rng.standard_normal()
        )  # the same for all candidates
        own = 0.8 * images + 0.6 * self.rng.standard_normal()
        validation = truth + np.sqrt(truth * (1 - truth) / _VALIDATION) * own
        return Outcome(min(1.0, float(validation)), 0.5, float(test), 0.01, 0.01, self.run_s, Path(name) / str(seed))


def one_tuning(
    seed: int, minutes: float = 30.0, losses: Sequence[float] = _LOSSES, max_bytes: int | None = None
) -> tuple[RaceResult, dict[str, float]]:
    """Tune with stand-ins: what came of it, and what each candidate truly loses to float LoRA, a share of accuracy."""
    rng = np.random.default_rng(seed)
    names = ("probe_int2", "probe_nf4", "probe_int8", "lora_int2", "lora_nf4", "lora_int8", "adalora_nf4", "adalora")
    truth = {name: 0.85 - float(rng.choice(losses)) for name in names}
    truth |= dict.fromkeys(("lora_r8", "lora_r2", "lora_few_ranks", "probe"), 0.85)
    images = sum(_COUNTS)
    runner = StandIns(truth, (images // 5) / images, rng, run_s=30.0)
    request = TuneRequest(
        images=Path("images"),
        output=Path("output"),
        margin=MARGIN,
        minutes=minutes,
        max_bytes=max_bytes,
        models=(_MODEL,),
        weights="random",
        seed=seed,
    )

    def clock() -> float:
        return runner.now

    state = State(request, lambda _: None, Limit(minutes, 0.0, clock), TuneFile(asked={}), clock)
    seen = SimpleNamespace(images=SimpleNamespace(dataset="image-folder"), path=Path("images"))
    context = TuningContext(state, runner, seen, Path("images.json"), _COUNTS, ACCURACY)
    kinds = ("lora", "lora_nf4", "lora_int8", "adalora", "lora_int2")
    backbone = BackboneChoice(_MODEL, _SIZE, Schedule(kinds, races=20, steps=48, validate_every=10, run_s=30.0))
    found, _ = choose_rates(context, backbone, {})
    contest = prepare_race(context, backbone, found, {})
    raced = contest.run()
    return raced, {one.name: truth["lora_r8"] - truth[one.name] for one in raced.candidates}


def errors(tunings: int, minutes: float, losses: Sequence[float] = _LOSSES, first: int = 0) -> dict[str, float]:
    """Return shares of tunings, see the keys; what is wrong loses more than the margin.

    Args:
        tunings: how many.
        minutes: that each has.
        losses: true losses of candidates, as shares, of which each draws one.
        first: seed.
    """
    keys = ("shown", "shown to be smaller", "shown and wrong", "guessed and wrong")
    counts = dict.fromkeys(keys, 0)
    for seed in range(first, first + tunings):
        raced, loss = one_tuning(seed, minutes, losses)
        wrong = loss[raced.chosen] > MARGIN / 100
        counts["shown"] += raced.shown
        counts["shown to be smaller"] += raced.shown and raced.chosen != raced.reference
        counts["shown and wrong"] += raced.shown and wrong
        counts["guessed and wrong"] += not raced.shown and wrong
    return {name: count / tunings for name, count in counts.items()}


def main() -> None:
    """Print a line for each amount of time and each kind of truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunings", type=int, default=200)
    asked = parser.parse_args()
    truths = {"mixed": _LOSSES, "all just beyond the margin": (0.0101,), "none loses": (0.0,)}
    for minutes in (30.0, 120.0):
        for name, losses in truths.items():
            found = errors(asked.tunings, minutes, losses)
            said = ", ".join(f"{what} {share:.1%}" for what, share in found.items())
            print(f"{minutes:g} minutes, {name}: {said}", flush=True)


if __name__ == "__main__":
    main()
