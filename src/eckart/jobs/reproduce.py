"""`eckart reproduce`: tests each paper's claim on a small scale: confirmed, not seen or refuted.

1 search    every arm's learning rate on seed 0: a short look at five, the best at full length,
            and on until the best one has a worse neighbour on either side
2 report    all arms at their best, several seeds, paired by the data's order
3 judge     intervals of the differences within seeds, Holm over a claim's statements

Finished runs are saved (trials.py), so an interrupted command continues where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eckart import claims
from eckart.claims import Arm, Budget, Claim
from eckart.errors import EckartError, UsageError
from eckart.io.folder import require_writable, write_json, write_text
from eckart.io.run import versions
from eckart.jobs.lab.bare_loop import start_of
from eckart.jobs.lab.runner import Quantities, Runner, Trial, resumable
from eckart.jobs.lab.sweep import Plan, at_edge, best, lr_at, next_points
from eckart.jobs.lab.trials import ClaimTrial, step_seconds, task_of
from eckart.jobs.lab.verdicts import NO_VERDICT, ClaimResult, evaluate_claim, number
from eckart.jobs.training.screen import clock
from eckart.report.claims import page

PLANS: Mapping[Budget, Plan] = {  # a quick check begins where a search would, and searches nothing
    "default": Plan(),
    "full": Plan(window=7, purse=11, share=1.0),
}
SEARCH_SEED = 0  # the report's seeds are 1, 2, ...


@dataclass
class Search:
    """The learning-rate search of one arm: scores by point, and the best."""

    arm: Arm
    start: float
    short: dict[int, float] = field(default_factory=dict)
    full: dict[int, float] = field(default_factory=dict)

    @property
    def lr(self) -> float | None:
        """The best one; where nothing was searched, where a search would begin."""
        if not self.arm.search:
            return self.arm.lr
        return lr_at(self.start, best(self.full) if self.full else 0)

    @property
    def edge(self) -> bool:
        return bool(self.full) and at_edge(self.full)


def run(
    slugs: Sequence[str] = (),
    budget: Budget = "default",
    out: str | None = None,
    processes: int | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Test the claims of these slugs (all without any); returns the --json document.

    Two runs at once where there are two cores, unless `processes` says otherwise; a quick
    check is over before a second process would have started. With `out`, each claim's document
    is written there as it ends, and claims.md over all documents in that folder.
    """
    if processes is not None and processes < 1:
        raise UsageError(
            "--processes is too small",
            [(f"--processes {processes}", "at least 1")],
            "Leave it out for two, where there are two cores.",
        )
    if out is not None:
        require_writable(Path(out).resolve())
    chosen = [(slug.replace("_", "-"), claims.load(slug)) for slug in slugs or claims.slugs()]
    begun, documents = time.monotonic(), []
    at_once = processes or (1 if budget == "quick" else min(2, os.cpu_count() or 1))
    again = command(slugs, budget) + (f" -o {out}" if out else "")
    with resumable(again), closing(Runner(at_once)) as trials:
        for slug, claim in chosen:
            document = tested(slug, claim, budget, trials, quiet=json)
            documents.append(document)
            if out is not None:
                keep(document, Path(out))
            if not json:
                print("\n".join(lines(document)), flush=True)
    return {
        "command": command(slugs, budget),
        "exit": 0,
        "seconds": round(time.monotonic() - begun, 1),
        "claims": documents,
    }


def tested(
    slug: str, claim: Claim, budget: Budget, trials: Runner, quiet: bool = False
) -> dict[str, Any]:
    """Run one claim's experiment. A claim that cannot be run gets the reason and no verdict."""
    progress = Progress(slug, claim, budget, quiet)
    trials.progress = progress.show
    begun = time.monotonic()
    try:
        progress.announce(trials.processes)
        searches = search(slug, claim, budget, trials)
        results = report(slug, claim, budget, searches, trials)
        judgement = evaluate_claim(claim, results, budget, [s.arm.name for s in searches if s.edge])
    except EckartError as fault:
        return empty(slug, claim, budget, fault)
    finally:
        progress.end()
    seconds = time.monotonic() - begun
    return document(slug, claim, budget, searches, results, judgement, seconds)


def search(slug: str, claim: Claim, budget: Budget, trials: Runner) -> list[Search]:
    """Search the learning rate of every arm; the next points of all arms run together."""
    searches = [
        Search(arm, start_of(arm, task_of(claim, arm, budget))) for arm in claim.chosen(budget)
    ]
    plan = PLANS.get(budget)
    while plan:
        asked: dict[ClaimTrial, tuple[dict[int, float], int]] = {}
        for s in (s for s in searches if s.arm.search):
            steps = task_of(claim, s.arm, budget).steps
            looks, runs = next_points(s.short, s.full, plan)
            for points, scores, length in (
                (looks, s.short, max(1, round(steps * plan.share))),
                (runs, s.full, steps),
            ):
                for j in points:
                    lr = lr_at(s.start, j)
                    trial = ClaimTrial(slug, s.arm.name, budget, SEARCH_SEED, lr, length)
                    asked[trial] = (scores, j)
        if not asked:
            break
        for trial, quantities in trials({t: t for t in asked}).items():
            scores, j = asked[trial]
            scores[j] = validation(quantities)
    return searches


def validation(quantities: Mapping[str, float]) -> float:
    """The score that selects a learning rate; a diverged run is worse than any other."""
    loss = quantities["validation"]
    return math.inf if quantities.get("diverged") or not math.isfinite(loss) else loss


def report(
    slug: str, claim: Claim, budget: Budget, searches: Sequence[Search], trials: Runner
) -> list[dict[str, dict[str, float]]]:
    """Train every arm at its best learning rate on every seed: per seed, arm -> quantities."""
    asked = {
        (seed, s.arm.name): ClaimTrial(
            slug, s.arm.name, budget, seed, s.lr, task_of(claim, s.arm, budget).steps
        )
        for seed in range(1, seeds_of(claim, budget) + 1)
        for s in searches
    }
    results: dict[int, dict[str, dict[str, float]]] = {}
    for (seed, arm), quantities in trials(asked).items():
        results.setdefault(seed, {})[arm] = quantities
    return list(results.values())


def seeds_of(claim: Claim, budget: Budget) -> int:
    """Seeds of the report: as the claim says, twice as many with --full, 2 with --quick."""
    return {"quick": 2, "default": claim.seeds, "full": 2 * claim.seeds}[budget]


# --- what is handed back -------------------------------------------------------------------


def document(
    slug: str,
    claim: Claim,
    budget: Budget,
    searches: Sequence[Search],
    results: Sequence[Mapping[str, Mapping[str, float]]],
    judgement: ClaimResult,
    seconds: float,
) -> dict[str, Any]:
    """A claim's part of the --json document."""
    return {
        "name": slug,
        "claim": claim.says,
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "evidence": {
            "statements": [s.plain() for s in judgement.statements],
            "control": judgement.control.plain(),
            "arms": [arm_facts(s, [r[s.arm.name] for r in results]) for s in searches],
            "seeds": len(results),
            "left_out": left_out(claim, budget, judgement),
            "not_visible_at_this_scale": claim.unseen,
            "budget": budget,
            "seconds": round(seconds, 1),
            "versions": versions(),
        },
        "smallest_visible_difference": number(judgement.visible),
        "command": command([slug], budget),
    }


def empty(slug: str, claim: Claim, budget: Budget, fault: EckartError) -> dict[str, Any]:
    """The document of a claim that could not be run."""
    return {
        "name": slug,
        "claim": claim.says,
        "verdict": NO_VERDICT,
        "reason": fault.text().replace("\n", "; "),
        "evidence": {"statements": [], "arms": [], "budget": budget},
        "smallest_visible_difference": None,
        "command": command([slug], budget),
    }


def arm_facts(found: Search, seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """An arm's learning rate, the curve it was chosen from, and its quantities over seeds."""
    names = [n for n in seeds[0] if all(n in s for s in seeds)]
    columns = {n: [s[n] for s in seeds] for n in names}
    return {
        "name": found.arm.name,
        "lr": found.lr,
        "at_edge": found.edge,
        "lr_curve": {
            f"{lr_at(found.start, j):g}": number(loss) for j, loss in sorted(found.full.items())
        },
        "quantities": {
            name: {"mean": number(sum(c) / len(c)), "sd": number(spread(c))}
            for name, c in columns.items()
        },
    }


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; NaN where it is not known."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if known else math.nan


def left_out(claim: Claim, budget: Budget, judgement: ClaimResult) -> list[str]:
    """Arms and statements that are not run with this budget."""
    ran = {arm.name for arm in claim.chosen(budget)}
    return [a.name for a in claim.arms if a.name not in ran] + list(judgement.skipped)


def command(slugs: Sequence[str], budget: Budget) -> str:
    """The command that repeats this."""
    return " ".join(["eckart reproduce", *slugs, *([] if budget == "default" else [f"--{budget}"])])


def keep(document: Mapping[str, Any], folder: Path) -> None:
    """Write a claim's document to a folder, and claims.md of all documents in it."""
    write_json(folder / f"{document['name']}.json", document)
    found = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    write_text(folder / "claims.md", page(found))


def lines(document: Mapping[str, Any]) -> list[str]:
    """The printed lines of a claim: verdict, statements with numbers, and what was left out."""
    evidence = document["evidence"]
    head = f"{document['verdict']:<10} {document['name']}   {document['claim']}"
    found = [head] + ([f"{'':<10} {document['reason']}"] if document["reason"] else [])
    rows = [(s["verdict"], s) for s in evidence["statements"]]
    rows += [("control", evidence["control"])] if "control" in evidence else []
    found += [f"{'':<10} {label:<10} {said(s)}" for label, s in rows]
    if evidence["arms"]:
        arms = [
            f"{a['name']} {a['quantities']['loss']['mean']:.3f}"
            + (f" (lr {a['lr']:.2g})" if a["lr"] else "")
            for a in evidence["arms"]
            if "loss" in a["quantities"]
        ]
        found += [f"{'':<10} {'loss':<10} {', '.join(arms)}"] if arms else []
        more = f"{evidence['seeds']} seeds, {clock(evidence['seconds'])}"
        more += f"; left out: {', '.join(evidence['left_out'])}" if evidence["left_out"] else ""
        found.append(f"{'':<10} {more}")
    return found


def said(s: Mapping[str, Any]) -> str:
    """`loss of a is lower than of b: by 0.031 [0.02, 0.042] nats, p 0.002; visible from 0.011`"""
    low, high = s["interval"]
    if low is None:
        return f"{s['statement']}: {s['excess']}, no interval"
    numbers = f"{s['excess']:+.4g} [{low:.4g}, {high:.4g}] {s['unit']}".rstrip()
    return (
        f"{s['statement']}: {numbers}, p {s['p_corrected']:.2g}; "
        f"visible from {s['smallest_visible_difference']:.2g}"
    )


def runs_of(arm: Arm, claim: Claim, budget: Budget) -> float:
    """The expected number of full runs of an arm; most searches extend to two neighbours."""
    plan, searched = PLANS.get(budget), 0.0
    if plan and arm.search:
        looks = plan.window * plan.share if plan.share < 1 else plan.window
        searched = looks + (plan.keep if plan.share < 1 else 0) + 2
    return seeds_of(claim, budget) + searched


class Progress:
    """A progress line on stderr: finished runs, and the estimated time left of the claim."""

    def __init__(self, slug: str, claim: Claim, budget: Budget, quiet: bool):
        arms = claim.chosen(budget)
        self.slug, self.task = slug, claim.full if budget == "full" and claim.full else claim.task
        self.runs = {a.name: runs_of(a, claim, budget) for a in arms}
        self.planned, self.searches = sum(self.runs.values()), budget in PLANS
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self.begun, self.done, self.clocked = 0.0, 0.0, 0.0
        self.steps = {a.name: task_of(claim, a, budget).steps for a in arms}

    def announce(self, at_once: int) -> None:
        """Print what will be run, and the estimated time."""
        if self.quiet or not self.searches:
            return
        steps = sum(runs * self.steps[name] for name, runs in self.runs.items())
        seconds = steps * step_seconds(self.task) / at_once
        print(
            f"{self.slug}  {len(self.runs)} arms, about {self.planned:.0f} runs and {steps:,.0f} "
            f"steps: {clock(seconds)} or more where none is kept",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def show(self, trial: Trial, _: Quantities, done: int, total: int) -> None:
        assert isinstance(trial, ClaimTrial)
        self.done += trial.steps / self.steps[trial.arm]
        if self.quiet:
            return
        left = self.planned - self.done if trial.seed == SEARCH_SEED else total - done
        text = f" {done}/{total}  {trial.described}  {self.left(left)}"
        print("\r\x1b[K" + text if self.live else text, end="" if self.live else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def left(self, runs: float) -> str:
        """About how long so many take; unknown after the first run, which made the start."""
        if not self.clocked:
            self.clocked, self.begun = self.done, time.monotonic()
            return ""
        pace = (time.monotonic() - self.begun) / (self.done - self.clocked)
        return f"about {clock(max(0.0, pace * runs))} left"

    def end(self) -> None:
        if self.live and not self.quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
