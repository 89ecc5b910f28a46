"""What a person sees while it trains: a line in place on a terminal, lines in a pipe; trackers."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eckart.jobs.training.outcome import say_nothing_gained
from eckart.jobs.training.screen import Screen, every
from tests.journeys.bad import enter
from tests.journeys.runs import eckart, workplace

ROOT = Path(__file__).parents[2]
SHORT = "finetune m d.jsonl train.steps=6 train.batch_size=2"
LINE = re.compile(
    r" *(\d+)/6(  loss [\d.]+)?(  held out [\d.]+)?(  lr \S+)?"
    r"  \S+ s/step  [\d.,]+( K)? tokens/s(  [\d.]+ MB)?  \S+ left"
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    folder = workplace(tmp_path / "here", rows=12)
    enter(folder, monkeypatch)
    return folder


def test_a_terminal_has_one_line_that_is_written_over(place):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "eckart", *SHORT.split(), "-o", "run"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed: Linux says so by an error
            break
        if not piece:
            break
        seen += piece
    out = process.communicate()[0].decode()
    assert process.returncode == 0, seen
    _, *drawn = seen.decode().split("\r\x1b[K")
    steps = [LINE.match(text) for text in drawn]
    assert all(steps), drawn
    assert [int(step[1]) for step in steps] == [1, 2, 3, 4, 5, 6]
    assert "left\r\n" in drawn[-1] and not any("\n" in text for text in drawn[:-1])
    assert steps[-1][2] and steps[-1][6], "loss and memory are there"
    assert out.splitlines()[-2].startswith("done") and "\x1b" not in out


@pytest.mark.parametrize(
    ("steps", "apart"), [(1, 1), (4, 1), (8, 2), (30, 3), (100, 4), (1000, 40)]
)
def test_a_pipe_has_a_few_lines_of_a_short_run_and_some_more_of_a_long_one(steps, apart):
    assert every(steps) == apart


def test_a_long_name_stands_out_of_its_column_alone(capsys):
    screen = Screen()
    for name in ("m", "a/path/of/forty/letters/that/is/too/long", "notes"):
        screen.line("data", "text", name, result=True)
    assert [line.index("text") for line in capsys.readouterr().out.splitlines()] == [13, 52, 17]


def test_a_pipe_has_a_line_now_and_then_and_no_control_characters(place):
    ran = eckart(*SHORT.split(), "-o", "run")
    assert ran.code == 0 and "\r" not in ran.err and "\x1b" not in ran.err
    lines = [LINE.fullmatch(line) for line in ran.err.splitlines() if "s/step" in line]
    assert all(lines) and [int(line[1]) for line in lines] == [1, 2, 4, 6]


def test_an_unknown_tracker_is_answered_with_the_nearest(place):
    ran = eckart(*SHORT.split(), "track=[tensorbord]", "-o", "run")
    assert (ran.code, ran.out, ran.err) == (
        2,
        "",
        "unknown tracker tensorbord\n  track = tensorbord\nDid you mean tensorboard?\n",
    )
    assert not (place / "run").exists()


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(place, monkeypatch):
    from transformers import integrations

    monkeypatch.setattr(integrations, "is_tensorboard_available", lambda: False)
    ran = eckart(*SHORT.split(), "track=[tensorboard]", "-o", "run")
    assert (ran.code, ran.out, ran.err) == (
        6,
        "",
        "track=tensorboard needs tensorboard\n"
        "  tensorboard  not installed\n"
        "Type pip install tensorboard, or leave it out: metrics.jsonl is always there.\n",
    )
    assert not (place / "run").exists()


def test_tensorboard_gets_the_curves(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ran = eckart(*SHORT.split(), "track=[tensorboard]", "-o", "run")
    assert ran.code == 0, ran.err
    (file,) = (place / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert {"train/loss", "train/grad_norm"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_training_that_gained_nothing_says_so():
    screen = Screen(quiet=True)
    for after in ({"loss": 0.9}, {}, {"loss": 1.0}):
        say_nothing_gained(screen, {"loss": 1.0}, after)
    assert len(screen.warnings) == 1
    assert screen.warnings[0].startswith("no checkpoint is better than the model was before")
