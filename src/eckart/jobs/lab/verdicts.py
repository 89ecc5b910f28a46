"""Evaluates a claim's statements: pure functions from the results by seed to a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eckart.claims import Budget, Claim, Quantities, Results, Statement
from eckart.jobs.lab.statistics import Difference, difference, holm

NO_VERDICT = "no verdict"


class Reading(Mapping[str, Quantities]):
    """One seed's results, which records the arms that a statement reads."""

    def __init__(self, results: Results):
        self.results, self.seen = results, set[str]()

    def __getitem__(self, arm: str) -> Quantities:
        self.seen.add(arm)
        return Numbers(self.results[arm])

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


class Numbers(dict[str, float]):
    """Quantities of an arm; those that a diverged run did not reach are NaN."""

    def __missing__(self, name: str) -> float:
        if self.get("diverged"):
            return math.nan
        raise KeyError(f"no quantity {name}; there are {', '.join(sorted(self))}")


@dataclass(frozen=True)
class StatementResult:
    """A statement with its values, its statistics and its verdict."""

    text: str
    unit: str
    values: tuple[float, ...]  # per seed, positive where the sentence holds
    found: Difference
    p_corrected: float
    verdict: str
    arms: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """Plain data for the JSON document; NaN becomes null."""
        d = self.found
        return {
            "statement": self.text,
            "verdict": self.verdict,
            "unit": self.unit,
            "excess": number(d.mean),
            "interval": [number(d.low), number(d.high)],
            "p": number(d.p),
            "p_corrected": number(self.p_corrected),
            "smallest_visible_difference": number(d.visible),
            "values": [number(v) for v in self.values],
        }


@dataclass(frozen=True)
class ClaimResult:
    """The verdict on a claim, and on each of its statements."""

    verdict: str
    reason: str
    statements: tuple[StatementResult, ...]
    control: StatementResult
    skipped: tuple[str, ...] = field(default=())  # statements about arms that were left out

    @property
    def visible(self) -> float:
        """The largest of the statements' smallest visible differences."""
        return max((s.found.visible for s in self.statements), default=math.nan)


def evaluate_claim(
    claim: Claim, results: Sequence[Results], budget: Budget, edges: Sequence[str] = ()
) -> ClaimResult:
    """The verdict on a claim from the results of each seed.

    `edges` names arms whose best learning rate lies at the edge of the grid.
    """
    present = results[0].keys()
    (control,) = evaluate_statements([claim.control], results, present)
    statements = evaluate_statements(claim.statements, results, present)
    judged_texts = {s.text for s in statements}
    skipped = tuple(s.text for s in claim.statements if s.text not in judged_texts)
    read = {arm for s in (control, *statements) for arm in s.arms}
    verdict, reason = conclude(statements, control, budget, sorted(read & set(edges)))
    if budget == "quick":
        control, *statements = (replace(s, verdict=NO_VERDICT) for s in (control, *statements))
    return ClaimResult(verdict, reason, tuple(statements), control, skipped)


def conclude(
    statements: Sequence[StatementResult],
    control: StatementResult,
    budget: Budget,
    edges: Sequence[str],
) -> tuple[str, str]:
    """The claim's verdict, and the reason where there is no verdict."""
    if budget == "quick":
        return NO_VERDICT, "a quick check of the machinery"
    if control.verdict != "confirmed":
        return NO_VERDICT, f"the positive control was {control.verdict}: {control.text}"
    if edges:
        return NO_VERDICT, f"no best learning rate inside the grid: {', '.join(edges)}"
    verdicts = [s.verdict for s in statements]
    if "refuted" in verdicts:
        return "refuted", ""
    return ("confirmed" if set(verdicts) == {"confirmed"} else "not seen"), ""


def evaluate_statements(
    statements: Sequence[Statement], results: Sequence[Results], present: Any
) -> list[StatementResult]:
    """Test all statements, corrected together by Holm; those about absent arms are left out."""
    read: list[tuple[Statement, tuple[float, ...], tuple[str, ...]]] = []
    for statement in statements:
        readings = [Reading(r) for r in results]
        try:
            values = tuple(float(statement.excess(r)) for r in readings)
        except KeyError:
            if readings[0].seen <= set(present):
                raise  # all arms ran, so a quantity is missing: a mistake in the claim
            continue
        read.append((statement, values, tuple(sorted(readings[0].seen))))
    found = [difference(values, comparisons=len(read)) for _, values, _ in read]
    corrected = holm([d.p for d in found])
    return [
        StatementResult(s.text, s.unit, values, d, p, d.verdict(p), arms)
        for (s, values, arms), d, p in zip(read, found, corrected, strict=True)
    ]


def number(value: float) -> float | None:
    """The value at five significant digits; None where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
