"""The command line. Each command is its options and one call into `jobs`; torch is not imported.

`jobs` has the table of commands that run a job, `others` the rest, `options` the definitions of
options; `running` turns words into a job, and results and errors into exit codes.
"""

from eckart.cli import jobs, others  # noqa: F401  they register themselves
from eckart.cli.app import app, main

__all__ = ["app", "main"]
