"""The command line itself: exit codes, what goes to which stream, help."""

import errno
import json
import re
import sys
import tempfile

import pytest

import eckart.jobs.methods
from eckart import cli
from eckart.errors import Diverged, FileError, MissingExtra, OutOfRoom, UsageError
from eckart.jobs.settings.tree import OWN


@pytest.fixture
def eckart_(monkeypatch, capsys):
    """Run a command line in this process: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eckart", *words])
        with pytest.raises(SystemExit) as e:
            cli.main()
        out = capsys.readouterr()
        return e.value.code or 0, out.out, out.err

    return run


def raising(error: BaseException):
    def run(*args, **kwargs):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no"), 2),
        (FileError("no"), 3),
        (OutOfRoom("no"), 4),
        (Diverged("no"), 5),
        (MissingExtra("no"), 6),
        (KeyboardInterrupt(), 130),
        (MemoryError("no"), 4),
        (OSError(errno.ENOSPC, "no"), 4),
        (ZeroDivisionError("no"), 1),
    ],
)
def test_every_end_has_its_exit_code(eckart_, monkeypatch, tmp_path, error, code):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(eckart.jobs.methods, "run", raising(error))
    got, out, err = eckart_("methods")
    assert (got, out) == (code, "") and err and "Traceback" not in err
    got, out, err = eckart_("methods", "--json")
    document = json.loads(out)
    assert (got, document["exit"], document["command"]) == (code, code, "methods")
    assert document["error"]["what"] in err


def test_an_internal_fault_leaves_its_traceback_in_a_file(eckart_, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(eckart.jobs.methods, "run", raising(ZeroDivisionError("by zero")))
    _, _, err = eckart_("methods")
    (file,) = tmp_path.iterdir()
    assert err.startswith(f"internal fault: ZeroDivisionError: by zero\n  traceback  {file}\n")
    text = file.read_text()
    assert text.startswith("eckart methods\n") and "Traceback (most recent call last)" in text


def test_an_error_is_text_on_stderr(eckart_):
    assert eckart_("methods", "galor") == (
        2,
        "",
        "unknown method galor     command line\nDid you mean galore? All methods: eckart methods\n",
    )


def test_methods_json_has_its_stable_fields(eckart_):
    code, out, err = eckart_("methods", "--json")
    found = json.loads(out)["methods"]
    assert (code, err) == (0, "")
    fields = {"name", "axis", "paper", "arxiv", "mission", "fields", "combines", "promises"}
    assert all(fields <= set(m) for m in found)
    by_name = {m["name"]: m for m in found}
    assert by_name["galore"]["arxiv"] == "2403.03507" and by_name["galore"]["mission"] is True
    assert "dense" in by_name["galore"]["combines"]["weights"]
    assert "galore" not in by_name["lora"]["combines"]["update"]


def test_combines_says_what_a_recipe_accepts():
    from eckart import Recipe
    from eckart.recipe import registry
    from eckart.recipe.recipe import fitted

    entries = registry.methods()
    made = {name: registry.load(name)() for name in entries}
    for update in (e for e in entries.values() if e.axis == "update"):
        for weights in (e for e in entries.values() if e.axis == "weights"):
            said = weights.name in eckart.jobs.methods.combines(update, entries)["weights"]
            try:
                other = made[update.name]
                Recipe(weights=fitted(made[weights.name], other), update=other)
            except UsageError:
                assert not said, (weights.name, update.name)
            else:
                assert said, (weights.name, update.name)


def test_a_page_has_every_field_with_its_default(eckart_):
    _, out, _ = eckart_("methods", "galore")
    assert "beyond     the mission" not in out
    assert "beyond     the mission" in eckart_("methods", "muon")[1]
    assert "  update.every = 200   (whole number >= 1)\n" in out
    assert "paper      GaLore: Memory-Efficient LLM Training" in out


def test_cite_prints_bibtex(eckart_):
    _, out, _ = eckart_("methods", "galore", "--cite")
    assert out.startswith("@misc{galore,\n  title = {GaLore: ") and out.rstrip().endswith("}")


def test_flags_of_other_tools_are_answered_with_the_key(eckart_):
    code, _, err = eckart_("config", "show", "m", "d", "--learning_rate", "1e-4")
    assert (code, err) == (
        2,
        "unknown option --learning_rate     command line\n"
        "Here it is train.lr: type train.lr=1e-4.\n",
    )
    _, _, err = eckart_("config", "show", "m", "d", "--lr=1e-4")
    assert err.endswith("Did you mean train.lr=1e-4?\n")


def test_a_word_too_many_is_named(eckart_):
    code, _, err = eckart_("config", "validate", "m", "a.jsonl", "b.jsonl")
    assert code == 2 and err.startswith("unexpected word b.jsonl     command line\n")


def test_config_show_prints_every_key(eckart_):
    code, out, _ = eckart_("config", "show", "finetune", "m", "d", "weights.rank=3")
    assert code == 0 and "model: m\n" in out and "  rank: 3\n" in out and "  lr: auto\n" in out
    code, out, _ = eckart_("config", "show", "pretrain")
    assert "weights:\n  name: dense  # pretraining trains the matrices themselves\n" in out


def test_a_valid_file_is_said_to_be_valid(eckart_, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("method: galore\n")
    code, out, _ = eckart_("config", "validate", "-c", str(file))
    assert (code, out) == (0, "valid    finetune   weights=dense update=galore\n")
    file.write_text("method: galore\nupdate: {rnak: 3}\n")
    code, _, err = eckart_("config", "validate", "-c", str(file))
    assert code == 2 and err.startswith(f"unknown key update.rnak     {file}, line 2\n")


def test_the_command_line_has_help_for_each_command(eckart_):
    _, out, _ = eckart_("--help")
    commands = re.search(r"Commands:\n(.*?)\n\n", out, re.S)[1]
    for line in commands.splitlines():
        name = line.split()[0]
        code, text, _ = eckart_(name, "--help")
        assert code == 0 and text.startswith(f"Usage: eckart {name}")
        assert all(f"  {key}=" in text for key in OWN.get(name, ()))
