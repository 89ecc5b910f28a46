"""The documentation: its commands are understood as they stand, its keys exist."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from eckart.cli import app, running
from eckart.io.run import Run
from eckart.jobs.settings.refuse import own_keys, unknown_key
from eckart.jobs.settings.words import read_words
from eckart.recipe import registry

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SHOWN = re.compile(r"^    (?:\$ )?(?:echo .* \| )?(eckart [a-z](?:.*\\\n)*.*)", re.MULTILINE)
LINES = [(p.name, line) for p in PAGES for line in SHOWN.findall(p.read_text())]
README = (ROOT / "README.md").read_text()
LINES += [("README.md", line) for line in SHOWN.findall(README)]
COMMANDS = typer.main.get_command(app).commands
HELP = "\n".join(command.epilog or "" for command in COMMANDS.values())
LINES += [("--help", line) for line in SHOWN.findall(HELP)]
FAILS = {"eckart config validate update=galore weights=lora"}  # shown for what they answer


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a run, where only the words of a command are read."""
    monkeypatch.chdir(tmp_path)
    with Run.create("runs/0001") as run:
        run.write_config("model: m\ndata: {train: d.jsonl}\n")
        run.write_resolved("model: m\ndata: {train: d.jsonl}\n")
    (tmp_path / "job.yaml").write_text("method: lora\n")

    def read(command, words, config, flags, options=None):
        running.to_job(command, words, config, flags, options)

    monkeypatch.setattr(running, "run_job", read)
    answer = SimpleNamespace(**dict.fromkeys(("run", "show", "validate", "schema"), done))

    def call(module, action, as_json, read=None):
        return action(answer, *([read()] if read else []))

    monkeypatch.setattr(running, "call", call)


def done(*_, **__):
    return {"exit": 0}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_of_the_documentation_is_understood(place, page, line):
    text = line.replace("\\\n", " ").partition("   ")[0].replace("[SLUG...]", "lora")
    words = shlex.split(text, comments=True)[1:]
    ran = CliRunner().invoke(app, words)
    assert (ran.exit_code == 0) == (line not in FAILS), ran.output


def test_the_documentation_has_a_page_for_each_command():
    made = {"methods"}  # docs/pages.py
    assert COMMANDS.keys() - made <= {p.stem for p in PAGES}


def test_what_others_call_a_key_is_answered_with_the_key_beside_it():
    """Every row of coming-from.md; words that are ours too (rank, scale) need no answer."""
    known = own_keys() + [f"{e.axis}.{f}" for e in registry.methods().values() for f in e.fields]
    ours, checked = {key.rpartition(".")[2] for key in known}, 0
    for line in (ROOT / "docs" / "coming-from.md").read_text().splitlines():
        *old, new = [cell.strip() for cell in line.strip("|\n ").split("|")]
        keys = [key for key in re.findall(r"`([\w.=]+)`", new) if "=" in key or "." in key]
        for key in keys:
            assert key.partition("=")[0] in (*known, "method"), line
        for word in re.findall(r"`(\w+)[^`]*`", " ".join(old)) if keys else ():
            (setting,) = read_words([f"{word}=1"])
            said = unknown_key(setting, own_keys(), "").fix
            checked += 1
            wanted = [
                k.removeprefix("method") if "method" in k else k.partition("=")[0] for k in keys
            ]
            assert word in ours or any(k in said for k in wanted), line
    assert checked > 30


def test_the_readme_links_every_method_to_its_file():
    linked = re.findall(r"\[([\w-]+)\]\((src/eckart/methods/\S+?)\)", README)
    files = {e.name: e.path.relative_to(ROOT).as_posix() for e in registry.methods().values()}
    assert dict(linked) == files and len(linked) == len(files)
