"""Data for models that tag, answer or fill in: what becomes a row and what is refused."""

import json

import pytest

from eckart.errors import FileError, UsageError
from eckart.io.corpora import MASK, bytes_tokenizer, train_tokenizer
from eckart.io.packing import IGNORE
from eckart.io.text import read

CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n# a comment\nPeter NNP B-PER\n"


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_conll_file_is_sentences_of_tokens_and_tags(tmp_path):
    (tmp_path / "d.conll").write_text(CONLL)
    data = read(tmp_path / "d.conll", bytes_tokenizer(), 32, eval=0)
    assert data.task == "tagging" and data.labels == ("B-ORG", "B-PER", "O")
    assert "2 sentences (tokens + tags); loss on the tags" in data.summary
    assert data.example == "EU«B-ORG» rejects«O»"
    first = data.train[0]
    # by bytes: the first of each token has its tag, the space belongs to the next token
    assert first["labels"] == [0, IGNORE, 2, *[IGNORE] * 7]
    assert bytes_tokenizer().decode(first["input_ids"]) == "EU rejects"


def test_the_same_rows_as_json_lines_are_the_same_data(tmp_path):
    (tmp_path / "d.conll").write_text(CONLL)
    rows = [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]
    one = read(tmp_path / "d.conll", bytes_tokenizer(), 32, eval=0)
    two = read(written(tmp_path / "d.jsonl", *rows), bytes_tokenizer(), 32, eval=0)
    assert list(one.train) == list(two.train) and one.labels == two.labels


def test_tags_keep_to_their_tokens_where_a_row_is_cut(tmp_path):
    row = {"tokens": ["abcd", "efgh"], "tags": [1, 0]}
    data = read(written(tmp_path / "d.jsonl", row), bytes_tokenizer(), 6, eval=0)
    assert data.train[0]["labels"] == [1, IGNORE, IGNORE, IGNORE, 0, IGNORE]
    assert data.labels == ("0", "1") and "1 cut off" in data.summary


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"tokens": ["a"], "tags": ["x", "y"]}, "tokens and tags are not as many"),
        ({"tokens": "a b", "tags": ["x"]}, "tokens is not a list"),
        ({"tokens": [], "tags": []}, "tokens is not a list"),
        ({"tokens": [3], "tags": ["x"]}, "a token is not text"),
    ],
)
def test_malformed_tags_are_named_by_line(tmp_path, row, what):
    good = {"tokens": ["a"], "tags": ["x"]}
    with pytest.raises(FileError, match=what) as caught:
        read(written(tmp_path / "d.jsonl", good, row), bytes_tokenizer(), 8, eval=0)
    assert "d.jsonl, line 2" in caught.value.text()


def test_a_conll_line_without_a_tag_is_named(tmp_path):
    (tmp_path / "d.conll").write_text("EU B-ORG\nrejects\n")
    with pytest.raises(FileError, match="a line has no tag") as caught:
        read(tmp_path / "d.conll", bytes_tokenizer(), 8)
    assert "d.conll, line 2  rejects" in caught.value.text()


def test_a_question_is_the_source_and_its_answer_the_target(tmp_path):
    row = {"prompt": "say it", "completion": "it"}
    tokenizer = bytes_tokenizer()
    data = read(written(tmp_path / "d.jsonl", row), tokenizer, 16, eval=0, task="seq2seq")
    (only,) = data.train
    assert only["input_ids"] == tokenizer("say it")["input_ids"]
    assert only["labels"] == [*tokenizer("it")["input_ids"], tokenizer.eos_token_id]
    assert data.example == "say it«it<|end|>»" and data.tokens == 6 + 3


def test_each_answer_of_a_conversation_is_a_row(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    tokenizer = bytes_tokenizer()
    data = read(written(tmp_path / "d.jsonl", row), tokenizer, 256, eval=0, task="seq2seq")
    first, second = data.train
    assert [tokenizer.decode(r["labels"][:-1]) for r in (first, second)] == ["b", "d"]
    given = tokenizer.decode(second["input_ids"])
    assert given.startswith("### User:\na") and "b" in given and given.endswith("### Assistant:\n")


def test_texts_are_cut_into_pieces_that_hold_something_to_find(tmp_path):
    tokenizer = train_tokenizer(["x y"], 270, special=(MASK,))
    file = written(tmp_path / "d.jsonl", {"text": "abcdefghij"}, {"text": "k"})
    data = read(file, tokenizer, 4, eval=0, task="masked")
    assert [len(row["input_ids"]) for row in data.train] == [4, 4, 2]
    assert all((row["labels"] != IGNORE).any() for row in data.train)
    assert "1 left out (nothing to learn)" in data.summary


def test_what_a_task_cannot_learn_from_is_refused(tmp_path):
    asked = written(tmp_path / "q.jsonl", {"prompt": "a", "completion": "b"})
    text = written(tmp_path / "t.jsonl", {"text": "a b c"})
    tagged = written(tmp_path / "n.jsonl", {"tokens": ["a"], "tags": ["x"]})
    tokenizer = train_tokenizer(["x y"], 270, special=(MASK,))
    with pytest.raises(UsageError, match="fills in words and does not answer"):
        read(asked, tokenizer, 8, eval=0, task="masked")
    with pytest.raises(UsageError, match="cannot be mixed here"):
        read([asked, text], tokenizer, 8, eval=0, task="seq2seq")
    with pytest.raises(UsageError, match="classes and text cannot be mixed"):
        read([tagged, text], tokenizer, 8, eval=0)


def test_holes_are_made_after_the_cache(tmp_path):
    tokenizer = train_tokenizer(["x y"], 270, special=(MASK,))
    file = written(tmp_path / "d.jsonl", {"text": "abcdefghij"})
    one, two = (read(file, tokenizer, 16, eval=0, task="masked") for _ in range(2))
    assert (one.train[0]["labels"] == two.train[0]["labels"]).all()
    one.train.set_epoch(1)
    assert (one.train[0]["labels"] != two.train[0]["labels"]).any()
