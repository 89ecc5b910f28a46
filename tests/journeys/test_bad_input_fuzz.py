"""Words and files damaged by chance: a message and the right exit code, nothing left, no fault."""

import os
import random
import shutil

import pytest

from eckart.errors import EckartError, FileError, UsageError
from eckart.io.models import load_tokenizer
from eckart.io.opening import open_model
from eckart.io.text import read
from eckart.jobs.settings.config import resolve
from eckart.jobs.settings.tree import SECTIONS
from eckart.jobs.settings.words import HABITS
from eckart.recipe import registry
from tests.journeys.adapters import adapter
from tests.journeys.bad import enter, entries
from tests.journeys.runs import eckart, workplace

LINES, FILES = 500, 500

VALUES = [
    "", "0", "1", "-1", "3", "1e-3", "1e400", "-.inf", ".nan", "true", "maybe", "null", "none",
    "auto", "lora", "galore", "adamw", "[1,2", "[a,b]", "[]", "{}", "{a: 1}", "{name: lora}",
    "{name: lora, rank: 2}", "!!python/object/apply:os.system ['touch pwned']", "${oc.env:HOME}",
    "${train.lr}", "${", "$(touch pwned)", "`touch pwned`", "'", '"', "\\", "&a", "*a", "0x10",
    "1_000", "2024-01-01", "é", "\u202e", "\x00", "\n", ":", "- a", "?", "|", ">", "%", "@", "~",
    "a" * 300, "9" * 40, "../../etc/passwd", "__import__('os').system('touch pwned')",
]  # fmt: skip


def keys():
    """Keys that exist, habits, and parts of both."""
    found = [f"{s}.{f}" for s, cls in SECTIONS.items() for f in cls.__dataclass_fields__]
    for entry in registry.methods().values():
        found += [f"{entry.axis}.{name}" for name in entry.fields]
    found += [
        *SECTIONS,
        *HABITS,
        "weights",
        "update",
        "objective",
        "method",
        "method.rank",
        "model",
    ]
    return sorted(set(found))


def mutated(text, rng):
    """A text with one to three characters dropped, doubled, swapped or replaced."""
    letters = list(text)
    for _ in range(rng.randint(1, 3)):
        if not letters:
            return "x"
        at = rng.randrange(len(letters))
        letters[at : at + 1] = rng.choice([[], letters[at] * 2, [rng.choice(".=-_[]{}:$ aZ9é")]])
    return "".join(letters)


def line(rng):
    """One to three key=value words."""
    words = []
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(keys_once)
        key = mutated(key, rng) if rng.random() < 0.4 else key
        value = rng.choice(VALUES)
        value = mutated(value, rng) if rng.random() < 0.3 else value
        words.append(f"{key}={value}")
    return words


keys_once = keys()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("fuzz"), rows=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        adapter(folder / "native", folder / "m", "lora", rank=2)
        adapter(folder / "peft", folder / "m", "lora", "peft", rank=2)
    return folder


def test_fuzzed_words_give_a_job_or_a_message(place, monkeypatch):
    enter(place, monkeypatch)
    rng, before, refused = random.Random(0), entries(), 0
    for _ in range(LINES):
        words = line(rng)
        try:
            job = resolve("finetune", "m", "d.jsonl", words)
            assert resolve("finetune", "m", "d.jsonl", words) == job
        except EckartError as error:
            refused += 1
            assert isinstance(error, UsageError | FileError), words
            assert error.what and "\n" not in error.what and "Error" not in error.what, words
    assert entries() == before and not os.path.exists("pwned")
    assert LINES // 3 < refused < LINES, "some lines are fine, many are not"


def test_fuzzed_words_on_the_command_line_end_with_the_right_code(place, monkeypatch):
    enter(place, monkeypatch)
    rng, before = random.Random(1), entries()
    for _ in range(60):
        words = line(rng)
        ran = eckart("config", "show", "finetune", "m", "d.jsonl", *words)
        assert ran.code in (0, 2, 3), (words, ran.err)
        assert (ran.code == 0) == (ran.err == ""), (words, ran.err)
        assert "Traceback" not in ran.err and "internal fault" not in ran.err, words
    assert entries() == before and not os.path.exists("pwned")


def damaged(raw, rng):
    """Bytes with a piece flipped, cut out, doubled, zeroed or cut off."""
    at = rng.randrange(len(raw))
    if rng.random() < 0.5:  # where headers and keys are
        at = min(at, rng.randrange(400))
    piece = rng.choice([1, 1, 8, 100])
    what = rng.randrange(5)
    if what == 0:
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
    if what == 1:
        return raw[:at] + raw[at + piece :]
    if what == 2:
        return raw[:at] + raw[at : at + piece] + raw[at:]
    if what == 3:
        return raw[:at] + bytes(piece) + raw[at + piece :]
    return raw[:at]


def opened(source):
    """A model or adapter as `generate` opens it."""
    open_model(source)
    load_tokenizer(source)


def read_data(file):
    read([file], load_tokenizer("m"), 16, cache=False)


TARGETS = [  # file, what reads it, and how many of the 500 mutants
    ("m/model.safetensors", lambda: opened("m"), 100),
    ("m/config.json", lambda: opened("m"), 100),
    ("m/tokenizer.json", lambda: opened("m"), 20),
    ("peft/adapter_model.safetensors", lambda: opened("peft"), 40),
    ("peft/adapter_config.json", lambda: opened("peft"), 60),
    ("native/model.safetensors", lambda: opened("native"), 40),
    ("native/eckart.json", lambda: opened("native"), 60),
    ("d.jsonl", lambda: read_data("d.jsonl"), 80),
]


@pytest.mark.parametrize(("file", "use", "count"), TARGETS, ids=[t[0] for t in TARGETS])
def test_mutated_files_are_read_or_refused(place, tmp_path, monkeypatch, file, use, count):
    folder = tmp_path / "w"
    shutil.copytree(place, folder)
    enter(folder, monkeypatch)
    rng, raw, before, refused = random.Random(2), (folder / file).read_bytes(), entries(), 0
    for number in range(count):
        mutant = damaged(raw, rng)
        (folder / file).write_bytes(mutant)
        try:
            use()
        except EckartError as error:
            refused += 1
            assert isinstance(error, FileError | UsageError), (number, error)
        except Exception as fault:
            (tmp_path / "mutant").write_bytes(mutant)
            raise AssertionError(f"mutant {number} of {file}: {fault!r}") from fault
    assert entries() == before
    assert refused, "not one mutant was noticed"


def test_the_mutants_are_as_many_as_promised():
    assert sum(count for _, _, count in TARGETS) == FILES
