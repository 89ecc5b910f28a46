"""The machine says no: a full disk, a read-only one, no memory, somebody else in the folder.

Each is real: a file system of its own size, a limit of the process, the lock that the kernel keeps.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eckart.jobs.training import fit
from tests.journeys.bad import enter
from tests.journeys.runs import eckart, workplace

ROOT = Path(__file__).parents[2]
SHORT = "finetune m d.jsonl train.steps=4 train.batch_size=2 train.save_every=2"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("limits"), rows=24)


@pytest.fixture
def place(shared, monkeypatch):
    enter(shared, monkeypatch)
    return shared


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def after(python: str, line: str) -> subprocess.CompletedProcess[str]:
    """A command of its own process, in which `python` runs first."""
    code = f"{python}\nimport sys; sys.argv[:] = ['eckart', *sys.argv[1:]]\n"
    code += "from eckart.cli import main; main()"
    words = [sys.executable, "-c", code, *line.split()]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=200)


def mounted(mount: str, line: str) -> subprocess.CompletedProcess[str]:
    """A command in a mount namespace of its own, gone with it. Skips where none can be made."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    shell = f"{mount} && exec {sys.executable} -m eckart {line}"
    words = ["unshare", "-rm", "bash", "-c", shell]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=200)


def no_space(ran: subprocess.CompletedProcess[str], below: Path) -> None:
    """It ended with 4 and the text of a full disk that names a file below a folder."""
    assert "Traceback" not in ran.stderr
    said = re.search(
        r"^the disk is full\n  (\S+)  [\d,]+ MiB free\n"
        r"Free some space, or type -o FOLDER on another disk\.\n\Z",
        ran.stderr,
        re.M,
    )
    assert said, ran.stderr
    assert (ran.returncode, ran.stdout) == (4, "")
    assert Path(said[1]).is_relative_to(below)


# for the run's own files, for a checkpoint
@pytest.mark.parametrize("size", [pytest.param("4k", marks=pytest.mark.slow), "100k"])
def test_a_file_system_without_space_is_said(place, size):
    (place / f"small{size}").mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs small{size}"
    no_space(mounted(mount, f"{SHORT} -o small{size}/run"), place / f"small{size}")


def test_a_file_that_may_not_grow_is_said_and_the_run_goes_on_when_it_may(place):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    ran = after(limit, f"{SHORT} -o limited")
    no_space(ran, place / "limited")
    assert json.loads((place / "limited" / "run.json").read_text())["exit"] == 4
    assert not [p for p in (place / "limited").rglob("*") if ".writing-" in p.name]
    assert eckart("finetune", "--resume", "limited").code == 0


def test_a_read_only_file_system_is_said(place):
    (place / "theirs").mkdir()
    mount = "mount --bind theirs theirs && mount -o remount,bind,ro theirs"
    ran = mounted(mount, f"{SHORT} -o theirs/run")
    assert ran.returncode == 3 and ran.stdout == "", ran.stderr
    assert ran.stderr.endswith(
        "cannot write here\n"
        f"  {place}/theirs/run  read-only file system\n"
        "Type -o FOLDER with a folder you own.\n"
    )


def test_no_memory_is_said_with_what_each_remedy_saves(place):
    """The allocator itself refuses: the step asks for more than any machine has."""
    limit = (
        "import torch\n"
        "from eckart.jobs.training import fit\n"
        "def greedy(*a, **k):\n"
        "    return torch.empty(2**55, dtype=torch.uint8)\n"
        "fit.RunTraining.compute_loss = greedy\n"
    )
    line = "finetune m d.jsonl train.steps=2 train.batch_size=20 method=dense -o crowded"
    ran = after(limit, line)
    assert (ran.returncode, ran.stdout) == (4, ""), ran.stderr
    said = re.search(
        r"^out of memory\n  needed +[\d.]+ MB and more, batch 20\n((?:  .*\n){3})"
        r"Type the first, or several of them\.\n\Z",
        ran.stderr,
        re.M,
    )
    assert said, ran.stderr
    remedies = [re.split(r"  +saves ", row.strip()) for row in said[1].splitlines()]
    assert [words for words, _ in remedies] == [
        "train.checkpointing=true",
        "train.batch_size=10 train.accumulate=2",
        "data.seq_len=24",
    ]
    saved = [float(amount.removesuffix(" MB")) for _, amount in remedies]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    assert json.loads((place / "crowded" / "run.json").read_text())["exit"] == 4


def test_a_second_run_into_one_folder_is_refused_while_the_first_goes_on(place, monkeypatch):
    in_use, second = fit.RunTraining.compute_loss, []

    def meanwhile(self, *args, **more):
        monkeypatch.setattr(fit.RunTraining, "compute_loss", in_use)
        second.append(eckart(*SHORT.split(), "-o", "busy", "--overwrite"))
        return in_use(self, *args, **more)

    monkeypatch.setattr(fit.RunTraining, "compute_loss", meanwhile)
    assert eckart(*SHORT.split(), "-o", "busy").code == 0
    (ran,) = second
    assert (ran.code, ran.out, ran.err) == (
        2,
        "",
        "another process is writing to this run\n"
        f"  {place}/busy  locked\n"
        "Wait for it to end, or choose another -o.\n",
    )
    assert json.loads((place / "busy" / "run.json").read_text())["exit"] == 0


def test_a_second_ctrl_c_ends_at_once_and_what_was_saved_is_gone_on_from(place):
    twice = (
        "import os, signal\n"
        "from eckart.jobs.training import fit\n"
        "told = fit.Interrupt.on_step_end\n"
        "def asked(self, args, state, control, **more):\n"
        "    if state.global_step == 3:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return told(self, args, state, control, **more)\n"
        "fit.Interrupt.on_step_end = asked\n"
    )
    ran = after(twice, f"{SHORT} -o twice")
    assert ran.returncode == 130 and ran.stderr.endswith("\ninterrupted\n"), ran.stderr
    assert "Traceback" not in ran.stderr and "a checkpoint is saved" not in ran.stderr
    assert json.loads((place / "twice" / "run.json").read_text())["exit"] == 130
    assert sorted(p.name for p in (place / "twice" / "checkpoints").iterdir()) == ["step-2"]
    assert eckart("finetune", "--resume", "twice").code == 0
