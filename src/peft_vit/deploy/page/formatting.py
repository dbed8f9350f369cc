"""How numbers are written: percent with one decimal, differences in points with a sign, always with their n."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from peft_vit.base.statistics import Interval
from peft_vit.core.tasks import DecidingMetric, Scores

T = TypeVar("T")
_MINUS = "\u2212"


def plain(text: str) -> str:
    """Return text on one line without control characters, for names that others chose."""
    visible = "".join(" " if unicodedata.category(c).startswith("C") else c for c in text)
    return " ".join(visible.split())


def or_dash(value: T | None, write: Callable[[T], str]) -> str:
    """Return a value as text; – where it is not known."""
    return "–" if value is None else write(value)


def fixed(value: float, decimals: int = 2) -> str:
    """Return a number with a fixed count of decimals and a true minus sign.

    What two ways of summing up make of it beyond ten decimals does not decide how it is rounded.
    """
    text = f"{round(value, 10):.{decimals}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", _MINUS)


def signed(value: float) -> str:
    """Return a difference with its sign, and one decimal."""
    text = fixed(value, 1)
    return text if text.startswith(_MINUS) or float(text) == 0 else f"+{text}"


def percent(share: float) -> str:
    """Return a share as percent with one decimal."""
    return f"{fixed(100 * share, 1)} %"


def points(share: float) -> str:
    """Return a difference of shares in points, with its sign."""
    return signed(100 * share)


def percent_interval(interval: Interval) -> str:
    """Return a share with its interval, e.g. ``80.3 % [76.1, 84.5]``."""
    return f"{percent(interval.estimate)} {_bounds(interval, lambda end: fixed(100 * end, 1))}"


def bounds_in_percent(interval: Interval) -> str:
    """Return both ends of a share's interval in percent, e.g. ``76.1 to 84.5``."""
    return f"{fixed(100 * (interval.low or 0.0), 1)} to {fixed(100 * (interval.high or 0.0), 1)}"


def value_of(metric: DecidingMetric, value: float) -> str:
    """Return a value of what decides: shares in percent, others in their unit."""
    return percent(value) if metric.is_share else f"{value:.3g}".replace("-", _MINUS)


def bounds_of(metric: DecidingMetric, interval: Interval) -> str:
    """Return both ends of its interval, without a unit."""
    if metric.is_share:
        return bounds_in_percent(interval)
    low, high = (or_dash(end, partial(value_of, metric)) for end in (interval.low, interval.high))
    return f"{low} to {high}"


def gain_of(metric: DecidingMetric, value: float) -> str:
    """Return a difference of two of its values, with its sign."""
    return points(value) if metric.is_share else f"{value:+.2g}".replace("-", _MINUS)


def score_of(scores: Scores, share: float) -> str:
    """Return a score as its metric's value."""
    return value_of(scores.metric, share * scores.factor)


def score_interval(scores: Scores, interval: Interval) -> str:
    """Return a score as its metric's value, with its interval."""
    return percent_interval(interval) if scores.metric.is_share else number_interval(scaled(interval, scores.factor), 3)


def better_above(scores: Scores) -> str:
    """Return how differences of errors are turned round; nothing of other metrics."""
    return "" if scores.metric.sign > 0 else "Above 0 the error is smaller. "


def better_question(scores: Scores) -> str:
    """Return what a comparison asks."""
    return "more accurate?" if scores.metric.counts_images else "better?"


def points_interval(interval: Interval | None) -> str:
    """Return a difference of shares in points with its interval, e.g. ``+4.6 [-1.0, +10.2]``."""
    return "not computed" if interval is None else f"{points(interval.estimate)} {_bounds(interval, points)}"


def scaled(interval: Interval, factor: float) -> Interval:
    """Return a number and its interval in another unit; a factor below 0 turns it round."""
    bounds = (interval.low, interval.high) if factor > 0 else (interval.high, interval.low)
    low, high = (None if end is None else factor * end for end in bounds)
    return replace(interval, estimate=factor * interval.estimate, low=low, high=high)


def number_interval(interval: Interval, decimals: int = 2) -> str:
    """Return a number with its interval."""
    return f"{fixed(interval.estimate, decimals)} {_bounds(interval, lambda end: fixed(end, decimals))}"


def _bounds(interval: Interval, write: Callable[[float], str]) -> str:
    if interval.low is None or interval.high is None:
        return "[no interval]"
    return f"[{write(interval.low)}, {write(interval.high)}]"


def count(value: float) -> str:
    """Return a count with thousands separated."""
    return f"{round(value):,}"


def counted(n: int, what: str) -> str:
    """Return a sample size, e.g. ``n = 2 seeds``."""
    return f"n = {n} {what}{'' if n == 1 else 's'}"


def megabytes(value: float) -> str:
    """Return bytes as MB, 10^6 bytes."""
    return f"{value / 1e6:.1f} MB" if value >= 1e6 or value == 0 else f"{value / 1e6:.2f} MB"


def joined(names: Iterable[str]) -> str:
    """Return names as a list in prose."""
    return ", ".join(names)
