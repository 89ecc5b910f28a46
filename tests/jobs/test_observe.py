"""What a run writes down for its page: updates, turning bases, spectra over time, samples."""

import json
from types import SimpleNamespace

import pytest
import torch

from eckart.io.models import load_model
from eckart.io.run import read_metrics
from eckart.jobs.training import change
from eckart.jobs.training.observe import Observer, overlap
from eckart.recipe import Recipe, attach, registry
from tests.journeys.runs import eckart, workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("observe"))


def trained(place, out, *words):
    ran = eckart("finetune", place / "m", place / "d.jsonl", *words, "train.steps=12",
                 "data.seq_len=24", "-o", out)  # fmt: skip
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (out / "spectra.jsonl").read_text().splitlines()]
    assert all("loss" in m or "eval_loss" in m for m in read_metrics(out)), "numbers alone"
    return ran, rows, (out / "report.html").read_text()


def test_a_projected_run_shows_how_its_bases_turn(place, tmp_path):
    words = ("weights=dense", "update=galore", "update.rank=4", "update.every=5")
    _, rows, page = trained(place, tmp_path / "r", *words)
    turned = [row for row in rows if "overlaps" in row]
    times = {}
    for row in turned:
        for name, share in row["overlaps"].items():
            times.setdefault(name, []).append(row["step"])
            assert 0 <= share <= 1 + 1e-5
    assert len(times) == 8
    for steps in times.values():  # refreshes of one matrix lie five steps apart
        assert len(steps) >= 2 and all(b - a == 5 for a, b in zip(steps, steps[1:], strict=False))
    assert "<title>Overlap of a subspace with the one before</title>" in page


def test_a_run_of_chosen_columns_shows_how_many_are_chosen_again(place, tmp_path):
    words = ("weights=dense", "update=dct-adamw", "update.rank=4", "update.every=3")
    _, rows, page = trained(place, tmp_path / "r", *words)
    shares = [share for row in rows for share in row.get("overlaps", {}).values()]
    assert shares and {round(4 * share, 6) for share in shares} <= {0, 1, 2, 3, 4}
    assert "<title>Overlap of a subspace with the one before</title>" in page


def test_full_training_shows_the_spectra_of_its_change(place, tmp_path, monkeypatch):
    out = tmp_path / "r"
    _, rows, page = trained(place, out, "weights=dense", "train.best=false", "train.save_every=6")
    seen = {row["step"]: row["spectra"] for row in rows if "spectra" in row}
    assert sorted(seen) == [2, 4, 6, 8, 10, 12] and len(seen[12]) == 14
    before, after = (load_model(folder) for folder in (place / "m", out / "final"))
    for path, values in seen[12].items():
        moved = after.get_submodule(path).weight - before.get_submodule(path).weight
        wanted = torch.linalg.svdvals(moved.detach())
        assert values == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-6)  # five digits, fp32
    assert "<title>Singular values of what was learned</title>" in page
    assert "<title>Effective rank by layer and role</title>" in page
    monkeypatch.setattr(change, "WORK", 4.0 * 32 * 32 * 32 * 8)  # not enough for all
    few = change.watched(open_handle(place / "m"))
    assert 0 < len(few) < 14 and len({site.role for site in few}) == 7
    monkeypatch.setattr(change, "WORK", 1.0)
    words = ("weights=dense", "train.steps=2", "data.seq_len=24", "-o", tmp_path / "none")
    assert eckart("finetune", place / "m", place / "d.jsonl", *words).code == 0
    assert not (tmp_path / "none" / "spectra.jsonl").exists()
    page = (tmp_path / "none" / "report.html").read_text()
    assert "Spectra of the change are left out" in page


def open_handle(folder):
    return attach(load_model(folder), Recipe(weights=registry.load(registry.FULL)()))


def test_an_adapter_shows_its_spectra_over_time_and_by_layer(place, tmp_path):
    ran, rows, page = trained(place, tmp_path / "r", "method=lora")
    seen = {row["step"]: row["spectra"] for row in rows if "spectra" in row}
    assert sorted(seen) == [2, 4, 6, 8, 10, 12] and all(len(s) == 14 for s in seen.values())
    for values in seen[12].values():
        assert values == sorted(values, reverse=True) and len(values) == 16
    for title in (
        "Effective rank",
        "Effective rank by layer and role",
        "Gradient and update norms",
    ):
        assert f"<title>{title}</title>" in page
    assert "--- before" in page and "--- after" in page
    line = next(x for x in ran.err.splitlines() if x.startswith("memory   measured"))
    facts = json.loads((tmp_path / "r" / "run.json").read_text())["memory"]
    for name in ("weights", "factors", "gradients", "state"):
        assert facts["estimated"][name] == facts["measured"][name] and f"{name} " in line


def test_the_update_is_what_the_step_moved():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    handle = SimpleNamespace(trainable=lambda: {"p": p}, attached=("p",))
    optimizer = SimpleNamespace(state={}, named=list)
    observer = Observer(None, handle, lambda: optimizer)
    args = SimpleNamespace(logging_steps=2, world_size=1)
    for step, moved in ((0, 3.0), (1, 4.0), (2, 5.0)):  # steps 1 and 2 are logged, 3 is not
        state = SimpleNamespace(global_step=step, max_steps=10)
        observer.on_pre_optimizer_step(args, state, None)
        with torch.no_grad():
            p[0, 0] += moved
        observer.on_optimizer_step(args, state, None)
        assert observer.update_norm == pytest.approx(min(moved, 4.0))


def test_an_overlap_of_indices_is_the_share_that_stays():
    old, new = torch.tensor([0, 2, 5, 7]), torch.tensor([2, 3, 7, 9])
    assert overlap(old, new, "index") == 0.5


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_overlap_is_one_for_the_same_subspace_and_none_for_another(side):
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    turned = Q[:, :3] @ torch.linalg.qr(torch.randn(3, 3))[0]
    half = torch.cat([Q[:, :1], Q[:, 3:5]], 1)

    def share(a, b):
        return overlap(*((a, b) if side == "left" else (a.mT, b.mT)), side)

    assert share(Q[:, :3], turned) == pytest.approx(1, abs=1e-5)
    assert share(Q[:, :3], Q[:, 3:6]) == pytest.approx(0, abs=1e-5)
    assert share(Q[:, :3], half) == pytest.approx(1 / 3, abs=1e-5)
