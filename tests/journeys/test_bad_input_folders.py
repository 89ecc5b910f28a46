"""Where a result cannot go: occupied, foreign, read-only, full, or somebody else's right now."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eckart.errors import UsageError
from eckart.io import run as runs
from tests.journeys.bad import complains, enter
from tests.journeys.runs import eckart, workplace

SHORT = "finetune m d.jsonl train.steps=1 train.batch_size=2"


@pytest.fixture
def place(tmp_path, monkeypatch):
    folder = workplace(tmp_path / "here", rows=12)
    enter(folder, monkeypatch)
    return folder


def test_a_folder_with_something_in_it_is_not_written_over(place):
    (place / "photos").mkdir()
    (place / "photos" / "holiday.jpg").write_text("x")
    complains(
        f"{SHORT} -o photos",
        2,
        "the folder is not empty\n"
        f"  {place}/photos  1 entries\n"
        "Type --overwrite to replace it, or choose another -o.\n",
    )
    complains(
        f"{SHORT} -o photos --overwrite",
        2,
        "--overwrite replaces only runs, models and adapters\n"
        f"  {place}/photos  is none of them\n"
        "Remove the folder yourself, or choose another -o.\n",
    )
    complains(
        "convert m --to dense -o photos",
        2,
        "the folder is not empty\n"
        f"  {place}/photos  1 entries\n"
        "Type --overwrite to replace it, or choose another -o.\n",
    )


def test_a_file_is_no_folder(place):
    complains(
        f"{SHORT} -o d.jsonl",
        2,
        f"there is a file of this name\n  {place}/d.jsonl\nChoose another -o.\n",
    )


def test_below_a_file_nothing_can_be_made(place):
    complains(
        f"{SHORT} -o d.jsonl/run",
        3,
        "cannot write here\n"
        f"  {place}/d.jsonl/run  not a directory\n"
        "Type -o FOLDER with a folder you own.\n",
    )


@pytest.mark.parametrize(
    "line",
    [
        SHORT,
        "pretrain llama-tiny d.jsonl",
        "compress m",
        "bench m d.jsonl --methods lora",
        "convert m --to factored rank=2",
        "inspect m",
        "reproduce lora-limits",
        "demo",
    ],
)
def test_where_nothing_can_be_made_is_said_before_anything_is_loaded(place, line):
    out = "d.jsonl/x.html"
    ran = eckart(*line.split(), "-o", out)
    where = place / "d.jsonl" if line.startswith(("inspect", "convert")) else place / out
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == (
        f"cannot write here\n  {where}  not a directory\nType -o FOLDER with a folder you own.\n"
    )


def test_a_refused_run_takes_the_folders_with_it_that_were_made_for_it(place):
    for out in ("a/b/c", "runs/{name}"):
        with pytest.raises(UsageError), runs.Run.create(out):
            raise UsageError("no")
    assert sorted(path.name for path in place.iterdir()) == ["d.jsonl", "m"]


def test_two_runs_do_not_write_into_one_folder(place):
    first = runs.Run.create("busy")
    try:
        complains(
            f"{SHORT} -o busy",
            2,
            "another process is writing to this run\n"
            f"  {place}/busy  locked\n"
            "Wait for it to end, or choose another -o.\n",
        )
        complains(
            f"{SHORT} -o busy --overwrite",
            2,
            "another process is writing to this run\n"
            f"  {place}/busy  locked\n"
            "Wait for it to end, or choose another -o.\n",
        )
    finally:
        first.finish()


def refusing(number, below):
    """Path.mkdir of a disk that says no below a folder; tests run as root, whom no mode stops."""
    mkdir = Path.mkdir

    def refused(self, *args, **kwargs):
        if self.is_relative_to(below):
            raise OSError(number, os.strerror(number), str(self))
        return mkdir(self, *args, **kwargs)

    return refused


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only file system")],
)
def test_a_folder_that_cannot_be_written_is_named(place, monkeypatch, number, reason):
    (place / "theirs").mkdir()
    monkeypatch.setattr(Path, "mkdir", refusing(number, place / "theirs"))
    complains(
        f"{SHORT} -o theirs/run",
        3,
        "cannot write here\n"
        f"  {place}/theirs/run  {reason}\n"
        "Type -o FOLDER with a folder you own.\n",
    )


def test_a_full_disk_is_said_with_what_is_free(place, monkeypatch):
    (place / "small").mkdir()
    monkeypatch.setattr(Path, "mkdir", refusing(errno.ENOSPC, place / "small"))
    monkeypatch.setattr("eckart.io.folder.free_bytes", lambda path: 3 * 2**20)
    complains(
        f"{SHORT} -o small/run",
        4,
        "the disk is full\n"
        f"  {place}/small/run  3 MiB free\n"
        "Free some space, or type -o FOLDER on another disk.\n",
    )


def test_only_a_run_is_resumed(place):
    complains(
        "finetune --resume m",
        3,
        "no run in this folder\n  m  has no run.json\nType --resume FOLDER with a run's folder.\n",
    )
    assert eckart(*SHORT.split(), "-o", "run1").code == 0
    complains(
        "finetune --resume run2",
        3,
        "no run in this folder\n  run2  has no run.json\nDid you mean run1?\n",
    )
    complains(
        "finetune --resume run1",
        2,
        "this run is finished\n"
        "  run1  1 of 1 steps\n"
        "Type train.steps=2 to train on, or eckart generate run1\n",
    )


def test_a_run_without_a_result_is_not_a_model_yet(place):
    runs.Run.create("begun").finish(130)
    complains(
        "generate begun -p x",
        3,
        "the run has no result yet\n  begun  final/ is missing\nFinish it: --resume begun\n",
    )


def command(*words, python=""):
    """A process of its own; `python` runs before the command does."""
    code = f"{python}\nimport sys; sys.argv[:] = ['eckart', *sys.argv[1:]]\n"
    code += "from eckart.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120
    )


def test_a_missing_extra_is_named_with_the_line_that_installs_it(place):
    ran = command("reproduce", "--quick", python="import sys; sys.modules['scipy'] = None")
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        6,
        "",
        "comparisons need scipy\n  scipy  not installed\nType pip install 'eckart[claims]'.\n",
    )


@pytest.mark.slow
def test_the_same_texts_come_from_a_process_of_its_own(place):
    ran = command("finetune", "m", "d.jsonl", "weights.rank=0")
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        2,
        "",
        "weights.rank is out of range\n"
        "  weights.rank = 0  command line\n"
        "  allowed           a whole number >= 1\n"
        "Leave it out for 16. All keys: eckart methods lora\n",
    )
    ran = command("generate", "nothere/model", "-p", "x")
    assert ran.returncode == 3 and ran.stdout == "" and "Traceback" not in ran.stderr
