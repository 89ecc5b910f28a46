"""`eckart bench` from command line to result files, on a model of a few thousand parameters."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset

from eckart.errors import Interrupted, MissingExtra, OutOfRoom, UsageError
from eckart.io.data import Data
from eckart.jobs import bench, runs
from eckart.jobs.lab import candidates, lengths, matching, runner, tables
from eckart.jobs.lab.candidates import parse_candidate, parse_candidates
from eckart.jobs.lab.cluster import require_reachable
from eckart.jobs.settings.config import resolve
from eckart.jobs.settings.job import Flags
from eckart.recipe import attach
from tests.journeys.runs import model_folder
from tests.tiny import SHAPE

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"]
SMALL = ["train.steps=3", "train.batch_size=4", "data.seq_len=16", "data.eval=0.2"]
OPTIONS = {"window": 3, "purse": 3, "choose": 1, "seeds": 3}
TIMELESS = ("results.jsonl", "bench.json", "table.csv")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model configuration, a text and a cache."""
    folder = tmp_path_factory.mktemp("bench")
    shape = {**SHAPE, "model_type": "llama", "vocab_size": 280, "num_key_value_heads": 2}
    (folder / "shape.json").write_text(json.dumps({**shape, "num_hidden_layers": 1}))
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=30)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def own_cache(place, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(place / "cache"))


def job(place, methods, out=None, words=(), resume=None, **options):
    return resolve(
        "bench",
        None if resume else str(place / "shape.json"),
        None if resume else str(place / "text.txt"),
        [] if resume else [*SMALL, *words],
        flags=Flags(out=str(out) if out else None, json=True, resume=resume),
        options={"methods": methods, **OPTIONS, **options} if methods else {},
    )


def files(folder):
    return {name: (folder / name).read_bytes() for name in TIMELESS}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The result of an uninterrupted bench."""
    import os

    os.environ["ECKART_CACHE"] = str(place / "cache")
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, bench.run(job(place, "dense+galore:rank=2", out))


def test_a_bench_ends_with_a_table_a_page_and_what_they_say(whole):
    out, document = whole
    assert document["baseline"] == "dense"
    names = [row["name"] for row in document["methods"]]
    assert names == ["dense", "dense+galore:rank=2"]
    for row in document["methods"]:
        assert len(row["test"]["loss"]["values"]) == 3 and row["trials"] == 6
        assert list(row["test"]) == ["loss"]  # a perplexity would say nothing more
        assert set(row["costs"]) >= {"steps", "tokens", "seconds", "peak_bytes"}
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert (out / "table.csv").read_text().splitlines()[1].startswith("dense,baseline,")
    assert json.loads((out / "run.json").read_text())["exit"] == 0
    assert runs.described(out)["recipe"] == "dense+galore:rank=2"
    assert document["methods"][0]["verdict"] == "baseline"
    assert document["held_fixed"]["matched"] == "nothing: each method at its own size"
    assert document["repeat"].endswith(
        "--methods dense+galore:rank=2 --window 3 --purse 3 --choose 1 --seeds 3 "
        "data.eval=0.2 data.seq_len=16 train.batch_size=4 train.steps=3"
    )


def test_both_saw_the_same_batches_and_started_from_the_same_values(place):
    a, b = parse_candidates("dense+galore:rank=2", job(place, "dense+galore"))
    first, second = (candidates.UserLab(c.job, 3, 1e-3, 5, 4) for c in (a, b))
    for step in (0, 7, 40):  # across the end of an epoch
        assert first.batch(step)["input_ids"].equal(second.batch(step)["input_ids"])
    for p, q in zip(first.model().parameters(), second.model().parameters(), strict=True):
        assert p.equal(q)
    other = candidates.UserLab(a.job, 4, 1e-3, 5, 4)
    assert not first.batch(0)["input_ids"].equal(other.batch(0)["input_ids"])


def test_the_rate_is_chosen_without_the_test_rows(place, monkeypatch, tmp_path):
    """Changed metrics on the test rows do not change the chosen learning rates."""
    plain = bench.run(job(place, "dense+galore:rank=2", tmp_path / "a"))
    true = candidates.UserLab.evaluate

    def spoiled(self, model):
        found = true(self, model)
        return {**found, "loss": found["loss"] + random.random()}

    monkeypatch.setattr(candidates.UserLab, "evaluate", spoiled)
    other = bench.run(job(place, "dense+galore:rank=2", tmp_path / "b"))
    rates = [[(r["lr"], r["lr_curve"]) for r in d["methods"]] for d in (plain, other)]
    assert rates[0] == rates[1]
    assert plain["methods"][1]["test"] != other["methods"][1]["test"]


@pytest.mark.parametrize("count", [4, 5, 17, 60, 244])
def test_both_halves_of_what_is_held_out_are_of_the_whole_file(count):
    parts = candidates.split({"a": Dataset.from_dict({"place": range(count)})})
    one, other = (part["a"]["place"] for part in parts)
    assert sorted([*one, *other]) == list(range(count))
    assert abs(len(one) - len(other)) <= -(-count // candidates.TURNS)
    # drift along the file is the same in both: their middles are a turn apart, not half a file
    assert abs(sum(one) / len(one) - sum(other) / len(other)) <= -(-count // candidates.TURNS)


def test_an_interrupted_bench_ends_with_the_same_bytes(place, whole, tmp_path, monkeypatch):
    out, true = tmp_path / "out", runner.execute
    left = [4]

    def stopping(trial):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return true(trial)

    monkeypatch.setattr(runner, "execute", stopping)
    with pytest.raises(Interrupted, match="what has ended is kept") as stopped:
        bench.run(job(place, "dense+galore:rank=2", out))
    assert stopped.value.fix == f"Go on: eckart bench --resume {out}"
    assert json.loads((out / "run.json").read_text())["exit"] == 130
    before = {p: p.stat().st_mtime_ns for p in (out / "trials").iterdir()}
    assert len(before) == 4
    monkeypatch.setattr(runner, "execute", true)
    bench.run(job(place, None, resume=str(out)))
    assert files(out) == files(whole[0])
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_what_was_run_on_other_rows_is_run_again(place, tmp_path):
    out, few = tmp_path / "out", {"window": 1, "purse": 1, "seeds": 2}
    bench.run(job(place, "dense+galore:rank=2", out, **few))
    kept = set((out / "trials").iterdir())
    flags = Flags(json=True, resume=str(out))
    bench.run(resolve("bench", None, None, ["data.eval=0.4"], flags=flags, options={}))
    assert kept < (both := set((out / "trials").iterdir())) and len(both) == 2 * len(kept)


@pytest.mark.slow
def test_a_bench_killed_at_random_moments_ends_with_the_same_bytes(place, whole, tmp_path):
    out, draw = tmp_path / "out", random.Random(1)
    words = [
        sys.executable, "-m", "eckart", "bench", str(place / "shape.json"),
        str(place / "text.txt"), *SMALL, "--methods", "dense+galore:rank=2", "--window", "3",
        "--purse", "3", "--choose", "1", "--seeds", "3",
    ]  # fmt: skip
    first, killed = [*words, "-o", str(out)], 0
    again = [*words[:4], "--resume", str(out)]
    while True:
        process = subprocess.Popen(again if (out / "config.yaml").exists() else first)
        trials = len(list((out / "trials").glob("*.json"))) if out.exists() else 0
        while process.poll() is None and killed < 4:
            time.sleep(0.05)
            done = len(list((out / "trials").glob("*.json"))) if out.exists() else 0
            if done > trials + draw.randint(0, 2):
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
        if process.wait() == 0:
            break
        assert killed <= 4
    assert killed >= 2 and files(out) == files(whole[0])


@pytest.mark.slow
def test_a_sampler_spends_the_whole_purse_and_repeats(place, tmp_path):
    options = {"sampler": "tpe", "purse": 4}
    one, two = (
        bench.run(job(place, "dense+galore:rank=2", tmp_path / name, **options)) for name in "ab"
    )
    assert [row["lr_curve"] for row in one["methods"]] == [r["lr_curve"] for r in two["methods"]]
    for row in one["methods"]:
        assert len(row["lr_curve"]) == 4
        start = row["default_lr"]
        assert all(start / 101 < point["lr"] < start * 101 for point in row["lr_curve"])


@pytest.mark.cluster
def test_a_local_ray_tune_gives_the_same_bytes_and_goes_on(
    place, whole, tmp_path, monkeypatch, capfd
):
    import ray

    out, true = tmp_path / "out", runner.keep
    capfd.readouterr()
    left = [4]

    def stopping(trial, quantities):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        true(trial, quantities)

    monkeypatch.setattr(runner, "keep", stopping)
    with pytest.raises(Interrupted):
        bench.run(job(place, "dense+galore:rank=2", out, ray=True))
    assert not ray.is_initialized()  # no worker holds a core that the next round needs
    assert len(list((out / "trials").iterdir())) == 4
    monkeypatch.setattr(runner, "keep", true)
    bench.run(job(place, None, resume=str(out)))
    assert not ray.is_initialized() and not capfd.readouterr().out  # stdout is the document's
    assert files(out) == files(whole[0])
    reported = [
        json.loads(line)
        for file in (out / "ray").glob("*/*/result.json")
        for line in file.read_text().splitlines()
    ]
    ended = {row["config"]["file"] for row in reported if "numbers" in row}
    kept = {path.name for path in (out / "trials").iterdir()}
    assert ended <= kept and len(ended) >= len(kept) - 4  # the interrupted round wrote no more
    assert any(path.name.startswith("dense+galore") for path in (out / "ray").glob("*/*"))


def test_without_ray_the_extra_is_named_and_the_code_is_six(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra) as e:
        bench.run(job(place, "dense+galore:rank=2", tmp_path / "out", ray=True))
    assert e.value.exit_code == 6
    assert e.value.text().startswith("--ray needs ray\n") and "eckart[sweeps]" in e.value.text()


def test_a_cluster_that_is_not_there_is_named_at_once():
    with pytest.raises(UsageError, match="no Ray cluster answers") as e:
        require_reachable("ray://127.0.0.1:1")
    assert e.value.facts[0][0] == "RAY_ADDRESS = ray://127.0.0.1:1"
    require_reachable("")  # a local one


def test_paths_that_were_typed_hold_in_any_folder(place, monkeypatch):
    monkeypatch.chdir(place)
    given = resolve("bench", "shape.json", "*.txt", ["data.eval=[text.txt]"])
    found = candidates.with_absolute_paths(given)
    (source,) = found.data.train
    assert found.model == str(place / "shape.json") and source.path == str(place / "*.txt")
    assert found.data.eval == (str(place / "text.txt"),)
    hub = resolve("bench", "some/model", "some/data", [])
    assert candidates.with_absolute_paths(hub) == hub


# --- who takes part ------------------------------------------------------------------------


def names(place, text):
    return [c.name for c in parse_candidates(text, job(place, text))]


def test_the_baseline_is_always_there_and_nobody_twice(place):
    assert names(place, "lowrank") == ["dense", "lowrank"]
    assert names(place, "lowrank,dense,lowrank") == ["dense", "lowrank"]
    with pytest.raises(UsageError, match="two methods are the same recipe"):
        names(place, "dense+adamw")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lowrnk", "unknown method lowrnk     --methods"),
        ("lora+dora", "two choices for one axis     --methods"),
        ("lora:rnak=3", "unknown key weights.rnak     --methods lora:rnak=3"),
        ("lora:rank=0", "weights.rank"),
        ("lora+galore", "these two do not combine"),
        ("svd", "svd trains nothing     --methods"),
        (" , ", "nothing to compare     --methods"),
    ],
)
def test_what_cannot_take_part_is_refused_before_anything_is_read(place, text, what):
    with pytest.raises(UsageError) as e:
        names(place, text)
    assert what in e.value.text()


def test_fields_of_all_candidates_at_once_are_refused(place):
    with pytest.raises(UsageError) as e:
        bench.run(job(place, "lowrank", words=["train.lr=1e-3"]))
    assert e.value.what == "every method has its own choices"


def test_a_purse_pays_for_the_first_rates_at_least(place):
    with pytest.raises(UsageError, match="--purse is smaller than --window") as e:
        bench.run(job(place, "lowrank", window=5, purse=3))
    assert e.value.fix == "Type --window 3, or a larger purse."


def test_too_few_held_out_rows_are_refused(place, tmp_path):
    with pytest.raises(UsageError) as e:
        bench.run(job(place, "lowrank", tmp_path / "out", words=["data.eval=0"]))
    assert e.value.what == "too few rows are held out"


def test_pictures_have_no_tokens_to_spend(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Data, "tokens_in_a_row", 0.0)
    base = job(place, "lowrank")
    with pytest.raises(UsageError, match="this data has no tokens"):
        lengths.plan(base, parse_candidates("lowrank", base), "tokens=640", tmp_path / "t.json")


def test_a_length_can_be_said_in_four_ways(place, tmp_path):
    base = job(place, "lowrank")
    entered = parse_candidates("lowrank", base)
    by = {
        text: lengths.plan(base, entered, text, tmp_path / f"{text[:3]}.json")
        for text in ("", "steps=7", "tokens=640", "seconds=0.5", "bytes=3MB")
    }
    assert by[""]["dense"] == lengths.Length(3, 4)
    assert by["steps=7"]["lowrank"] == lengths.Length(7, 4)
    seen = 4 * candidates.workload(base).data.tokens_in_a_row  # 4 rows of 16, less what is padded
    assert by["tokens=640"]["dense"] == lengths.Length(round(640 / seen), 4) and seen <= 64
    assert all(length.steps >= 1 for length in by["seconds=0.5"].values())
    for name, length in by["bytes=3MB"].items():
        assert length.rows & (length.rows - 1) == 0 and length.steps * length.rows >= 8, name
    again = lengths.plan(base, entered, "seconds=0.5", tmp_path / "sec.json")
    assert again == by["seconds=0.5"]
    with pytest.raises(OutOfRoom):
        lengths.plan(base, entered, "bytes=1kB", tmp_path / "no.json")
    with pytest.raises(UsageError, match="cannot read --budget hours=3"):
        lengths.plan(base, entered, "hours=3", tmp_path / "no.json")


def test_as_many_runs_at_once_as_the_peak_of_the_largest_allows(place, monkeypatch):
    base = job(place, "lowrank")
    entered = parse_candidates("lowrank", base)
    planned = {c.name: lengths.Length(3, 4) for c in entered}
    dense = lengths.peak_of(entered[0], 4)
    assert lengths.peak_of(entered[0], 64) > 4 * dense > 0  # activations are in it
    each = lengths.PROCESS_BYTES + dense
    monkeypatch.setattr(lengths.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(lengths, "room", lambda place: (int(2.9 * each), 0))
    found = lengths.concurrency(4, entered, planned)
    assert found.count == 2 and " each, 2.0" in found.reason and found.reason.endswith("8 cores")
    assert lengths.concurrency(2, entered, planned) == lengths.Concurrency(2)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("dora", range(1, 8)), ("nola", range(1, 200)), ("lora+lora-pro", range(1, 8))],
)
def test_trained_parameters_are_matched_by_each_methods_own_size(place, name, sizes):
    base = job(place, "lora:rank=3")
    plain = parse_candidate("lora:rank=3", base)
    _, found = matching.matched([plain, parse_candidate(name, base)], "parameters", rows=4)
    field = "bases" if name == "nola" else "rank"
    first, *others = name.split("+")
    typed = {k: "+".join([f"{first}:{field}={k}", *others]) for k in sizes}
    counts = {k: trained_in(parse_candidate(typed[k], base)) for k in sizes}
    target = trained_in(plain)
    assert found.name == typed[min(counts, key=lambda k: abs(counts[k] - target))]


def trained_in(c):
    """Trained parameters, counted on the model and not by the method's cost formula."""
    handle = attach(candidates.workload(c.job).model, c.recipe, steps=5)
    try:
        return sum(p.numel() for p in handle.trainable().values())
    finally:
        handle.remove()


def test_bytes_are_matched_by_the_rank_of_the_update_where_the_weights_have_none(place):
    base = job(place, "dense+galore")
    names = ("dense+galore:rank=3", "dense+fira", "dense+galore:rank=7", "dense+muon")
    plain, fira, typed, muon = (parse_candidate(name, base) for name in names)
    _, found, same, left = matching.matched([plain, fira, typed, muon], "memory", rows=4)
    bytes_at = {k: rank_bytes(f"dense+fira:rank={k}", base) for k in range(1, 9)}
    target = rank_bytes("dense+galore:rank=3", base)
    nearest = min(bytes_at, key=lambda k: abs(bytes_at[k] - target))
    assert found.name == f"dense+fira:rank={nearest}"
    assert (same, left) == (typed, muon)  # a rank that was typed stays; Muon has none


def rank_bytes(name, base):
    return lengths.bytes_of(parse_candidate(name, base), 4)


@pytest.mark.parametrize("target", [0, 1, 7, 8, 29, 30, 1000])
@pytest.mark.parametrize("of", [lambda k: 3 * k, lambda k: 90 - 3 * k, lambda k: 3 * min(k, 9)])
def test_the_nearest_size_is_found_whether_it_rises_or_falls(of, target):
    found = matching.nearest(of, target, most=30)
    assert abs(of(found) - target) == min(abs(of(k) - target) for k in range(1, 31))


def test_what_was_made_equal_is_said_with_those_that_were_not():
    reached = {"lora": 1000, "bone:rank=29": 960, "dense+fira": 9000}
    assert matching.outcome("none", reached) == "nothing: each method at its own size"
    assert (
        matching.outcome("memory", reached) == "peak bytes, by each method's size; not dense+fira"
    )
    del reached["dense+fira"]
    assert matching.outcome("parameters", reached) == "trained parameters, by each method's size"


def test_memory_is_not_made_equal_twice(place):
    with pytest.raises(UsageError, match="memory is made equal twice"):
        bench.run(job(place, "lowrank", match="memory", budget="bytes=3MB"))


# --- metrics -------------------------------------------------------------------------------


def of_classes(folder, metric):
    """A bench on sentences of two classes."""
    draw, model, data = random.Random(0), model_folder(folder / "m"), folder / "c.jsonl"
    texts = [" ".join(draw.choices(WORDS, k=6)) for _ in range(60)]
    rows = [{"text": text, "label": ["no", "yes"]["cat" in text]} for text in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"methods": "dora", "window": 1, "purse": 1, "choose": 1, "seeds": 3}
    return resolve(
        "bench", str(model), str(data), [*SMALL[:3], "data.eval=0.4"],
        flags=Flags(out=str(folder / "out"), json=True), options={**options, "metric": metric},
    )  # fmt: skip


def test_of_classes_it_is_told_how_often_they_are_right(tmp_path):
    document = bench.run(of_classes(tmp_path, "accuracy"))
    assert set(document["untouched"]) == {"accuracy", "loss"}
    for row in document["methods"]:
        assert list(row["test"]) == ["accuracy", "loss"] == list(row["differences"])
        shares = [*row["test"]["accuracy"]["values"], *row["lr_curve"][0]["values"]]
        count = int(document["held_fixed"]["test rows"])
        for share in shares:  # chosen by it, and judged by it
            assert 0 <= share <= 1 and share * count == pytest.approx(
                round(share * count), abs=0.01
            )
    head, *_ = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert head.endswith("metric,loss,loss_low,loss_high,loss_difference,loss_difference_low,"
                         "loss_difference_high")  # fmt: skip
    text = tables.as_text(document)
    assert "test accuracy" in text and "loss [95 %]" in text
    assert "Test accuracy by seed" in (tmp_path / "out" / "report.html").read_text()
    assert "--metric accuracy" in document["repeat"]


def test_a_metric_that_the_data_does_not_have_is_refused(tmp_path):
    with pytest.raises(UsageError) as e:
        bench.run(of_classes(tmp_path, "acuracy"))
    assert e.value.text() == (
        "no metric of this data is called acuracy\n"
        "  --metric acuracy  known here: loss, accuracy\n"
        "Did you mean accuracy?"
    )
