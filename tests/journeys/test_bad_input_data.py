"""Data that is missing, empty, malformed or in another encoding: named by file and line."""

import pytest

from tests.journeys.bad import complains, enter
from tests.journeys.runs import workplace

FILES = {
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "head.csv": "text\n",
    "none.json": "[]",
    "object.json": '{"text": "a"}',
    "line.jsonl": '{"text": "a b c"}\n{"text": "a b c"\n',
    "nan.jsonl": '{"text": "a b c"}\nnull\n',
    "list.jsonl": '{"text": "a b c"}\n[1]\n',
    "columns.jsonl": '{"txt": "a"}\n',
    "strange.jsonl": '{"x": "a", "y": 2}\n',
    "pairs.jsonl": '{"chosen": "a", "rejected": "b"}\n',
    "lost.jsonl": '{"text": "a b c"}\n{"txt": "x"}\n',
    "plain.jsonl": '{"text": "a b c"}\n{"text": "d e f"}\n',
    "asked-1.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "asked-2.jsonl": '{"text": "a b c"}\n',
    "classes.jsonl": '{"text": "a b c", "label": "x"}\n{"text": "b c", "label": "y"}\n',
    "number.jsonl": '{"text": "a b c"}\n{"text": 3}\n',
    "message.jsonl": '{"messages": [{"role": "user"}]}\n',
    "speaker.jsonl": '{"messages": [{"role": "usr", "content": "a"}]}\n',
    "amounts.jsonl": '{"text": "a b c", "label": 0.5}\n{"text": "b", "label": 1.5}\n',
    "asked.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}\n',
    "answer.jsonl": '{"prompt": "a", "completion": ""}\n',
    "masked.jsonl": '{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}\n',
    "ids.jsonl": '{"input_ids": [1, 2, 9999]}\n',
    "width.csv": "text,label\na,b\nc\n",
    "broken.json": '[{"text": "a"},\n{"text": ]',
    "tags.jsonl": '{"tokens": ["a", "b"], "tags": ["x"]}\n',
    "untagged.conll": "a X\nb\n",
    "latin.jsonl": b'{"text": "abc"}\n{"text": "caf\xe9"}\n',
    "latin.txt": b"line\ncaf\xe9\n",
    "what.xyz": "abc",
    "rows.pkl": b"\x80\x04]\x94.",
    "x.parquet": "not parquet",
    "x.jsonl.gz": "not gzip",
    "x.jsonl.zst": "not zst",
}
READ = ".txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, .conll, .parquet, .arrow"

CASES = {
    "missing file": (
        "finetune m lots.jsonl",
        3,
        "no such file or folder\n  lots.jsonl\nDid you mean lost.jsonl?\n",
    ),
    "missing held-out file": (
        "finetune m d.jsonl data.eval=[dd.jsonl]",
        3,
        "no such file or folder\n  dd.jsonl\nDid you mean d.jsonl?\n",
    ),
    "no hub data set without a network": (
        "finetune m nosuch",
        3,
        "this is no path here, and no data set of the hub that can be loaded\n"
        "  nosuch  Couldn't reach 'nosuch' on the Hub (OfflineModeIsEnabled)\n"
        "Type a path such as ./data.jsonl.\n",
    ),
    "a glob without files": (
        "finetune m no*such.jsonl",
        3,
        "no file matches\n  no*such.jsonl\nType a path, or another glob.\n",
    ),
    "a model for data": (
        "finetune m m",
        3,
        "this folder holds a model, no data\n"
        "  m  has config.json\n"
        "MODEL comes first, then DATA: a file, a folder of files or a glob.\n",
    ),
    "data for a model": (
        "finetune d.jsonl m",
        3,
        "this is no model\n"
        "  d.jsonl  a file\n"
        "MODEL comes first: a model's folder or hub id. Then DATA.\n",
    ),
    "a pickle for data": (
        "finetune m rows.pkl",
        3,
        f"this kind of file is not read\n  rows.pkl  .pkl\n{READ}\n",
    ),
    "a metric that is not measured": (
        "finetune m d.jsonl eval.metrics=[perplexty]",
        2,
        "no metric of this data is called perplexty\n"
        "  eval.metrics  known here: loss, perplexity, bits_per_byte\n"
        "Did you mean perplexity?\n",
    ),
    "empty file": ("finetune m empty.jsonl", 3, "the file is empty\n  empty.jsonl  0 bytes\n"),
    "blank lines": (
        "finetune m blank.jsonl",
        3,
        "the file is empty\n  blank.jsonl  blank lines only\n",
    ),
    "a header alone": (
        "finetune m head.csv",
        3,
        "the file is empty\n  head.csv  a header and no rows\n",
    ),
    "an empty list": (
        "finetune m none.json",
        3,
        "the file is empty\n  none.json  a list without rows\n",
    ),
    "an object, not a list": (
        "finetune m object.json",
        3,
        "this JSON is not a list of rows\n  object.json  dict\n",
    ),
    "a folder without data": (
        "finetune m nothing",
        3,
        "no data in this folder\n"
        f"  nothing  none of {READ}\n"
        "Type the folder that has one of them.\n",
    ),
    "malformed line": (
        "finetune m line.jsonl",
        3,
        "this line is not JSON\n  line.jsonl, line 2  column 17: Expecting ',' delimiter\n",
    ),
    "null as a row": (
        "finetune m nan.jsonl",
        3,
        'a row is not an object\n  nan.jsonl, line 2  NoneType\nEach is {"text": ...}.\n',
    ),
    "a list as a row": (
        "finetune m list.jsonl",
        3,
        'a row is not an object\n  list.jsonl, line 2  list\nEach is {"text": ...}.\n',
    ),
    "malformed JSON": (
        "finetune m broken.json",
        3,
        "this file is not JSON\n"
        "  broken.json, line 2  column 10: Expecting value\n"
        "If each line is its own object, name it broken.jsonl.\n",
    ),
    "another number of columns": (
        "finetune m width.csv",
        3,
        "a line has another number of columns\n  width.csv, line 3  not 2 as in line 1\n",
    ),
    "a mistyped column": (
        "finetune m columns.jsonl",
        3,
        "no known columns in the data\n  columns.jsonl, line 1  columns txt\nDid you mean text?\n",
    ),
    "unknown columns": (
        "finetune m strange.jsonl",
        3,
        "no known columns in the data\n"
        "  strange.jsonl, line 1  columns x, y\n"
        "Known: messages; prompt + completion; instruction + output; input_ids; text + label; "
        "tokens + tags; text.\n",
    ),
    "preference pairs": (
        "finetune m pairs.jsonl",
        2,
        "these are preference pairs, which no command trains on\n"
        "  pairs.jsonl, line 1  columns chosen and rejected\n"
        "Use TRL's DPOTrainer with eckart.attach, as examples/dpo.py does.\n",
    ),
    "a row without its column": (
        "finetune m lost.jsonl",
        3,
        "the row has no text\n  lost.jsonl, line 2  columns txt\n",
    ),
    "files of different columns": (
        "finetune m asked-*.jsonl",
        3,
        "these files have different columns\n"
        "  asked-1.jsonl, line 1  columns prompt, completion\n"
        "  asked-2.jsonl, line 1  columns text\n"
        "Type data=[asked-1.jsonl,asked-2.jsonl]: each is then read by its own columns.\n",
    ),
    "classes beside text": (
        "finetune m data=[classes.jsonl,plain.jsonl]",
        2,
        "classes and text cannot be mixed\n"
        "  classes  text + label\n"
        "  plain    text\n"
        "Type data.format=text to learn the texts alone.\n",
    ),
    "a number as text": (
        "finetune m number.jsonl",
        3,
        "text is not text\n  number.jsonl, line 2  int: 3\n",
    ),
    "a message without content": (
        "finetune m message.jsonl",
        3,
        "a message has no content\n  message.jsonl, line 1, message 1  keys role\n",
    ),
    "a mistyped speaker": (
        "finetune m speaker.jsonl",
        3,
        "a message has an unknown role\n"
        "  speaker.jsonl, line 1, message 1  role usr\n"
        "Did you mean user?\n",
    ),
    "amounts for classes": (
        "finetune m amounts.jsonl",
        3,
        "a label is a class, and this is an amount\n"
        "  amounts.jsonl, line 1  label 0.5\n"
        "Name the classes, or number them: amounts are not learnt.\n",
    ),
    "files in one word": (
        "finetune m d.jsonl,plain.jsonl",
        3,
        "this names several files\n  d.jsonl,plain.jsonl\nType data=[d.jsonl,plain.jsonl]\n",
    ),
    "a conversation without an answer": (
        "finetune m asked.jsonl",
        3,
        "nothing to learn from\n  asked.jsonl, line 1  no assistant turn; roles user\n",
    ),
    "an empty answer": (
        "finetune m answer.jsonl",
        3,
        "nothing to learn from\n  answer.jsonl, line 1  completion is empty\n",
    ),
    "every label masked": (
        "finetune m masked.jsonl",
        3,
        "nothing to learn from\n  masked.jsonl, line 1  every label is masked\n",
    ),
    "ids of another tokenizer": (
        "finetune m ids.jsonl",
        3,
        "input_ids are not ids of this tokenizer\n  ids.jsonl, line 1  0 to 256\n",
    ),
    "a tag too few": (
        "finetune m tags.jsonl",
        3,
        "tokens and tags are not as many\n  tags.jsonl, line 1  2 tokens, 1 tags\n",
    ),
    "a token without a tag": (
        "finetune m untagged.conll",
        3,
        "a line has no tag\n  untagged.conll, line 2  b\n",
    ),
    "undecodable bytes in a line": (
        "finetune m latin.jsonl",
        3,
        "this is not UTF-8\n"
        "  latin.jsonl, line 2  byte 0xe9\n"
        "Name the encoding: 'data=[{path: latin.jsonl, encoding: latin-1}]'\n",
    ),
    "undecodable bytes in a text": (
        "finetune m latin.txt",
        3,
        "this is not UTF-8\n"
        "  latin.txt, line 2  byte 0xe9\n"
        "Name the encoding: 'data=[{path: latin.txt, encoding: latin-1}]'\n",
    ),
    "unknown encoding": (
        "finetune m 'data=[{path: latin.txt, encoding: latin-one}]'",
        2,
        "no such encoding\n  latin-one  latin.txt\n",
    ),
    "unknown kind of file": (
        "finetune m what.xyz",
        3,
        f"this kind of file is not read\n  what.xyz  .xyz\n{READ}\n",
    ),
    "unknown format": (
        "finetune m d.jsonl data.format=txt",
        2,
        "unknown data.format\n  data.format = txt\nDid you mean text?\n",
    ),
    "no parquet": (
        "finetune m x.parquet",
        3,
        "this is not parquet\n"
        "  x.parquet  Parquet magic bytes not found in footer. Either the file is corrupted or "
        "this is not a parquet file.\n",
    ),
    "no gzip": (
        "finetune m x.jsonl.gz",
        3,
        "the file cannot be read\n  x.jsonl.gz  Not a gzipped file (b'no')\n",
    ),
    "no zstandard": (
        "finetune m x.jsonl.zst",
        3,
        "the file cannot be read\n"
        "  x.jsonl.zst  ZSTD decompress failed: Unknown frame descriptor\n",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("data"), rows=12)
    (folder / "nothing").mkdir()
    for name, content in FILES.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_data_that_cannot_be_read_is_named(place, monkeypatch, case):
    enter(place, monkeypatch)
    complains(*CASES[case])


def test_the_advice_for_another_encoding_works(place, monkeypatch):
    from tests.journeys.runs import eckart

    enter(place, monkeypatch)
    ran = eckart("eval", "m", "data=[{path: latin.jsonl, encoding: latin-1}]", "--json")
    assert ran.code == 0 and ran.document["rows"] == 2
