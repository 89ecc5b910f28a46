"""The files in configs/ are valid for the command that each names in its first lines."""

import re
from pathlib import Path

import pytest

from eckart.jobs.settings.config import resolve

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_valid_for_its_command(file):
    command = re.search(r"^#     eckart (\w+) (.*) -c configs/(\S+)$", file.read_text(), re.M)
    assert command is not None and command[3] == file.name
    given = command[2].split()
    data = "d.jsonl" if "DATA" in given else None
    job = resolve(command[1], given[0], data, (), (str(file),))
    assert job.data.train
