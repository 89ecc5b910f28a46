"""Files and folders are whole or not there, whatever happens while they are written."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest

from eckart.errors import FileError, Interrupted, OutOfRoom, UsageError
from eckart.io.folder import (
    close_with_manifest,
    manifest_holds,
    write_folder,
    write_json,
    write_text,
)
from eckart.io.run import Run, latest_checkpoint, read_lines, read_metrics, refuse_elsewhere


@contextmanager
def checkpoint(run, step):
    """A folder to fill, which becomes checkpoints/step-N, closed with its manifest."""
    with write_folder(run.checkpoints / f"step-{step}", overwrite=True) as beside:
        yield beside
        close_with_manifest(beside, step=step)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def python(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_folder_appears_only_at_the_end(tmp_path):
    with write_folder(tmp_path / "a" / "out") as beside:
        write_text(beside / "x.txt", "x")
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"] and names(tmp_path / "a" / "out") == ["x.txt"]


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), write_folder(tmp_path / "out") as beside:
        write_text(beside / "x.txt", "x")
        _ = 1 / 0
    assert names(tmp_path) == []


def test_a_full_folder_is_refused_and_the_message_says_what_to_type(tmp_path):
    write_text(tmp_path / "out" / "config.json", "{}")
    with pytest.raises(UsageError) as refused, write_folder(tmp_path / "out"):
        pass
    assert str(refused.value) == (
        "the folder is not empty\n"
        f"  {tmp_path / 'out'}  1 entries\n"
        "Type --overwrite to replace it, or choose another -o."
    )


def test_overwrite_replaces_the_folder_whole(tmp_path):
    write_text(tmp_path / "out" / "config.json", "old")
    write_text(tmp_path / "out" / "old.txt", "old")
    with write_folder(tmp_path / "out", overwrite=True) as beside:
        write_text(beside / "config.json", "new")
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["config.json"]


def test_overwrite_never_replaces_a_foreign_folder(tmp_path):
    write_text(tmp_path / "photos" / "cat.jpg", "cat")
    with (
        pytest.raises(UsageError, match="only runs, models and adapters"),
        write_folder(tmp_path / "photos", overwrite=True),
    ):
        pass
    assert names(tmp_path / "photos") == ["cat.jpg"]


def test_failed_overwrite_keeps_the_old_folder(tmp_path, monkeypatch):
    write_text(tmp_path / "out" / "config.json", "old")
    rename = os.rename

    def fails_at_the_last_step(a, b):
        if ".writing" in str(a):
            raise OSError(errno.ENOSPC, "No space left on device", str(b))
        rename(a, b)

    monkeypatch.setattr(os, "rename", fails_at_the_last_step)
    with pytest.raises(OutOfRoom), write_folder(tmp_path / "out", overwrite=True) as beside:
        write_text(beside / "config.json", "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with write_folder(tmp_path / "out") as beside:
        write_text(beside / "x.txt", "x")
    assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk") == ["x.txt"]
    (tmp_path / "y.txt").symlink_to("disk/y.txt")
    write_text(tmp_path / "y.txt", "y")
    assert (tmp_path / "y.txt").is_symlink() and names(tmp_path / "disk") == ["x.txt", "y.txt"]


@pytest.mark.parametrize("moment", ["writing", "between the two renames"])
def test_a_kill_leaves_the_old_folder_and_the_next_write_clears_up(tmp_path, moment):
    out = tmp_path / "out [1]"  # no pattern
    write_text(out / "config.json", "old")
    process = python(
        """
        import os, sys, time
        from eckart.io import folder
        if sys.argv[2] == "between the two renames":
            move = folder.move_aside
            folder.move_aside = lambda t: (move(t), print("here", flush=True), time.sleep(60))
        with folder.write_folder(sys.argv[1], overwrite=True) as beside:
            folder.write_text(beside / "config.json", "new")
            if sys.argv[2] == "writing":
                print("here", flush=True); time.sleep(60)
        """,
        out,
        moment,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(UsageError), write_folder(out):  # the old one is back
        pass
    assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == [out.name]


def test_a_folder_below_a_file_is_a_file_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write here") as refused:
        write_json(tmp_path / "file" / "out.json", {})
    assert refused.value.exit_code == 3


def test_a_full_disk_is_out_of_room(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfRoom, match="the disk is full") as refused:
        write_text(tmp_path / "x", "x")
    assert refused.value.exit_code == 4 and names(tmp_path) == []


def test_a_write_the_kernel_cuts_short_leaves_nothing(tmp_path):
    """A real limit on file size (EFBIG), met by our writer and inside safetensors."""
    process = python(
        """
        import resource, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from eckart.errors import OutOfRoom
        from eckart.io.folder import write_bytes, write_folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        for write in (write_bytes, lambda p, c: save_file({"x": torch.zeros(len(c))}, p)):
            try:
                with write_folder(Path(sys.argv[1]) / "out") as beside:
                    write(beside / "x", bytes(1 << 17))
            except OutOfRoom as error:
                print(error.exit_code)
        """,
        tmp_path,
    )
    assert process.communicate()[0] == "4\n4\n"
    assert names(tmp_path) == []


def test_manifest_holds_until_a_byte_changes(tmp_path):
    write_text(tmp_path / "sub" / "a", "abc")
    assert not manifest_holds(tmp_path)
    close_with_manifest(tmp_path, step=3)
    assert manifest_holds(tmp_path)
    (tmp_path / "sub" / "a").write_text("abd")
    assert not manifest_holds(tmp_path)
    (tmp_path / "sub" / "a").unlink()
    assert not manifest_holds(tmp_path)


def test_runs_are_numbered(tmp_path):
    for number in ("0001", "0002"):
        with Run.create(f"{tmp_path}/runs/{{name}}", seed=7) as run:
            assert run.folder == tmp_path / "runs" / number
        assert run.facts["seed"] == 7 and run.facts["exit"] == 0
        assert run.facts["versions"]["torch"]


def test_two_runs_into_one_folder_are_refused_even_with_overwrite(tmp_path):
    with Run.create(tmp_path / "a"):
        with pytest.raises(UsageError, match="another process is writing"):
            Run.create(tmp_path / "a", overwrite=True)
        with pytest.raises(UsageError, match="another process is writing"):
            Run.resume(tmp_path / "a")
    Run.resume(tmp_path / "a").finish()


def test_a_killed_run_is_free_to_resume_and_loses_only_its_torn_line(tmp_path):
    process = python(
        """
        import sys, time
        from eckart.io.folder import close_with_manifest, write_folder
        from eckart.io.run import Run
        run = Run.create(sys.argv[1])
        run.log(step=1, loss=2.0)
        with write_folder(run.checkpoints / "step-1") as folder:
            (folder / "x").write_text("x")
            close_with_manifest(folder, step=1)
        for log in ("metrics.jsonl", "spectra.jsonl"):
            open(run.folder / log, "a").write('{"step": 2, "lo')
        with write_folder(run.checkpoints / "step-2") as folder:
            (folder / "x").write_text("x")
            print("here", flush=True)
            time.sleep(60)
        """,
        tmp_path / "a",
    )
    assert process.stdout.readline() == "here\n"
    with pytest.raises(UsageError, match="another process"):
        Run.resume(tmp_path / "a")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = Run.resume(tmp_path / "a")
    assert run.latest() == tmp_path / "a" / "checkpoints" / "step-1"
    run.log(step=2, loss=1.0)
    run.log("spectra.jsonl", step=2, spectra={})
    assert [m["step"] for m in run.metrics()] == [1, 2]
    assert [m["step"] for m in read_lines(run.folder, "spectra.jsonl")] == [2]
    run.rewind(1)
    assert [m["step"] for m in run.metrics()] == [1]
    assert not read_lines(run.folder, "spectra.jsonl")
    run.finish()


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    with Run.create(tmp_path / "a") as run:
        for step in (9, 10):
            with checkpoint(run, step) as folder:
                write_text(folder / "x", "x")
        (run.checkpoints / "step-10" / "x").write_text("y")
        assert run.latest() == run.checkpoints / "step-9" == latest_checkpoint(run.folder)


def test_an_overwritten_run_comes_back_when_the_new_one_fails_at_once(tmp_path):
    with Run.create(tmp_path / "a", mine="old"):
        pass
    with pytest.raises(FileError), Run.create(tmp_path / "a", overwrite=True, mine="new"):
        raise FileError("no such model")
    run = Run.resume(tmp_path / "a")
    assert run.facts["mine"] == "old"
    run.finish()
    with Run.create(tmp_path / "a", overwrite=True, mine="new") as run:
        pass
    assert run.facts["mine"] == "new" and names(tmp_path) == ["a"]


def test_a_new_run_that_is_refused_leaves_nothing_until_it_has_something_to_keep(tmp_path):
    with pytest.raises(UsageError), Run.create(tmp_path / "a"):
        raise UsageError("this model has no heads to prune")
    assert not names(tmp_path)
    Run.create(tmp_path / "a", mine="old").finish()
    with pytest.raises(Interrupted), Run.create(tmp_path / "a", overwrite=True) as run:
        write_text(run.folder / "trials" / "one.json", "{}")
        raise Interrupted("interrupted; what has ended is kept")
    assert (tmp_path / "a" / "trials" / "one.json").exists() and names(tmp_path) == ["a"]
    with pytest.raises(UsageError), Run.resume(tmp_path / "a"):
        raise UsageError("a resumed run keeps its methods")
    assert names(tmp_path) == ["a"]


def test_how_a_run_ended_is_recorded(tmp_path):
    with pytest.raises(OutOfRoom), Run.create(tmp_path / "a") as run:
        raise OutOfRoom("memory is full")
    assert run.facts["exit"] == 4 and run.facts["error"] == "memory is full"


def test_resume_names_the_run_next_to_it(tmp_path):
    Run.create(tmp_path / "0001").finish()
    with pytest.raises(FileError, match="Did you mean 0001"):
        Run.resume(tmp_path / "0002")


def test_rewinding_drops_later_lines(tmp_path):
    with Run.create(tmp_path / "a") as run:
        for step in range(1, 5):
            run.log(step=step)
        run.rewind(2)
    assert [m["step"] for m in read_metrics(tmp_path / "a")] == [1, 2]


def test_a_run_of_another_folder_says_where_its_paths_start(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "notes.txt").write_text("a")
    monkeypatch.chdir(tmp_path / "here")
    Run.create("r").finish()
    refuse_elsewhere(Path("r"), "finetune", ["notes.txt", "gpt2"])
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(FileError) as e:
        refuse_elsewhere(Path("../here/r"), "finetune", ["notes.txt", "gpt2"])
    here = tmp_path / "here"
    assert e.value.text() == (
        "this run was begun in another folder\n"
        f"  notes.txt  is in {here}\n"
        f"Type it there: cd {here} && eckart finetune --resume {here / 'r'}"
    )
