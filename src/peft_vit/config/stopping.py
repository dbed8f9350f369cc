"""When comparisons stop: what is asked of each experiment against a control, and after how many seeds it is looked."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from peft_vit.settings import Frozen

Spending = Literal["obrien-fleming", "pocock"]
Asked = Literal["superiority", "non-inferiority", "both"]
ComparedBy = Literal["accuracy", "balanced_accuracy"]
FEWEST_PAIRS = 2  # one pair has no spread: a look at it decides nothing


class StoppingConfig(Frozen):
    """What `run --until-decided` asks; the number of the study's seeds is the declared maximum."""

    control: str = Field(min_length=1, description="the experiment that all others are compared with")
    asked: Asked = Field(default="both", description="better than the control, not worse by the margin, or both")
    margin: float | None = Field(default=None, gt=0, lt=100, description="of non-inferiority, in points")
    looks: tuple[Annotated[int, Field(ge=FEWEST_PAIRS)], ...] | None = Field(
        default=None, min_length=1, description="numbers of seeds after which it is looked, up to that of the study"
    )
    every: int | None = Field(default=None, ge=FEWEST_PAIRS, description="in place of looks: after each so many seeds")
    spending: Spending = Field(default="obrien-fleming", description="shape of the bounds")
    level: float = Field(default=0.05, gt=0, lt=0.5, description="one-sided, of all comparisons together")
    futility: float = Field(
        default=0.05, ge=0, lt=1, description="predictive power below which a comparison stops; 0: never"
    )
    images: int | None = Field(
        default=None, ge=1, description="different images of all folds, which limit what folds without scatter show"
    )
    metric: ComparedBy = Field(default="accuracy", description="on the test images")

    @model_validator(mode="after")
    def _says_what_it_needs(self) -> Self:
        if self.asked == "superiority" and self.margin is not None:
            raise ValueError("'margin' has no effect with asked: superiority; remove it")
        if self.asked != "superiority" and self.margin is None:
            raise ValueError(f"asked: {self.asked} needs the field 'margin', in points of accuracy; add it")
        if self.looks is not None and self.every is not None:
            raise ValueError("looks and every exclude each other; remove one")
        if self.looks is None and self.every is None:
            raise ValueError("needs the field 'looks', or 'every'; add one")
        if self.looks is not None and list(self.looks) != sorted(set(self.looks)):
            raise ValueError(f"looks have to rise, got {list(self.looks)}")
        if self.images is not None and self.asked != "non-inferiority":
            raise ValueError("'images' has an effect with asked: non-inferiority alone; remove it")
        return self

    def looks_at(self, seeds: int) -> tuple[int, ...]:
        """Return the numbers of pairs at which a study of so many seeds is looked at; the last is all."""
        if self.looks is not None:
            return self.looks
        assert self.every is not None
        return (*range(self.every, seeds, self.every), seeds)

    def fault(self, names: tuple[str, ...], seeds: int) -> str | None:
        """Return why a study with these experiments and so many seeds can't be looked at so; None: it can."""
        if self.control not in names:
            return f"control: {self.control!r} is none of the study's experiments, which are {', '.join(names)}"
        if len(names) < 2:
            return "compares with the control, and the study has no other experiment; add one"
        if seeds < FEWEST_PAIRS:
            return f"needs {FEWEST_PAIRS} seeds and more, the study has {seeds}"
        if self.looks is not None and self.looks[-1] != seeds:
            return f"looks end at {self.looks[-1]}, and the study has {seeds} seeds; make both the same"
        if self.every is not None and self.every > seeds:
            return f"every: {self.every} is more than the study's {seeds} seeds, so it would never be looked"
        return None
