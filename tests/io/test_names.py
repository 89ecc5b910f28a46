"""The room's public names are where its table says."""

import subprocess
import sys

import eckart.io


def test_every_public_name_is_found():
    assert all(getattr(eckart.io, name) is not None for name in eckart.io.__all__)


def test_a_run_folder_is_opened_without_importing_transformers():
    code = (
        "import sys; from eckart.io import Run, write_folder; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
