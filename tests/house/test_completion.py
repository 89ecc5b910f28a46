"""What the tab key offers: methods, keys, choices and presets, at once and without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eckart.io.presets import PRESETS
from eckart.jobs.settings.completion import completions
from eckart.recipe import registry

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "omegaconf", "yaml", "transformers", "numpy", "rich")


def test_methods_and_the_choices_of_an_axis_are_offered():
    entries = registry.methods()
    begin = [f"method={name}" for name in entries if name.startswith("lora")]
    assert completions("finetune", ["m", "d"], "method=lora") == begin and len(begin) > 2
    updates = {f"update={e.name}" for e in entries.values() if e.axis == "update"}
    assert set(completions("finetune", ["m", "d"], "update=")) == updates
    assert completions("finetune", ["m", "d"], "nonsense=") == []


def test_the_keys_are_those_of_the_method_that_was_named():
    for name in ("galore", "lisa"):
        entry = registry.find(name)
        found = completions("finetune", ["m", "d", f"method={name}"], "update.")
        assert found == sorted(f"update.{field}=" for field in entry.fields)
    usual = registry.find(registry.DEFAULTS["weights"])
    found = completions("finetune", ["m", "d"], "weights.")
    assert found == sorted(f"weights.{field}=" for field in usual.fields)
    assert "train.lr=" in completions("finetune", ["m", "d"], "tr")
    assert "keep=" in completions("compress", ["m"], "k")


def test_words_and_switches_have_their_choices():
    found = completions("finetune", ["m", "d"], "train.schedule=")
    assert found == ["train.schedule=constant", "train.schedule=cosine", "train.schedule=linear"]
    assert completions("finetune", ["m", "d"], "train.compile=t") == ["train.compile=true"]
    assert "weights.init=pissa" in completions("finetune", ["m", "d"], "weights.init=p")


def test_the_places_of_model_and_data_belong_to_files():
    assert completions("finetune", [], "t") == completions("finetune", ["m"], "t") == []
    assert completions("finetune", ["m", "data=d"], "train.lr") == ["train.lr="]
    assert completions("pretrain", [], "") == sorted(PRESETS)
    assert completions("pretrain", [], "t5") == ["t5-tiny"]
    assert completions("pretrain", ["t5-tiny"], "") == []


def test_bash_takes_a_key_and_its_value_for_three_words():
    assert completions("finetune", ["m", "d", "method", "="], "galor") == ["galore"]
    assert completions("finetune", ["m", "d", "train.schedule"], "=") == [
        "constant", "cosine", "linear",
    ]  # fmt: skip
    given = ["m", "d", "method", "=", "lisa"]
    assert "update.every=" not in completions("finetune", [*given[:4], "lisa"], "train.")
    entry = registry.find("lisa")
    assert completions("finetune", given, "update.") == sorted(f"update.{f}=" for f in entry.fields)


def asked(*words: str, shell: str = "bash") -> tuple[list[str], list[str]]:
    """What a shell is answered by a process of its own, and the heavy modules it loaded."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "_ECKART_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": " ".join(["eckart", *words]),
        "COMP_CWORD": str(len(words)),
        "_TYPER_COMPLETE_ARGS": " ".join(["eckart", *words]),
    }
    report = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    program = f"import atexit; atexit.register(lambda: exec({report!r}, {{}}))\n"
    program += "from eckart.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(), re.findall(r"\w+", ran.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["finetune", "m", "d", "method", "=", "galor"], ["galore"]),
        (["finetune", "m", "d", "train.sc"], ["train.schedule="]),
        (["pretrain", "t5"], ["t5-tiny"]),
        (["methods", "galor"], ["galore"]),
        (["reproduce", "galor"], ["galore"]),
        (["estim"], ["estimate"]),
    ],
)
def test_a_shell_is_answered_without_anything_heavy(words, wanted):
    assert asked(*words) == (wanted, [])


def test_zsh_keeps_the_word_whole():
    found, heavy = asked("finetune", "m", "d", "method=galor", shell="zsh")
    assert "method=galore" in " ".join(found) and heavy == []


def test_bash_itself_completes(tmp_path):
    """The script that --show-completion prints, in a bash that has never seen eckart."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = tmp_path / "eckart"
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m eckart "$@"\n')
    command.chmod(0o755)
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    script = subprocess.run(  # by bash, so that it is bash's
        ["bash", "-c", "eckart --show-completion; :"], capture_output=True, text=True, env=environ
    ).stdout
    assert "_ECKART_COMPLETE=complete_bash" in script
    name = re.search(r"complete .*-F (\S+) eckart", script)[1]
    probe = f"{script}\nCOMP_WORDS=(eckart finetune m d method = galor); COMP_CWORD=6\n"
    probe += f'{name} eckart; echo "${{COMPREPLY[@]}}"'
    ran = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, env=environ)
    assert ran.stdout.split() == ["galore"], ran.stderr
