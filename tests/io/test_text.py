"""Data files are recognised, masked, split and cached; faults name file and line."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from eckart.errors import FileError, UsageError
from eckart.io.corpora import Corpus, bytes_tokenizer, pydoc_prose, stdlib_code, train_tokenizer
from eckart.io.models import load_tokenizer
from eckart.io.packing import IGNORE
from eckart.io.text import read

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks what is generated, as templates made for training do.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the reasoning of all answers but the last, as Qwen3's and DeepSeek's templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def letters():
    return bytes_tokenizer()


def with_template(template):
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer


def jsonl(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def learnt(data, tokenizer, i=0):
    """What the loss of a row is taken on, as text, with | between runs."""
    labels = data.train[i]["labels"]
    runs, run = [], []
    for label in [*labels, IGNORE]:
        if label != IGNORE:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return "|".join(runs)


def plainly(path, tokenizer, **options):
    return read(path, tokenizer, **{"seq_len": 512, "packing": False, "eval": 0, **options})


# What is learnt


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_loss_is_on_assistant_tokens_with_and_without_markers(tmp_path, template):
    tokenizer = with_template(template)
    data = plainly(jsonl(tmp_path / "c.jsonl", {"messages": CHAT}), tokenizer)
    assert learnt(data, tokenizer) == "It is 2.<|im_end|>|Yes.<|im_end|>"
    assert "«It is 2.<|im_end|>»" in data.example and data.chat_template is None


def test_what_precedes_an_answer_is_what_generation_is_given(tmp_path):
    tokenizer = with_template(CHATML)
    data = plainly(jsonl(tmp_path / "c.jsonl", {"messages": CHAT}), tokenizer)
    row = data.train[0]
    given = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
    assert row["input_ids"][:first] == given


def test_a_template_that_rewrites_earlier_turns_gives_an_example_per_answer(tmp_path):
    tokenizer = with_template(FORGETFUL)
    chat = [dict(m) for m in CHAT]
    for m in (chat[1], chat[3]):
        m["content"] = "hm</think>" + m["content"]
    data = plainly(jsonl(tmp_path / "c.jsonl", {"messages": chat}), tokenizer)
    assert len(data.train) == 2
    assert learnt(data, tokenizer, 0) == "hm</think>It is 2.<|im_end|>"
    assert learnt(data, tokenizer, 1) == "hm</think>Yes.<|im_end|>"
    assert tokenizer.decode(data.train[1]["input_ids"]).count("hm") == 1


def test_without_a_template_a_plain_one_is_named(tmp_path, letters):
    data = plainly(jsonl(tmp_path / "c.jsonl", {"messages": CHAT}), letters)
    assert learnt(data, letters) == "It is 2.<|end|>|Yes.<|end|>"
    assert "no chat template: a plain one is used" in data.summary
    letters.chat_template = data.chat_template
    again = plainly(tmp_path / "c.jsonl", letters)
    assert again.train["input_ids"] == data.train["input_ids"] and again.chat_template is None


def test_from_and_value_are_role_and_content(tmp_path):
    tokenizer = with_template(CHATML)
    spoken = {"user": "human", "assistant": "gpt"}
    turns = [{"from": spoken[m["role"]], "value": m["content"]} for m in CHAT]
    a = plainly(jsonl(tmp_path / "a.jsonl", {"conversations": turns}), tokenizer)
    b = plainly(jsonl(tmp_path / "b.jsonl", {"messages": CHAT}), tokenizer)
    assert a.train["labels"] == b.train["labels"]


def test_loss_is_on_completions(tmp_path, letters):
    data = plainly(jsonl(tmp_path / "p.jsonl", {"prompt": "1+1=", "completion": "2"}), letters)
    assert learnt(data, letters) == "2<|end|>"
    assert letters.decode(data.train[0]["input_ids"]) == "1+1=2<|end|>"


def test_instructions_become_a_turn_each(tmp_path, letters):
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    data = plainly(jsonl(tmp_path / "i.jsonl", row), letters)
    assert learnt(data, letters) == "2<|end|>"
    assert "Add.\n\n1 and 1" in letters.decode(data.train[0]["input_ids"])


def test_system_and_history_beside_an_instruction_or_a_chat_are_turns_of_it(tmp_path):
    tokenizer = with_template(CHATML)
    row = {"instruction": CHAT[2]["content"], "output": CHAT[3]["content"], "system": "Be brief."}
    row["history"] = [[CHAT[0]["content"], CHAT[1]["content"]]]
    system = {"role": "system", "content": "Be brief."}
    whole = plainly(jsonl(tmp_path / "w.jsonl", {"messages": [system, *CHAT]}), tokenizer)
    for given in (row, {"conversations": CHAT, "system": "Be brief."}):
        data = plainly(jsonl(tmp_path / "g.jsonl", given), tokenizer)
        assert data.train["labels"] == whole.train["labels"]
        assert data.train["input_ids"] == whole.train["input_ids"]
    with pytest.raises(FileError, match="history is not"):
        plainly(jsonl(tmp_path / "b.jsonl", {**row, "history": [["a"]]}), tokenizer)


def test_a_tokenizer_that_adds_a_space_keeps_the_mask(tmp_path):
    """SentencePiece-like: encoding a text's parts one by one would change the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        ["one plus one makes two"], trainers.BpeTrainer(special_tokens=["</s>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    row = {"prompt": "one plus on", "completion": "e makes two"}
    data = plainly(jsonl(tmp_path / "p.jsonl", row), tokenizer)
    assert learnt(data, tokenizer) == "one makes two</s>"
    whole = tokenizer("one plus one makes two</s>", add_special_tokens=False)["input_ids"]
    assert data.train[0]["input_ids"] == whole


def test_a_first_token_of_the_tokenizer_is_kept_and_not_learnt(tmp_path, letters):
    from tokenizers.processors import TemplateProcessing

    letters.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    (tmp_path / "a.txt").write_text("abc")
    data = plainly(tmp_path / "a.txt", letters)
    assert letters.decode(data.train[0]["input_ids"]) == "<|end|>abc<|end|>"
    assert learnt(data, letters) == "abc<|end|>"


def test_encoded_rows_are_taken_as_they_are(tmp_path, letters):
    row = {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, IGNORE]}
    data = plainly(jsonl(tmp_path / "e.jsonl", row), letters)
    assert data.train[0] == row
    with pytest.raises(FileError, match="0 to 256"):
        plainly(jsonl(tmp_path / "f.jsonl", {"input_ids": [5, 257]}), letters)


def test_classes_are_numbered_by_name(tmp_path, letters):
    found = [{"text": f"{word} film", "label": word} for word in ("good", "bad", "good")]
    data = plainly(jsonl(tmp_path / "l.jsonl", *found), letters)
    assert data.labels == ("bad", "good") and data.train["labels"] == [1, 0, 1]
    assert data.collate(list(data.train))["labels"].tolist() == [1, 0, 1]


# Files


def test_all_kinds_of_files_hold_the_same_rows(tmp_path, letters):
    found = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in found)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(found, indent=1))
    table = pa.Table.from_pylist(found)
    pa.parquet.write_table(table, tmp_path / "c.parquet")
    with pa.ipc.new_file(tmp_path / "d.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(tmp_path / "e.arrow", table.schema) as file:
        file.write_table(table)
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write(lines)
    with pa.output_stream(tmp_path / "g.jsonl.zst", compression="zstd") as file:
        file.write(lines.encode())
    (tmp_path / "h.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in found)
    )
    files = sorted(p for p in tmp_path.iterdir() if p.is_file())
    assert len(files) == 8
    ids = [plainly(file, letters).train["input_ids"] for file in files]
    assert all(i == ids[0] for i in ids)
    assert len(plainly(tmp_path, letters).train) == 40
    assert len(plainly(f"{tmp_path}/*.jsonl*", letters).train) == 15


@pytest.mark.parametrize(
    "name, content, line, words",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2", "not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xe9"}\n', "line 3", "0xe9"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2", "not an object"),
        ("a.jsonl", b'{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n', "line 2", "no compl"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "line 2", "not text"),
        ("a.jsonl", b'{"text": "x", "i": 1}\n{"txt": "y"}\n', "line 2", "no text"),
        ("a.jsonl", b'{"prompt": "x", "completion": " "}\n', "line 1", "nothing to learn"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}\n',
            "line 1",
            "no assistant",
        ),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "message 1", "no content"),
        ("a.jsonl", b'{"messages": []}\n', "line 1", "an empty list"),
        ("a.jsonl", b"\n\n", "a.jsonl", "empty"),
        ("a.jsonl", b"", "a.jsonl", "empty"),
        ("a.json", b'[{"text": "x"},\n oops]', "line 2", "not JSON"),
        ("a.txt", b"abc\nd\xff", "line 2", "0xff"),
        ("a.csv", b"text,label\nx,1\ny\n", "line 3", "not 2 as in line 1"),
        ("a.csv", b"text,label\n", "a.csv", "empty"),
        ("a.parquet", b"PAR1 no", "a.parquet", "not parquet"),
        ("a.jsonl.gz", b"no", "a.jsonl.gz", "cannot be read"),
        ("a.pdf", b"no", "a.pdf", "not read"),
    ],
)
def test_faults_name_file_and_line(tmp_path, letters, name, content, line, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as error:
        plainly(tmp_path / name, letters)
    assert str(tmp_path / name) in str(error.value)
    assert line in str(error.value) and words in str(error.value)


def test_unknown_columns_name_the_nearest_known_one(tmp_path, letters):
    with pytest.raises(FileError) as error:
        plainly(jsonl(tmp_path / "a.jsonl", {"txet": "x"}), letters)
    assert str(error.value) == (
        "no known columns in the data\n"
        f"  {tmp_path / 'a.jsonl'}, line 1  columns txet\n"
        "Did you mean text?"
    )


def test_preference_pairs_point_to_the_example(tmp_path, letters):
    with pytest.raises(UsageError, match=r"examples/dpo\.py"):
        plainly(jsonl(tmp_path / "a.jsonl", {"chosen": "x", "rejected": "y"}), letters)


def test_a_missing_file_names_its_neighbour(tmp_path, letters):
    jsonl(tmp_path / "notes.jsonl", {"text": "x"})
    with pytest.raises(FileError, match=r"Did you mean notes\.jsonl"):
        plainly(tmp_path / "note.jsonl", letters)


def test_another_encoding_can_be_named(tmp_path, letters):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(FileError, match="encoding: latin-1"):
        plainly(tmp_path / "a.txt", letters)
    data = plainly({"path": tmp_path / "a.txt", "encoding": "latin-1"}, letters)
    assert letters.decode(data.train[0]["input_ids"]) == "café<|end|>"
    (tmp_path / "b.jsonl").write_text('{"text": "café"}\n', "utf-16")
    again = plainly({"path": tmp_path / "b.jsonl", "encoding": "utf-16"}, letters)
    assert again.train["input_ids"] == data.train["input_ids"]


def test_a_glob_in_another_encoding_is_named_as_it_was_typed(tmp_path, letters):
    (tmp_path / "a.txt").write_text("cafe")
    (tmp_path / "b.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(FileError) as e:
        plainly(f"{tmp_path}/*.txt", letters)
    assert e.value.facts[0][0] == f"{tmp_path}/b.txt, line 1"
    entry = f"'data=[{{path: {tmp_path}/*.txt, encoding: latin-1}}]'"
    assert (
        e.value.fix == f"Name the encoding of all its 2 files: {entry}, or save this one as UTF-8."
    )


def test_a_template_that_refuses_says_so_with_the_line(tmp_path):
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(FileError, match=r"line 1 +roles must alternate"):
        plainly(jsonl(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)


# Lengths, splits, weights, cache


def test_long_text_is_cut_into_pieces_and_long_answers_are_cut_off(tmp_path, letters):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    data = plainly(tmp_path / "a.txt", letters, seq_len=16)
    assert "".join(letters.decode(row["input_ids"]) for row in data.train) == (
        "0123456789" * 10 + "<|end|>"
    )
    rows = [{"prompt": "p" * n, "completion": "c" * 20} for n in (4, 40)]
    data = plainly(jsonl(tmp_path / "p.jsonl", *rows), letters, seq_len=16)
    assert learnt(data, letters) == "c" * 12 and len(data.train) == 1
    assert "1 left out (nothing to learn)" in data.summary and "2 cut off" in data.summary


def test_the_split_depends_on_content_alone(tmp_path, letters):
    found = [{"text": f"row {i}"} for i in range(400)]
    data = [
        plainly(jsonl(tmp_path / f"{n}.jsonl", *order), letters, eval=0.1)
        for n, order in enumerate((found, found[::-1], found + found[:7]))
    ]
    held = [{tuple(ids) for ids in d.evaluation[str(i)]["input_ids"]} for i, d in enumerate(data)]
    assert held[0] == held[1] == held[2] and 20 < len(held[0]) < 60
    assert not held[2] & {tuple(ids) for ids in data[2].train["input_ids"]}


def test_of_two_conversations_one_is_held_out(tmp_path, letters):
    found = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(2)]
    data = plainly(jsonl(tmp_path / "a.jsonl", *found), letters, eval=0.02)
    assert len(data.train) == len(data.evaluation["a"]) == 1


def test_few_documents_give_their_last_part(tmp_path, letters):
    (tmp_path / "a.txt").write_text("".join(f"line {i:03d}\n" for i in range(100)))
    data = plainly(tmp_path / "a.txt", letters, seq_len=5000, eval=0.05)
    held = letters.decode(data.evaluation["a"][0]["input_ids"])
    assert held == "".join(f"line {i:03d}\n" for i in range(95, 100)) + "<|end|>"
    assert letters.decode(data.train[0]["input_ids"]).endswith("line 094\n<|end|>")


def test_few_short_documents_are_held_out_whole(tmp_path, letters):
    found = [{"text": f"a short line, number {i:02d}"} for i in range(20)]
    data = plainly(jsonl(tmp_path / "a.jsonl", *found), letters, eval=0.02)
    held = {letters.decode(row["input_ids"]) for row in data.evaluation["a"]}
    assert held and held < {f"{row['text']}<|end|>" for row in found}


def test_evaluation_can_be_a_file_of_its_own(tmp_path, letters):
    a = jsonl(tmp_path / "a.jsonl", {"text": "train"})
    b = jsonl(tmp_path / "b.jsonl", {"text": "test"})
    data = plainly(a, letters, eval=b)
    assert learnt(data, letters) == "rain<|end|>" and list(data.evaluation) == ["b"]
    with pytest.raises(UsageError, match=r"a share from 0 to 0\.5"):
        plainly(a, letters, eval=0.9)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_its_entropy(tmp_path, letters):
    (tmp_path / "a.txt").write_text("x" * 20_000)
    data = plainly(tmp_path / "a.txt", letters, seq_len=20_000, eval=0.5)
    # one token a byte, and one end token in 10,001: 0.01 % off 8 bits
    assert data.bits_per_byte({"a": np.log(256)})["a"] == pytest.approx(8, rel=2e-4)


def test_sources_are_mixed_by_weight_and_evaluated_apart(tmp_path, letters):
    a = jsonl(tmp_path / "a.jsonl", *({"text": f"a{i}"} for i in range(60)))
    b = jsonl(tmp_path / "b.jsonl", *({"text": f"b{i}"} for i in range(60)))
    data = plainly([a, {"path": b, "weight": 3}], letters, eval=0.1)
    texts = [letters.decode(ids)[0] for ids in data.train["input_ids"]]
    assert texts.count("b") > 2.5 * texts.count("a") and set(data.evaluation) == {"a", "b"}
    assert "weight 3" in data.summary
    again = plainly({str(a): 1, str(b): 3}, letters, eval=0.1)
    assert again.train["input_ids"] == data.train["input_ids"] and again.sha256 == data.sha256
    with pytest.raises(UsageError, match="Did you mean weight"):
        plainly({"path": a, "wieght": 3}, letters)


def test_a_second_reading_comes_from_the_cache_and_is_the_same(tmp_path, letters, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", *({"messages": CHAT} for _ in range(9)))
    first = read(path, letters, 64, eval=0.2)
    from eckart.io import text

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(text, "encode", never)
    second = read(path, letters, 64, eval=0.2)
    for name in ("summary", "example", "sha256", "tokens", "bytes_per_token", "chat_template"):
        assert getattr(first, name) == getattr(second, name)
    assert first.train["labels"] == second.train["labels"]
    with pytest.raises(AssertionError, match="read again"):
        read(path, letters, 65, eval=0.2)
    path.write_text(path.read_text() + json.dumps({"messages": CHAT[:2]}) + "\n")
    with pytest.raises(AssertionError, match="read again"):
        read(path, letters, 64, eval=0.2)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, letters, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "file"))
    assert len(read(jsonl(tmp_path / "a.jsonl", {"text": "abc"}), letters, 8).train) == 1


# Corpora and tokenizers


def test_the_standard_library_is_read_in_a_fixed_order():
    code = stdlib_code()
    names = [name for name, _ in code.documents]
    assert names == sorted(names) and "argparse.py" in names
    assert not {"test", "tests", "pydoc_data"} & {part for n in names for part in n.split("/")}
    assert code.bytes > 5_000_000 and code.sha256 == stdlib_code().sha256
    kept, held = code.split(0.05)
    assert 0.02 < len(held.documents) / len(names) < 0.1
    assert not {n for n, _ in kept.documents} & {n for n, _ in held.documents}


def test_prose_can_be_named_as_data(letters):
    data = read("pydoc-prose", letters, 256, eval=0.05, cache=False)
    assert data.sha256 != "" and data.hashes == {"pydoc-prose": pydoc_prose().sha256}
    assert len(data.train) > 1000 and "79 documents" in data.summary


@pytest.mark.parametrize("make", [lambda: bytes_tokenizer(), lambda: train_tokenizer(["a b"], 300)])
def test_tokenizers_give_any_text_back_also_from_disk(tmp_path, make):
    tokenizer = make()
    text = "héllo\n\t 12  £\u2028 日本 x_y"
    tokenizer.save_pretrained(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and again(text)["input_ids"] == ids
    assert again.eos_token == again.pad_token == "<|end|>"


def test_a_trained_tokenizer_has_the_size_asked_for_and_can_split_digits():
    texts = [text for _, text in pydoc_prose().documents[:20]] + ["1234 " * 500]
    assert len(train_tokenizer(texts, 600)) == 600
    split = train_tokenizer(texts, 600, split_digits=True)
    whole = train_tokenizer(texts, 600)
    assert len(split("1234")["input_ids"]) == 4 > len(whole("1234")["input_ids"])


def test_a_corpus_of_ones_own_is_data(letters):
    data = plainly(Corpus("mine", (("one", "abc"),)), letters)
    assert learnt(data, letters) == "bc<|end|>" and list(data.hashes) == ["mine"]
