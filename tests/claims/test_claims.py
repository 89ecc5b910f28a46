"""Every claim file is valid: it runs, its arms exist, and its docstring names the source."""

import ast
import inspect
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from eckart import claims
from eckart.jobs import reproduce
from eckart.jobs.lab.bare_loop import start_of
from eckart.jobs.lab.trials import task_of
from eckart.recipe import registry

FOLDER = Path(claims.__file__).parent
BUILT_IN = sorted(p.stem for p in FOLDER.glob("*.py") if p.name[0] != "_")
BESIDE = {"lora_limits", "unified_study", "pissa"}  # papers that are no method of their own


@pytest.fixture(params=BUILT_IN)
def claim(request):
    return claims.load(request.param)


def test_a_claim_says_what_is_claimed_and_what_cannot_be_seen(claim):
    assert claim.says and not claim.says.endswith(".")
    assert claim.unseen
    assert claim.statements and claim.seeds >= 3


def test_arms_have_names_of_their_own(claim):
    names = [arm.name for arm in claim.arms]
    assert len(set(names)) == len(names)
    assert len({s.text for s in claim.statements}) == len(claim.statements)


class Asked(Mapping):
    """Results that return a number for every quantity, and record which arms were read."""

    def __init__(self, claim):
        self.names, self.seen = {arm.name for arm in claim.arms}, set()

    def __getitem__(self, arm):
        assert arm in self.names, f"no arm is called {arm}"
        self.seen.add(arm)
        return defaultdict(lambda: 1.0)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def read_by(statement, claim):
    results = Asked(claim)
    assert isinstance(statement.excess(results), float)
    return results.seen


def test_statements_read_arms_that_are_there(claim):
    default = {arm.name for arm in claim.chosen("default")}
    read = [read_by(statement, claim) for statement in claim.statements]
    assert any(seen <= default for seen in read), "no statement is judged without --full"
    assert read_by(claim.control, claim) <= default, "the control must be part of the default"


def test_every_search_has_a_start(claim):
    for arm in claim.arms:
        start_of(arm, claim.task)
        assert arm.recipe is not None or arm.run is not None or not arm.search


def test_a_full_check_is_the_default_one_with_more_and_ends_within_hours(claim):
    seeds = reproduce.seeds_of(claim, "full")
    assert seeds == 2 * reproduce.seeds_of(claim, "default")
    steps = 0.0
    for arm in claim.arms:
        whole, usual = (task_of(claim, arm, budget) for budget in ("full", "default"))
        assert claim.full is not None or arm.task is not None or whole is usual
        assert whole.steps >= usual.steps > 0
        steps += reproduce.runs_of(arm, claim, "full") * whole.steps
    assert claim.chosen("full") == claim.arms
    assert steps < 150_000  # at a thirtieth of a second each: an hour and a quarter of a core


def test_functions_of_a_claim_can_be_found_by_a_worker(claim):
    for arm in claim.arms:
        for function in (arm.run, *arm.watch.values()):
            if function is not None:
                assert function.__qualname__ == function.__name__, "a top-level function"
                assert inspect.getsourcefile(function)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_claim_belongs_to_a_method_or_a_paper_beside_them(name):
    assert name in BESIDE or name.replace("_", "-") in registry.methods()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_claim_file_names_its_source(name):
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert "Source:" in doc


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_quick_check_takes_seconds_and_gives_no_verdict(name, tmp_path, monkeypatch):
    """From an empty cache, in CPU time, so that other load on the machine does not matter."""
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path))
    begun = time.process_time()
    (document,) = reproduce.run([name], "quick", json=True)["claims"]
    assert time.process_time() - begun < 20
    said = [document, *document["evidence"]["statements"], document["evidence"]["control"]]
    assert {part["verdict"] for part in said} == {"no verdict"}
    assert document["reason"] == "a quick check of the machinery"
