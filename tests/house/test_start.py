"""What `import eckart`, `eckart --help` and `eckart methods` must not load."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "pydantic", "omegaconf", "yaml", "transformers", "numpy", "rich")


def loaded(code: str) -> list[str]:
    """The heavy modules that are there after running code in a fresh Python."""
    report = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    program = f"import atexit\natexit.register(lambda: exec({report!r}, {{}}))\n{code}"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return json.loads(out.stderr.strip().splitlines()[-1].replace("'", '"'))


@pytest.mark.parametrize("words", ["--help", "-h", "--version", "methods", "methods lora --json"])
def test_quick_commands_load_nothing_heavy(words):
    code = f"import sys; sys.argv = ['eckart', *{words.split()!r}]\n"
    assert loaded(code + "from eckart.cli import main; main()") == []


@pytest.mark.parametrize("command", ["finetune", "estimate finetune", "bench"])
def test_a_mistyped_key_is_answered_before_torch_is_loaded(command):
    words = ["eckart", *command.split(), "m", "d.jsonl", "train.stepz=3"]
    there = loaded(f"import sys; sys.argv = {words!r}\nfrom eckart.cli import main; main()")
    assert "pydantic" in there and "torch" not in there


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import eckart; eckart.EckartError; dir(eckart)") == []


def test_the_probe_sees_what_is_loaded():
    assert loaded("import yaml") == ["yaml"]


def test_a_public_name_loads_what_it_needs():
    assert "torch" in loaded("import eckart; eckart.Recipe")
    assert "transformers" not in loaded("import eckart; eckart.Recipe, eckart.LoRA")
