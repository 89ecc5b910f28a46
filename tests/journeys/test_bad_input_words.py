"""Mistyped keys, values, methods and job files: what is wrong, where, and what to type."""

import pytest

from tests.journeys.bad import complains, enter
from tests.journeys.runs import workplace

FILES = {
    "bad.yaml": "train: {lr: 1e-3\n  x: [",
    "list.yaml": "- a\n- b\n",
    "latin.yaml": b"model: caf\xe9\n",
    "habit.yaml": "train:\n  learning_rate: 1\n",
    "deep.yaml": "weights:\n  name: lora\n  rank: 4\n  alpha: much\n",
    "mixed.yaml": "update: galore\nweights: lora\n",
}

CASES = {
    "unknown key": (
        "finetune m d.jsonl weights.rnak=3",
        2,
        "unknown key weights.rnak     command line\n"
        "Did you mean weights.rank? All keys: eckart methods lora\n",
    ),
    "unknown key in a file": (
        "finetune m d.jsonl -c habit.yaml",
        2,
        "unknown key train.learning_rate     habit.yaml, line 2\n"
        "Here it is train.lr: type train.lr=1. All keys: eckart config schema\n",
    ),
    "unknown option": (
        "finetune m d.jsonl --learning_rate 1e-4",
        2,
        "unknown option --learning_rate     command line\n"
        "Here it is train.lr: type train.lr=1e-4.\n",
    ),
    "no whole number": (
        "finetune m d.jsonl weights.rank=three",
        2,
        "weights.rank is of the wrong type\n"
        "  weights.rank = three  command line\n"
        "  allowed               a whole number >= 1\n"
        "Leave it out for 16. All keys: eckart methods lora\n",
    ),
    "neither true nor false": (
        "finetune m d.jsonl train.best=maybe",
        2,
        "train.best is of the wrong type\n"
        "  train.best = maybe  command line\n"
        "  allowed             true or false\n"
        "Leave it out for true. All keys: eckart config schema\n",
    ),
    "wrong type in a file": (
        "finetune m d.jsonl -c deep.yaml",
        2,
        "weights.alpha is of the wrong type\n"
        "  weights.alpha = much  deep.yaml, line 4\n"
        "  allowed               a number > 0\n"
        "Leave it out for 32.0. All keys: eckart methods lora\n",
    ),
    "below the range": (
        "finetune m d.jsonl weights.rank=0",
        2,
        "weights.rank is out of range\n"
        "  weights.rank = 0  command line\n"
        "  allowed           a whole number >= 1\n"
        "Leave it out for 16. All keys: eckart methods lora\n",
    ),
    "above the range": (
        "finetune m d.jsonl data.eval=1.5",
        2,
        "data.eval is out of range\n"
        "  data.eval = 1.5  command line\n"
        "  allowed          a number >= 0 and < 1, or a list, each text\n"
        "Leave it out for 0.02. All keys: eckart config schema\n",
    ),
    "not finite": (
        "finetune m d.jsonl train.lr=.nan",
        2,
        "train.lr is out of range\n"
        "  train.lr = .nan  command line\n"
        "  allowed          a number > 0, or auto\n"
        "Leave it out for auto. All keys: eckart config schema\n",
    ),
    "unknown word": (
        "finetune m d.jsonl train.schedule=cosin",
        2,
        "no such train.schedule\n"
        "  train.schedule = cosin  command line\n"
        "  allowed                 cosine, linear, constant\n"
        "Did you mean cosine? All keys: eckart config schema\n",
    ),
    "unknown method": (
        "finetune m d.jsonl method=galor",
        2,
        "unknown method galor     command line\nDid you mean galore? All methods: eckart methods\n",
    ),
    "a method by its name elsewhere": (
        "finetune m d.jsonl method=full",
        2,
        "unknown method full     command line\nHere it is weights=dense. "
        "All methods: eckart methods\n",
    ),
    "two methods in one word": (
        "finetune m d.jsonl method=dora+lora-pro",
        2,
        "unknown method dora+lora-pro     command line\nType weights=dora update=lora-pro. "
        "All methods: eckart methods\n",
    ),
    "two methods of one axis": (
        "finetune m d.jsonl weights=lora,dora",
        2,
        "unknown method lora,dora     command line\n"
        "A run has one; to compare: eckart bench MODEL DATA --methods lora,dora. "
        "All methods: eckart methods\n",
    ),
    "ranks by name": (
        "finetune m d.jsonl 'weights.rank_pattern={q_proj: 8}'",
        2,
        "unknown key weights.rank_pattern.q_proj     command line\n"
        "Here it is weights.overrides=[{match: q_proj, rank: 8}]. "
        "All keys: eckart config schema\n",
    ),
    "a warm-up that never ends": (
        "finetune m d.jsonl train.warmup=50 train.steps=3",
        2,
        "the learning rate would never be reached\n"
        "  train.warmup = 50  steps from 0 to the rate\n"
        "  train.steps = 3    as given\n"
        "Type fewer steps of warm-up, or a share of all: train.warmup=0.03\n",
    ),
    "method on the wrong axis": (
        "finetune m d.jsonl weights=galore",
        2,
        "galore is not a choice for weights     command line\n"
        "It is one for update: type update=galore\n",
    ),
    "illegal combination": (
        "finetune m d.jsonl weights=lora update=galore",
        2,
        "these two do not combine\n"
        "  update = galore  changes whole matrices\n"
        "  weights = lora   trains no whole matrix that a rule may change\n"
        "Type weights=dense update=galore, or update=adamw.\n",
    ),
    "illegal combination in a file": (
        "finetune m d.jsonl -c mixed.yaml",
        2,
        "these two do not combine\n"
        "  update = galore  changes whole matrices\n"
        "  weights = lora   trains no whole matrix that a rule may change\n"
        "Type weights=dense update=galore, or update=adamw.\n",
    ),
    "two ways to say one thing": (
        "finetune m d.jsonl train.steps=3 train.epochs=2",
        2,
        "train.steps and train.epochs exclude each other\n"
        "  train.steps = 3   command line\n"
        "  train.epochs = 2  command line\n"
        "Leave one of them.\n",
    ),
    "rank too large everywhere": (
        "finetune m d.jsonl weights.rank=4000",
        2,
        "rank is larger than the matrix\n"
        "  weights.rank = 4000\n"
        "  model.layers.0.self_attn.q_proj  32 x 32, so at most 32 at every site\n"
        "Type weights.rank=32, or less.\n",
    ),
    "a target that is nowhere": (
        "finetune m d.jsonl weights.targets=[q_porj]",
        2,
        "no map matches a target\n"
        "  weights.targets = q_porj  matches no map of this model\n"
        + "".join(f"  attn.{x}                    2 maps\n" for x in "koqv")
        + "  embedding                 1 map\n"
        "  head                      1 map\n"
        "  mlp.down                  2 maps\n"
        "  mlp.gate                  2 maps\n"
        "  mlp.up                    2 maps\n"
        "  names                     down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, "
        "q_proj, up_proj, v_proj\n"
        "Type weights.targets=[q_proj].\n",
    ),
    "missing job file": (
        "finetune m d.jsonl -c none.yaml",
        3,
        "cannot read none.yaml\n"
        "  reason  No such file or directory\n"
        "Type -c with the path of a YAML file.\n",
    ),
    "mistyped job file": (
        "finetune m d.jsonl -c habits.yaml",
        3,
        "cannot read habits.yaml\n  reason  No such file or directory\nDid you mean habit.yaml?\n",
    ),
    "a folder for a job file": (
        "finetune m d.jsonl -c m",
        3,
        "cannot read m\n  reason  Is a directory\nType -c with the path of a YAML file.\n",
    ),
    "malformed job file": (
        "finetune m d.jsonl -c bad.yaml",
        2,
        "not valid YAML     bad.yaml, line 2\nexpected ',' or '}', but got ':'\n",
    ),
    "job file that is a list": (
        "finetune m d.jsonl -c list.yaml",
        2,
        "a job file is a tree of keys     list.yaml, line 1\nWrite key: value.\n",
    ),
    "job file in another encoding": (
        "finetune m d.jsonl -c latin.yaml",
        3,
        "latin.yaml is not UTF-8 text\n  reason  invalid continuation byte\n",
    ),
    "nothing said": (
        "finetune",
        2,
        "eckart finetune needs model and data\n"
        "Type eckart finetune MODEL DATA, or set model and data.train in a file: -c FILE\n",
    ),
    "no data said": (
        "finetune m",
        2,
        "eckart finetune needs data\n"
        "Type eckart finetune MODEL DATA, or set data.train in a file: -c FILE\n",
    ),
    "a word too many": (
        "finetune m d.jsonl e.jsonl",
        2,
        "unexpected word e.jsonl     command line\n"
        "After MODEL and DATA come key=value words; several files: data=[a.jsonl,b.jsonl]\n",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("words"), rows=12)
    for name, content in FILES.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_mistyped_word_is_answered(place, monkeypatch, case):
    enter(place, monkeypatch)
    complains(*CASES[case])


def test_the_same_stands_in_the_json_object(place, monkeypatch):
    from tests.journeys.runs import eckart

    enter(place, monkeypatch)
    ran = eckart("finetune", "m", "d.jsonl", "weights.rank=0", "--json")
    assert ran.document == {
        "command": "finetune",
        "exit": 2,
        "error": {
            "what": "weights.rank is out of range",
            "facts": [
                ["weights.rank = 0", "command line"],
                ["allowed", "a whole number >= 1"],
            ],
            "fix": "Leave it out for 16. All keys: eckart methods lora",
        },
    }
