"""The rules of data/claims.csv and the verdict they give: computed from a value and its interval, never typed.

A rule is a condition on one number: `<=1`, `<1`, `>=0.5`, `>0`, `==1` or a closed range `0.5..2`, fixed before the
measurement. This file knows nothing of files or notebooks; `effnn.report.claims` joins rows and results.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from effnn.base import InvalidInput

KINDS = ("exact", "value", "direction", "figure", "table")
MIN_SAMPLES = 3  # paired seeds; fewer give no useful interval

HELD = "held"
IN_DIRECTION = "held in direction"
DID_NOT_HOLD = "did not hold"
NOT_ATTEMPTED = "not attempted"
NOT_BUILT = "not built yet"
NO_RESULT = "no result yet"
SEE_FIGURE = "see figure"  # for rows without a rule
SEE_TABLE = "see table"
WORDS = (HELD, IN_DIRECTION, DID_NOT_HOLD, NOT_ATTEMPTED, SEE_FIGURE, SEE_TABLE, NO_RESULT, NOT_BUILT)

_NUMBER = r"([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)"
_COMPARISON = re.compile(rf"(<=|>=|==|<|>)\s*{_NUMBER}")
_RANGE = re.compile(rf"{_NUMBER}\s*\.\.\s*{_NUMBER}")


@dataclass(frozen=True)
class Rule:
    """A condition on one number, kept as the interval in which it is true.

    low: lower end.
    high: upper end.
    low_open: whether the lower end is excluded.
    high_open: whether the upper end is excluded.
    text: the rule as it was written.
    """

    low: float
    high: float
    low_open: bool
    high_open: bool
    text: str

    @classmethod
    def parse(cls, text: str) -> "Rule | None":
        """Return the rule written as `text`, or None for an empty text; raises InvalidInput for anything else."""
        text = text.strip()
        if not text:
            return None
        if match := _COMPARISON.fullmatch(text):
            sign, number = match[1], _finite(match[2], text)
            low = number if sign in (">", ">=", "==") else -math.inf
            high = number if sign in ("<", "<=", "==") else math.inf
            return cls(low, high, low_open=sign == ">", high_open=sign == "<", text=text)
        if match := _RANGE.fullmatch(text):
            low, high = _finite(match[1], text), _finite(match[2], text)
            if low > high:
                raise InvalidInput(f"rule {text!r}: the range is empty, write the smaller number first")
            return cls(low, high, low_open=False, high_open=False, text=text)
        raise InvalidInput(f"rule {text!r} is not one of '<=1', '<1', '>=1', '>1', '==1' or '0.5..2'")

    def holds(self, value: float) -> bool:
        """Whether the rule is true of `value`; never true of NaN."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def holds_over(self, interval: tuple[float, float]) -> bool:
        """Whether the rule is true of every number of the closed `interval`; both ends suffice, as rules are convex."""
        return all(self.holds(end) for end in interval)

    def contains(self, other: "Rule") -> bool:
        """Whether this rule is true wherever `other` is, i.e. is the weaker of the two."""
        low = self.low < other.low or (self.low == other.low and (other.low_open or not self.low_open))
        high = self.high > other.high or (self.high == other.high and (other.high_open or not self.high_open))
        return low and high

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Verdict:
    """One of `WORDS` and why."""

    word: str
    reason: str


def judge(
    kind: str,
    held: Rule | None,
    direction: Rule | None,
    value: float | None,
    interval: tuple[float, float] | None = None,
    samples: Sequence[float] = (),
    note: str = "",
) -> Verdict:
    """Return the verdict on one measured value.

    kind: one of `KINDS`. An `exact` quantity is counted, so one value is enough and every sample must obey the rule.
    held: the rule.
    direction: the weaker rule, None for none.
    value: the number; None where the claim was not attempted.
    interval: 95 % interval over at least `MIN_SAMPLES` paired seeds, None with fewer.
    samples: one number per seed.
    note: for a claim that was not attempted, what it needs.
    """
    if kind not in KINDS:
        raise InvalidInput(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    if kind in ("figure", "table") and held is None:
        return Verdict(SEE_FIGURE if kind == "figure" else SEE_TABLE, note or f"the {kind} is shown; no rule is set")
    if value is None:
        return Verdict(NOT_ATTEMPTED, note or "the run gave no reason")
    if held is None:
        raise InvalidInput(f"a claim of kind {kind!r} needs a `held` rule")
    if kind == "exact":
        return _judge_exact(held, direction, value, samples)
    if interval is None:
        return _judge_few(held, direction, value, len(samples))
    span = f"{number(value)}, 95 % interval {span_text(interval)}"
    if held.holds_over(interval):
        return Verdict(HELD, f"{span}: {held} over the whole interval")
    if direction is not None and direction.holds_over(interval):
        return Verdict(IN_DIRECTION, f"{span}: not {held} over the whole interval, but {direction} over all of it")
    if held.holds(value):
        return Verdict(IN_DIRECTION, f"{span}: {held} on the mean only")
    if direction is None:
        return Verdict(DID_NOT_HOLD, f"{span}: not {held}, and the row has no weaker rule")
    return Verdict(DID_NOT_HOLD, f"{span}: neither {held} nor, over the whole interval, {direction}")


def _judge_exact(held: Rule, direction: Rule | None, value: float, samples: Sequence[float]) -> Verdict:
    counted = f"{number(value)}, exact ({'one value suffices' if not samples else f'{len(samples)} runs'})"
    if all(held.holds(one) for one in (value, *samples)):
        return Verdict(HELD, f"{counted}: {held}")
    if direction is not None and all(direction.holds(one) for one in (value, *samples)):
        return Verdict(IN_DIRECTION, f"{counted}: not {held}, but {direction}")
    return Verdict(DID_NOT_HOLD, f"{counted}: not {held}" + ("" if direction is None else f" and not {direction}"))


def _judge_few(held: Rule, direction: Rule | None, value: float, count: int) -> Verdict:
    """Without an interval nothing is `held`."""
    few = f"{number(value)}, {count} of the {MIN_SAMPLES} paired samples that an interval needs"
    if held.holds(value):
        return Verdict(IN_DIRECTION, f"{few}: {held} on the value alone")
    if direction is None:
        return Verdict(DID_NOT_HOLD, f"{few}: not {held}, and the row has no weaker rule")
    if direction.holds(value):
        return Verdict(IN_DIRECTION, f"{few}: not {held}, but {direction} on the value alone")
    return Verdict(DID_NOT_HOLD, f"{few}: neither {held} nor {direction}")


def number(value: float | None) -> str:
    """Return `value` with four significant digits, for people: 133.2, 0.9887, 2.3e-06, 530 billion; '-' for None."""
    if value is None:
        return "-"
    if 1e9 <= abs(value) < 1e12:
        return f"{value / 1e9:.4g} billion"
    return f"{value:.4g}"


def span_text(interval: tuple[float, float] | None) -> str:
    """Return an interval as '[0.12, 0.34]', or '-' when there is none."""
    return "-" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]"


def _finite(text: str, rule: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidInput(f"rule {rule!r}: {text} is too large for a number")
    return value
