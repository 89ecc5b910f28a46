"""Every command: its words, its options and one call into `jobs`. Nothing heavy is imported here.

`jobs` has the table of commands that run a job, `others` the rest; `options` are defined once,
`running` leads from words to a job and from its end to an exit code.
"""

from eckart.cli import jobs, others  # noqa: F401  they register themselves
from eckart.cli.app import app, main

__all__ = ["app", "main"]
