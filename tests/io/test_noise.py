"""Holes in a text: how many, of which kind, where, and what they depend on."""

import numpy as np
import pytest
import torch

from eckart.errors import FileError
from eckart.io.corpora import MASK, bytes_tokenizer, train_tokenizer
from eckart.io.noise import (
    HELD_OUT,
    Noise,
    Noised,
    continued,
    masked,
    noise_for,
    partition,
    spans,
)
from eckart.io.packing import IGNORE, Shuffled, drawn, ragged

VOCAB, MASK_ID, FIRST = 1000, 7, 0


def draws(length, *key):
    return drawn(3 * length, *key).reshape(3, -1)


def holes(row: int, length: int = 200, seed: int = 0, epoch: int = 0) -> dict[str, np.ndarray]:
    ids = text(row, length)
    return masked(ids, ids == FIRST, MASK_ID, VOCAB, draws(length, seed, epoch, row))


def text(row: int, length: int) -> np.ndarray:
    """Ids from 10 on, with a special token at the front."""
    ids = 10 + (np.arange(length, dtype=np.int32) * 37 + row * 101) % 900
    ids[0] = FIRST
    return ids.astype(np.int32)


def test_fifteen_in_a_hundred_are_learnt_and_say_what_stood_there():
    for row in range(20):
        ids, found = text(row, 200), holes(row)
        learnt = found["labels"] != IGNORE
        assert learnt.sum() == round(0.15 * 199)
        assert (found["labels"][learnt] == ids[learnt]).all()
        assert (found["input_ids"][~learnt] == ids[~learnt]).all()


def test_a_special_token_is_never_hidden():
    assert all(holes(row)["labels"][0] == IGNORE for row in range(500))


def test_of_these_eighty_are_masked_ten_replaced_and_ten_left():
    kept = hidden = other = 0
    for row in range(400):
        ids, found = text(row, 200), holes(row)
        at = found["labels"] != IGNORE
        seen = found["input_ids"][at]
        hidden += (seen == MASK_ID).sum()
        kept += (seen == ids[at]).sum()
        other += ((seen != MASK_ID) & (seen != ids[at])).sum()
    total = hidden + kept + other
    # 12,000 draws: five standard deviations of a share of 0.8 are 0.018, of 0.1 are 0.014
    assert hidden / total == pytest.approx(0.8, abs=0.018)
    assert kept / total == pytest.approx(0.1, abs=0.014)
    assert other / total == pytest.approx(0.1, abs=0.014)


def test_every_place_is_as_likely():
    counts = sum((holes(row, 40)["labels"] != IGNORE).astype(int) for row in range(4000))
    # 6 of 39 in 4,000 rows: mean 615, standard deviation 23
    assert counts[0] == 0 and (abs(counts[1:] - 4000 * 6 / 39) < 5 * 23).all()


def test_holes_depend_on_seed_epoch_and_row_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one = holes(3, seed=5, epoch=2)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    np.random.seed(2)
    again = holes(3, seed=5, epoch=2)
    assert (one["labels"] == again["labels"]).all()
    assert (one["input_ids"] == again["input_ids"]).all()
    others = [
        masked(text(3, 200), text(3, 200) == FIRST, MASK_ID, VOCAB, draws(200, *key))["labels"]
        for key in ((6, 2, 3), (5, 3, 3), (5, 2, 4))
    ]
    assert all((one["labels"] != other).any() for other in others)


@pytest.mark.parametrize("length", [2, 3, 5, 17, 100, 511])
@pytest.mark.parametrize("sentinels", [1, 32])
def test_a_text_can_be_put_together_from_source_and_target(length, sentinels):
    names = list(range(5000, 5000 + sentinels))
    for row in range(20):
        ids = text(row, length)
        found = spans(ids, names, [9], draws(length, 0, 0, row))
        source, target = found["input_ids"].tolist(), found["labels"].tolist()
        assert source[-1] == target[-1] == 9 and target[0] == names[0]
        said: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token >= 5000:
                last = said.setdefault(token, [])
            else:
                last.append(token)
        whole = [t for token in source[:-1] for t in said.get(token, [token])]
        assert whole == ids.tolist()
        lost = min(max(1, round(0.15 * length)), length - 1)
        assert sum(map(len, said.values())) == lost
        assert all(len(span) >= 1 for span in said.values())
        assert len(said) == min(max(1, round(lost / 3)), sentinels, length - lost)


def test_a_partition_has_its_parts_and_its_sum():
    for row in range(50):
        sizes = partition(30, 7, draws(30, 0, 0, row)[0])
        assert len(sizes) == 7 and sum(sizes) == 30 and min(sizes) >= 1


def test_a_text_without_sentinels_is_cut_in_its_middle_half():
    places = set()
    for row in range(300):
        found = continued(text(row, 40), [9], draws(40, 0, 0, row))
        joined = [*found["input_ids"][:-1].tolist(), *found["labels"][:-1].tolist()]
        assert joined == text(row, 40).tolist()
        places.add(len(found["input_ids"]) - 1)
    assert places == set(range(10, 30))


def rows(count: int = 6) -> Noised:
    noise = Noise("masked", VOCAB, (FIRST,), MASK_ID)
    return Noised(ragged(input_ids=[text(i, 60) for i in range(count)]), noise, seed=1)


def same(a: dict, b: dict) -> bool:
    return all((np.asarray(a[key]) == np.asarray(b[key])).all() for key in a)


def test_rows_follow_the_epoch_that_the_order_is_told():
    data = rows()
    order = Shuffled(len(data), 1, data.set_epoch)
    first = list(data)
    order.set_epoch(1)
    assert not any(same(a, b) for a, b in zip(first, data, strict=True))
    order.set_epoch(0)
    assert all(same(a, b) for a, b in zip(first, data, strict=True))


def test_some_of_the_rows_keep_their_holes():
    data = rows()
    part = data.select([4, 2]).select([1])
    assert len(part) == 1 and same(part[0], data[2])


def test_a_tokenizer_says_what_can_be_done_with_it():
    texts = ["low rank is enough"] * 3
    with_mask = train_tokenizer(texts, 300, special=(MASK,))
    noise = noise_for(with_mask, "masked")
    assert noise.kind == "masked" and noise.mask == with_mask.mask_token_id
    assert noise.mask in noise.fixed
    plain = bytes_tokenizer()
    with pytest.raises(FileError, match="the tokenizer has no mask token"):
        noise_for(plain, "masked")
    assert noise_for(plain, "seq2seq").kind == "continued"
    with_sentinels = train_tokenizer(texts, 300, special=("<extra_id_0>", "<extra_id_1>"))
    found = noise_for(with_sentinels, "seq2seq")
    names = with_sentinels.convert_ids_to_tokens(list(found.sentinels))
    assert found.kind == "spans" and names == ["<extra_id_0>", "<extra_id_1>"]


def test_held_out_holes_do_not_move_with_the_seed(tmp_path, monkeypatch):
    from eckart.io.text import read

    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "d.jsonl"
    file.write_text("".join(f'{{"text": "low rank is enough {i}"}}\n' for i in range(40)))
    tokenizer = train_tokenizer(["low rank is enough"] * 3, 300, special=(MASK,))
    one, two = (read(file, tokenizer, 32, eval=0.2, task="masked", seed=s) for s in (0, 1))
    (held, other) = (d.evaluation["d"] for d in (one, two))
    assert held.epoch == HELD_OUT and len(held) == len(other) > 1
    assert all(same(a, b) for a, b in zip(held, other, strict=True))
    assert not all(same(a, b) for a, b in zip(one.train, two.train, strict=True))
    assert one.bytes_per_token == {} and one.task == "masked"
    assert "loss on 15 % of the tokens, masked" in one.summary
