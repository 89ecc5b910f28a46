"""docs/claims.md is generated from the recorded results."""

import json
from pathlib import Path

import pytest

from eckart import claims
from eckart.report.claims import page

ROOT = Path(__file__).parents[2]
RECORDED = sorted((ROOT / "benchmarks" / "results" / "claims").glob("*.json"))


def test_the_page_of_the_claims_is_made_from_the_recorded_documents():
    documents = [json.loads(path.read_text()) for path in RECORDED]
    made = "python -m eckart.report.claims benchmarks/results/claims > docs/claims.md"
    assert (ROOT / "docs" / "claims.md").read_text() == page(documents), f"run {made}"


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_a_recorded_claim_is_one_that_is_there(path):
    document = json.loads(path.read_text())
    claim = claims.load(document["name"])
    assert document["claim"] == claim.says, "the protocol was changed: reproduce it again"
    texts = {s.text for s in claim.statements}
    assert {s["statement"] for s in document["evidence"]["statements"]} <= texts
    assert document["evidence"]["budget"] != "quick"
