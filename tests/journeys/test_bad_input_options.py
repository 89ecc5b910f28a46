"""Options, words out of place and keys of other commands: each is answered, at every command."""

import pytest

from tests.journeys.adapters import adapter
from tests.journeys.bad import complains, enter
from tests.journeys.runs import eckart, workplace

CASES = {
    "a command that is none": (
        "finetun m d.jsonl",
        "unknown command finetun     command line\n"
        "Did you mean eckart finetune? All commands: eckart --help\n",
    ),
    "a command of other tools": (
        "merge runs/0001",
        "unknown command merge     command line\n"
        "Here it is eckart convert RUN --to dense -o FOLDER. All commands: eckart --help\n",
    ),
    "a command below config": (
        "config shw",
        "unknown command shw     command line\n"
        "Did you mean eckart config show? All commands: eckart config --help\n",
    ),
    "a command to show": (
        "config show finetun m d.jsonl",
        "unknown command finetun     command line\nDid you mean finetune?\n",
    ),
    "a command to estimate": (
        "estimate finetun m d.jsonl",
        "unknown command finetun     command line\nDid you mean finetune?\n",
    ),
    "a command without an estimate": (
        "estimate eval m d.jsonl",
        "eckart estimate does not know eval\nChoices: finetune, pretrain, compress.\n",
    ),
    "a mistyped option": (
        "eval m d.jsonl --again m",
        "unknown option --again     command line\nDid you mean --against?\n",
    ),
    "a word as an option": (
        "finetune --model m --data d.jsonl",
        "unknown option --model     command line\nDid you mean model=m?\n",
    ),
    "an option of a command without words": (
        "demo --steps 3",
        "unknown option --steps     command line\nAll options: eckart demo --help\n",
    ),
    "a mistyped option of no job": (
        "doctor --jsn",
        "unknown option --jsn     command line\n"
        "Did you mean --json? All options: eckart doctor --help\n",
    ),
    "an option without its value": (
        "finetune m d.jsonl -o",
        "-o needs a value     command line\nType -o FOLDER. All options: eckart finetune --help\n",
    ),
    "an option of the wrong type": (
        "finetune m d.jsonl --seed abc",
        "--seed is of the wrong type\n"
        "  --seed abc  command line\n"
        "  allowed     a whole number\n"
        "Leave it out for the default. All options: eckart finetune --help\n",
    ),
    "a word too many": (
        "runs . more",
        "unexpected word more     command line\nWhat it takes: eckart runs --help\n",
    ),
    "a word that is missing": (
        "config import",
        "eckart config import needs FILE\nType eckart config import FILE\n",
    ),
    "a source that is missing": (
        "convert --to dense",
        "eckart convert needs a source\nType eckart convert SOURCE --to FORM\n",
    ),
    "data where none is read": (
        "generate m d.jsonl -p x",
        "unexpected word d.jsonl     command line\nAfter MODEL come key=value words and options.\n",
    ),
    "a job file without -c": (
        "config validate job.yaml",
        "job.yaml is a job file, not MODEL or DATA     command line\nType -c job.yaml\n",
    ),
    "an empty word": (
        "finetune m ''",
        "DATA is empty     command line\n"
        "Type a path or a hub id; perhaps a variable of the shell is not set.\n",
    ),
    "a key without a value": (
        "finetune m d.jsonl train.lr",
        "train.lr has no value     command line\nType train.lr=VALUE\n",
    ),
    "a key of another command": (
        "finetune m d.jsonl compress.keep=0.5",
        "eckart finetune does not read compress.keep     command line\n"
        "  compress.keep = 0.5    a key of compress\n"
        "  eckart finetune reads  model, data, out, track, weights, update, precision, attention, "
        "objective, train, eval\n"
        "Leave it out.\n",
    ),
    "a key of trainings to measure by": (
        "eval m d.jsonl train.batch_size=2 train.steps=3",
        "eckart eval does not read train.steps     command line\n"
        "  train.steps = 3    a key of finetune, pretrain, compress, bench\n"
        "  eckart eval reads  model, data, precision, eval.metrics, train.batch_size, train.seed\n"
        "Leave it out.\n",
    ),
    "a key of trainings to write by": (
        "generate m train.seed=1 data.seq_len=9 -p x",
        "eckart generate does not read data.seq_len     command line\n"
        "  data.seq_len = 9       a key of finetune, pretrain, compress, bench, eval\n"
        "  eckart generate reads  model, train.seed\n"
        "Leave it out.\n",
    ),
    "a key of a training's course for a comparison": (
        "bench m d.jsonl --methods dora train.patience=2",
        "eckart bench does not read train.patience     command line\n"
        "  train.patience = 2  a key of finetune, pretrain, compress\n"
        "  eckart bench reads  model, data, out, eval.metrics, train.steps, train.epochs, "
        "train.batch_size, train.accumulate, train.schedule, train.warmup, train.clip, train.seed\n"
        "Leave it out.\n",
    ),
    "a way of training for what is left of a model": (
        "compress m d.jsonl heal.steps=3 heal.weights=lora",
        "a compression is healed as it is\n"
        "  heal.weights = lora  would be a term on top\n"
        "Leave it out: what is left of each matrix is trained.\n",
    ),
    "a key of this command, mistyped": (
        "convert m --to dense rnak=3",
        "unknown key rnak     command line\nDid you mean rank? All keys: eckart config schema\n",
    ),
    "a method that does not compress": (
        "compress m method=lora",
        "lora trains and does not compress     command line\n"
        "  compressions  svd\n"
        "For a training afterwards type heal.steps=100.\n",
    ),
    "a shape to compress": (
        "compress llama-tiny keep=0.5",
        "this is a shape without weights\n"
        "  llama-tiny  preset\n"
        "Train it first: eckart pretrain llama-tiny DATA\n",
    ),
    "a rank too large to compress": (
        "compress m rank=9999",
        "rank is larger than the matrix\n"
        "  compress.rank = 9999\n"
        "  model.layers.0.self_attn.q_proj  32 x 32, so at most 32 at every site\n"
        "Type compress.rank=32, or less.\n",
    ),
    "rows longer than the context": (
        "finetune m d.jsonl data.seq_len=100000",
        "data.seq_len is longer than the model reads\n"
        "  data.seq_len = 100000  at most 48 tokens\n"
        "Type data.seq_len=48, or leave it out.\n",
    ),
    "no targets": (
        "finetune m d.jsonl weights.targets=[]",
        "weights.targets is empty\n"
        "Leave it out for weights.targets=[linear], or name a role: [attn.q,attn.v].\n",
    ),
    "a target that is no pattern": (
        "finetune m d.jsonl weights.targets=re:(",
        "this is no regular expression\n"
        "  weights.targets = re:(  missing ), unterminated subpattern at position 0\n"
        "Type for example weights.targets=['re:layers\\.[01]\\.'].\n",
    ),
    "nothing to write": (
        "generate m -p x -n 0",
        "-n is out of range\n"
        "  -n 0     command line\n"
        "  allowed  a whole number >= 1\n"
        "Leave it out for the default. All options: eckart generate --help\n",
    ),
    "a temperature below zero": (
        "generate m -p x -t -1",
        "-t is out of range\n"
        "  -t -1.0  command line\n"
        "  allowed  a number >= 0\n"
        "Leave it out for the default. All options: eckart generate --help\n",
    ),
    "an empty prompt": (
        "generate m -p ''",
        "the prompt has no token\n  -p ''\nType -p TEXT.\n",
    ),
    "a model as an adapter": (
        "generate m -p x --adapter a=m",
        "this is no adapter\n  m  a model\nLet it write by itself: eckart generate m -p TEXT\n",
    ),
    "two adapters of one name": (
        "generate m -p x --adapter a=peft --adapter a=peft",
        "two adapters have one name\n"
        "  --adapter a=peft  command line\n"
        "Give each a name of its own.\n",
    ),
    "a picture of another kind": (
        "inspect m -o layers.jpg",
        "cannot draw layers.jpg\n  -o  ends in neither .html nor .svg\nType -o layers.html\n",
    ),
    "a size without a unit": (
        "estimate finetune m --fit 24",
        "24 has no unit\nType 24GB or 24MB.\n",
    ),
    "too few seeds": (
        "bench m d.jsonl --methods dora --seeds 0",
        "--seeds is too small\n  --seeds 0  at least 2\nLeave it out for 5.\n",
    ),
    "quick and full": (
        "reproduce lora --quick --full",
        "--quick and --full exclude each other     command line\nLeave one.\n",
    ),
    "no process at all": (
        "reproduce lora --processes 0",
        "--processes is too small\n"
        "  --processes 0  at least 1\n"
        "Leave it out for two, where there are two cores.\n",
    ),
}
MISSING = {  # what ends with 3
    "an adapter that is not there": (
        "generate m -p x --adapter a=pef",
        "no such file or folder\n  pef\nDid you mean peft?\n",
    ),
    "data of an estimate": (
        "estimate finetune m dd.jsonl",
        "no such file or folder\n  dd.jsonl\nDid you mean d.jsonl?\n",
    ),
    "a file for a folder of runs": (
        "runs d.jsonl",
        "this is a file, not a folder\n"
        "  d.jsonl\n"
        "Runs are made by eckart finetune, pretrain, ...\n",
    ),
    "a file to import": (
        "config import dd.jsonl",
        "no such file\n  dd.jsonl\nDid you mean d.jsonl?\n",
    ),
    "a folder to import": (
        "config import peft",
        "this is a folder\n  peft\nType eckart config import peft/adapter_config.json\n",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("options"), rows=12)
    (folder / "job.yaml").write_text("method: dora\n")
    adapter(folder / "peft", folder / "m", "lora", "peft", rank=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_word_out_of_place_is_answered(place, monkeypatch, case):
    enter(place, monkeypatch)
    line, text = CASES[case]
    complains(line, 2, text)


@pytest.mark.parametrize("case", MISSING)
def test_what_is_not_there_is_named(place, monkeypatch, case):
    enter(place, monkeypatch)
    line, text = MISSING[case]
    complains(line, 3, text)


def test_the_document_of_a_mistyped_option_says_the_same(place, monkeypatch):
    enter(place, monkeypatch)
    assert eckart("runs", "--jsn", "--json").document == {
        "command": "runs",
        "exit": 2,
        "error": {
            "what": "unknown option --jsn     command line",
            "facts": [],
            "fix": "Did you mean --json? All options: eckart runs --help",
        },
    }
