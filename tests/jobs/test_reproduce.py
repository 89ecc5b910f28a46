"""Learning-rate search, verdicts and caching of runs, on arms with known results."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from eckart import claims
from eckart.claims import Arm, Claim, lower, recovers
from eckart.errors import Interrupted, UsageError
from eckart.jobs import reproduce
from eckart.jobs.lab import trials
from eckart.jobs.lab.sweep import Plan, at_edge, best, lr_at, next_points
from eckart.jobs.lab.verdicts import evaluate_claim

# --- the search ----------------------------------------------------------------------------


def searched(loss, plan):
    """Run a search on a known curve; returns the points run at short and at full length."""
    short, full = {}, {}
    while True:
        looks, runs = next_points(short, full, plan)
        if not looks and not runs:
            return short, full
        short |= {j: loss(j) for j in looks}
        full |= {j: loss(j) for j in runs}


@pytest.mark.parametrize("optimum", range(-4, 5))
@pytest.mark.parametrize("plan", [Plan(), Plan(share=1.0)])
def test_the_best_point_has_a_worse_neighbour_on_both_sides(optimum, plan):
    _, full = searched(lambda j: (j - optimum) ** 2, plan)
    assert best(full) == optimum and not at_edge(full)


def test_a_purse_that_is_spent_leaves_the_best_at_the_edge():
    _, full = searched(lambda j: -j, Plan())
    assert len(full) == Plan().purse and at_edge(full)


def test_a_first_look_spares_full_runs():
    short, full = searched(lambda j: (j - 0.2) ** 2, Plan())
    assert sorted(short) == [-2, -1, 0, 1, 2] and sorted(full) == [-1, 0, 1]


def test_among_equals_the_lowest_rate_wins_and_divergence_loses():
    assert best({-1: 1.0, 0: 1.0, 1: math.inf}) == -1


def test_points_are_half_decades():
    assert [lr_at(1e-3, j) for j in (-2, -1, 0, 1)] == [1e-4, 0.0003162, 1e-3, 0.003162]


# --- the verdict ---------------------------------------------------------------------------

PLAIN = Claim(
    says="b is better than a",
    arms=tuple(Arm(name, search=False) for name in ("start", "a", "b")),
    statements=(lower("b", than="a"),),
    control=lower("a", than="start"),
)


def table(gap, seeds=5, control=5.0, noise=0.1, rng=None):
    """Results in which b's loss is a's minus `gap`."""
    rng = rng or np.random.default_rng(0)
    luck = rng.standard_normal(seeds)

    def loss(level):
        return level + luck + noise * rng.standard_normal(seeds)

    start, a, b = loss(10 + control), loss(10.0), loss(10.0 - gap)
    return [
        {"start": {"loss": start[i]}, "a": {"loss": a[i]}, "b": {"loss": b[i]}}
        for i in range(seeds)
    ]


def test_verdicts_follow_the_sign():
    assert evaluate_claim(PLAIN, table(1.0), "default").verdict == "confirmed"
    assert evaluate_claim(PLAIN, table(-1.0), "default").verdict == "refuted"
    assert evaluate_claim(PLAIN, table(0.0), "default").verdict == "not seen"


def test_without_the_control_there_is_no_verdict():
    found = evaluate_claim(PLAIN, table(1.0, control=0.0), "default")
    assert found.verdict == "no verdict"
    assert found.reason == "the positive control was not seen: loss of a is lower than of start"


def test_a_learning_rate_at_the_edge_is_no_verdict_where_the_arm_counts():
    assert evaluate_claim(PLAIN, table(1.0), "default", ["b"]).reason == (
        "no best learning rate inside the grid: b"
    )
    assert evaluate_claim(PLAIN, table(1.0), "default", ["another"]).verdict == "confirmed"


def test_a_quick_check_says_nothing():
    found = evaluate_claim(PLAIN, table(1.0), "quick")
    assert found.verdict == "no verdict" and {s.verdict for s in found.statements} == {"no verdict"}


def test_planted_claims_are_judged_at_the_stated_rates(monkeypatch):
    monkeypatch.setattr("eckart.jobs.lab.statistics.DRAWS", 200)
    rng, n = np.random.default_rng(8), 500
    ties = [evaluate_claim(PLAIN, table(0.0, rng=rng), "default").verdict for _ in range(n)]
    assert sum(v != "not seen" for v in ties) / n <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    size = evaluate_claim(PLAIN, table(0.0), "default").statements[0].found
    gap = size.visible * 0.1 * math.sqrt(2) / size.sd  # with the true deviation, not one sample's
    seen = [evaluate_claim(PLAIN, table(gap, rng=rng), "default").verdict for _ in range(n)]
    # what is called visible is seen in 4 of 5; Monte Carlo error 3 * .018
    assert abs(seen.count("confirmed") / n - 0.8) < 0.054


def test_statements_about_arms_left_out_are_skipped_by_name():
    claim = Claim(
        says="",
        arms=PLAIN.arms,
        statements=(lower("b", than="a"), lower("c", than="a")),
        control=PLAIN.control,
    )
    found = evaluate_claim(claim, table(1.0), "default")
    assert found.skipped == ("loss of c is lower than of a",) and found.verdict == "confirmed"


def test_a_quantity_that_nobody_measures_is_a_mistake():
    claim = Claim("", PLAIN.arms, (lower("b", than="a", quantity="los"),), PLAIN.control)
    with pytest.raises(KeyError, match="no quantity los; there are loss"):
        evaluate_claim(claim, table(1.0), "default")


def test_a_share_of_a_gain_is_counted_from_the_start():
    s = recovers("b", 0.9, of="a", start="start")
    seed = {"start": {"loss": 5.0}, "a": {"loss": 3.0}, "b": {"loss": 3.1}}
    assert s.excess(seed) == pytest.approx(1.9 - 1.8)


# --- runs are kept -------------------------------------------------------------------------

FILE = """
    from pathlib import Path
    from eckart.claims import Arm, Claim, Task, lower

    HERE = Path(__file__).parent


    def known(lab, optimum, level):
        if (HERE / "stop").exists() and len((HERE / "log").read_text().splitlines()) == 7:
            raise KeyboardInterrupt
        with open(HERE / "log", "a") as log:
            log.write(f"{level} {lab.seed} {lab.lr:g} {lab.steps}\\n")
        from math import log10
        loss = level + (log10(lab.lr) - optimum) ** 2 + 0.01 * (7 * lab.seed % 5) * level
        return {"loss": loss, "validation": loss}


    def good(lab):
        return known(lab, -3.1, 1.0)


    def bad(lab):
        return known(lab, -1.9, 2.0)


    def worst(lab):
        return {"loss": 9.0 + lab.seed}


    CLAIM = Claim(
        says="good is better than bad",
        arms=(
            Arm("good", run=good, lr=1e-2),
            Arm("bad", run=bad, lr=1e-2),
            Arm("worst", run=worst, search=False),
        ),
        statements=(lower("good", than="bad"),),
        control=lower("bad", than="worst"),
        task=Task(pretrained=None),
        seeds=3,
    )
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder with a claim of known losses, and its own cache."""
    (tmp_path / "planted.py").write_text(textwrap.dedent(FILE))
    (tmp_path / "log").write_text("")
    monkeypatch.setenv("ECKART_CLAIMS", str(tmp_path))
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    return tmp_path


def log(folder):
    return (folder / "log").read_text().splitlines()


def test_a_claim_is_run_judged_and_written(planted, capsys):
    out = planted / "out"
    document = reproduce.run(["planted"], out=str(out), processes=1)
    (claim,) = document["claims"]
    assert claim["verdict"] == "confirmed" and claim["command"] == "eckart reproduce planted"
    arms = {a["name"]: a for a in claim["evidence"]["arms"]}
    assert (arms["good"]["lr"], arms["bad"]["lr"], arms["worst"]["lr"]) == (1e-3, 1e-2, None)
    assert not any(a["at_edge"] for a in arms.values())
    assert json.loads((out / "planted.json").read_text()) == claim
    assert "**Confirmed**: good is better than bad." in (out / "claims.md").read_text()
    said = capsys.readouterr()
    assert said.out.startswith("confirmed  planted   good is better than bad\n")


def test_what_has_ended_is_not_run_again(planted):
    first = reproduce.run(["planted"], json=True, processes=1)
    before = log(planted)
    second = reproduce.run(["planted"], json=True, processes=1)
    assert log(planted) == before
    for document in (first, second):
        document["claims"][0]["evidence"].pop("seconds")
        document.pop("seconds")
    assert first == second


def test_an_interrupted_claim_goes_on_where_it_stopped(planted):
    (planted / "stop").touch()
    with pytest.raises(Interrupted, match="what has ended is kept"):
        reproduce.run(["planted"], json=True, processes=1)
    assert len(log(planted)) == 7
    (planted / "stop").unlink()
    reproduce.run(["planted"], json=True, processes=1)
    resumed = log(planted)
    assert len(set(resumed)) == len(resumed)  # nothing twice


@pytest.mark.slow
def test_two_processes_give_the_same_document(planted):
    one = reproduce.run(["planted"], json=True, processes=1)
    (planted / "log").write_text("")
    os.environ["ECKART_CACHE"] = str(planted / "cache2")
    two = reproduce.run(["planted"], json=True, processes=2)
    assert log(planted)
    for document in (one, two):
        document["claims"][0]["evidence"].pop("seconds")
    assert one["claims"] == two["claims"]


def test_a_changed_claim_file_runs_its_own_arms_again(planted):
    trial = trials.ClaimTrial("planted", "good", "default", 1, 1e-3, 200)
    before = trial.file
    assert dataclasses.replace(trial, seed=2).file != before
    trials.hash_of.cache_clear()
    with open(planted / "planted.py", "a") as file:
        file.write("\n# another thought\n")
    assert trial.file != before


def test_arms_of_other_claims_with_the_same_content_share_their_runs():
    from eckart.methods import LoRA
    from eckart.recipe import Recipe

    a, b = (Arm(name, Recipe(LoRA(rank=2))) for name in ("one name", "another"))
    assert trials.described(a.recipe) == trials.described(b.recipe)
    assert trials.described(a.recipe) != trials.described(Recipe(LoRA(rank=3)))


def test_an_unknown_claim_names_the_nearest(planted):
    with pytest.raises(UsageError) as e:
        claims.load("plantd")
    assert e.value.text() == ("no claim is called plantd     command line\nDid you mean planted?")


def test_the_command_line_answers_with_the_document(planted):
    done = subprocess.run(
        [sys.executable, "-m", "eckart", "reproduce", "planted", "--quick", "--json"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (claim,) = json.loads(done.stdout)["claims"]
    assert set(claim) >= {
        "name", "claim", "verdict", "evidence", "smallest_visible_difference", "command",
    }  # fmt: skip
    assert claim["verdict"] == "no verdict"
