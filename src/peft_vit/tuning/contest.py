"""Who races: what keeps within the limits and is not hopeless, and against which reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from peft_vit.tuning.candidates import KINDS, REFERENCE, Design, Kind, of_kind
from peft_vit.tuning.race import LOOKS
from peft_vit.tuning.rates import BestRate
from peft_vit.tuning.result import Candidate
from peft_vit.tuning.schedule import Schedule

_HOPELESS = 3  # margins behind the best on validation, and as many standard errors


def reference_of(found: Mapping[Kind, BestRate]) -> Kind:
    """Return the kind that all are compared with: float LoRA, or what validation prefers if that could not be trained.

    The best on validation would be the luckiest one as a rule: in simulations with as many images as it has here, a
    reference that was chosen so made one verdict in seven wrong that was to hold beside float LoRA.
    """
    order = {kind: place for place, kind in enumerate(KINDS)}
    return "lora" if "lora" in found else max(found, key=lambda kind: (found[kind].score, -order[kind]))


def contestants(
    designs: Sequence[Design],
    found: Mapping[Kind, BestRate],
    schedule: Schedule,
    margin_share: float,
    max_bytes: int | None,
    experiments: Mapping[str, Mapping[str, object]],
    validation_images: int,
) -> tuple[list[Candidate], str]:
    """Return all candidates, smallest first, with why some do not race; and the reference's name.

    Probes cost little: all that keep within the limits race. Of what takes steps as many race as time has room for,
    those with the best validation first; of one kind the one that its rate was found with.

    Args:
        designs: everything that could be trained, smallest first.
        found: learning rates by kind.
        schedule: what fits the time.
        margin_share: a share of accuracy.
        max_bytes: of a file; None: any.
        experiments: as a configuration holds them, by name, of designs that can be trained.
        validation_images: of a fold, on which learning rates were compared.
    """
    best = reference_of(found)
    reference = of_kind(list(designs), best)
    room = max(1, schedule.races // LOOKS[0] - 1)
    order = {kind: place for place, kind in enumerate(KINDS)}

    def promise(one: Design) -> tuple[bool, bool, float, int]:
        """Return what is taken first: smaller files, what the rate was found with, the best validation."""
        assert one.kind is not None
        stands_for = REFERENCE if one.kind == "lora" else one.kind
        return one.bytes == reference.bytes, one.name != stands_for, -found[one.kind].score, order[one.kind]

    stepping = [one for one in designs if one.kind in found and one.name != reference.name]
    preferred = sorted(stepping, key=promise)
    hopeless = _hopeless(found, margin_share, validation_images)
    candidates = []
    for design in designs:
        why = ""
        if design.name != reference.name:
            why = _against(design, reference, found, hopeless, max_bytes)
        if not why and design.kind is not None and design.name != reference.name:
            able = [one.name for one in preferred if not _against(one, reference, found, hopeless, max_bytes)]
            why = "" if design.name in able[:room] else "there is no time for it"
        candidates.append(Candidate(design.name, experiments.get(design.name, {}), design.bytes, left_out=why))
    return candidates, reference.name


def _hopeless(found: Mapping[Kind, BestRate], margin_share: float, validation_images: int) -> float:
    """Return how far behind the best on validation there is no hope.

    A share p of n images scatters by sqrt(p (1 - p) / n), the difference of two of them by sqrt(2) times that, at most.
    """
    best = max(one.score for one in found.values())
    scatter = math.sqrt(2 * best * (1 - best) / validation_images)
    return _HOPELESS * (margin_share + scatter)


def _against(
    design: Design, reference: Design, found: Mapping[Kind, BestRate], hopeless: float, max_bytes: int | None
) -> str:
    """Return why a design does not race, time left aside; empty: nothing stands against it."""
    if design.bytes > reference.bytes:
        return f"larger than the reference, {reference.name}"
    if max_bytes is not None and design.bytes > max_bytes:
        return f"takes {design.bytes / 1e6:.1f} MB, more than the limit of {max_bytes / 1e6:g} MB"
    if design.kind is None:
        return "" if design.bytes < reference.bytes else f"no smaller than the reference, {reference.name}"
    if design.kind not in found:
        return "no learning rate was found for it"
    behind = max(one.score for one in found.values()) - found[design.kind].score
    if behind > hopeless:
        return f"{100 * behind:.1f} points behind the best on validation"
    return ""
