"""Scores by row equal plain formulas, and intervals have their stated coverage."""

import numpy as np
import pytest
import torch

from eckart.io.packing import Collate
from eckart.jobs.measuring import intervals
from eckart.jobs.measuring.scores import joined, score
from tests import tiny


def rows_of(lengths=(5, 9, 7, 3), seed=3):
    """Rows of random tokens; the first two labels of each are ignored."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, tiny.VOCAB, (n,), generator=g).tolist() for n in lengths]
    return [{"input_ids": i, "labels": [-100, -100, *i[2:]]} for i in ids]


@torch.no_grad()
def logp(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_sums_are_those_of_each_row_alone_whatever_the_batch():
    model, rows = tiny.llama().eval(), rows_of()
    together, alone = (score(model, rows, Collate(), batch_size=n) for n in (4, 1))
    for i, row in enumerate(rows):
        p = logp(model, row["input_ids"])
        wanted = -sum(float(p[t - 1, row["input_ids"][t]]) for t in range(2, len(p)))
        # fp32 logits: errors of 1e-6 a token
        assert together.loss[i] == pytest.approx(wanted, abs=1e-4)
        assert alone.loss[i] == pytest.approx(wanted, abs=1e-4)
        assert together.count[i] == len(p) - 2
    assert (together.right == alone.right).all()


def test_drift_is_kl_from_the_other_and_nothing_from_itself():
    model, other, rows = tiny.llama().eval(), tiny.llama(seed=1).eval(), rows_of()
    found = score(model, rows, Collate(), other)
    for i, row in enumerate(rows):
        p, q = logp(model, row["input_ids"])[1:-1], logp(other, row["input_ids"])[1:-1]
        assert found.kl[i] == pytest.approx(float((q.exp() * (q - p)).sum()), abs=1e-4)
        assert found.same[i] == int((p.argmax(-1) == q.argmax(-1)).sum())
    itself = score(model, rows, Collate(), model)
    assert itself.kl.sum() == 0 and (itself.same == itself.count).all()
    assert (itself.loss == itself.other).all()


def test_a_row_is_exact_where_greedy_decoding_writes_it():
    model = tiny.llama().eval()
    prompt = [5, 9, 3]
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    other = [*out[:-1], (out[-1] + 1) % tiny.VOCAB]
    rows = [{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in (out, other)]
    found = score(model, rows, Collate())
    assert found.exact.tolist() == [1.0, 0.0]
    assert (found.count - found.right).tolist() == [0.0, 1.0]


def test_sources_join_row_by_row():
    model = tiny.llama().eval()
    parts = [score(model, rows_of(seed=s), Collate()) for s in (1, 2)]
    both = joined(parts)
    assert both.loss.sum() == pytest.approx(sum(p.loss.sum() for p in parts))
    assert len(both.kl) == 0


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        counts = rng.integers(1, 30, 100).astype(float)
        sums = counts * 2.0 + counts * rng.normal(0, 1, 100)  # tokens of a row move together
        low, high = intervals.interval(sums, counts)
        held += low <= 2.0 <= high
    # 200 binomial draws of 0.95: 3 standard deviations are 0.046
    assert 0.90 <= held / 200 <= 0.996


def test_the_interval_repeats_and_has_no_end_for_one_row():
    sums, counts = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    assert intervals.interval(sums, counts) == intervals.interval(sums, counts)
    assert np.isnan(intervals.interval(sums[:1], counts[:1])).all()
    assert intervals.interval(counts * 3, counts) == (3.0, 3.0)
