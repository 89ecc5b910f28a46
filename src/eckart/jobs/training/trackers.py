"""Loggers besides metrics.jsonl: `track=[tensorboard]`, by transformers' own integrations."""

from __future__ import annotations

from eckart.errors import MissingExtra, UsageError, did_you_mean
from eckart.jobs.settings.job import Job

PACKAGES = {"comet_ml": "comet-ml"}  # tracker -> package, if the names differ


def require_trackers(job: Job) -> None:
    """Raise UsageError for an unknown tracker, MissingExtra for one that is not installed."""
    if not job.track:
        return
    from transformers import integrations

    known = sorted(integrations.integration_utils.INTEGRATION_TO_CALLBACK)
    for name in job.track:
        if name not in known:
            raise UsageError(
                f"unknown tracker {name}", [(f"track = {name}", "")], did_you_mean(name, known)
            )
        is_there = getattr(integrations, f"is_{name}_available", None)
        if is_there is not None and not is_there():
            package = PACKAGES.get(name, name)
            raise MissingExtra(
                f"track={name} needs {package}",
                [(package, "not installed")],
                f"Type pip install {package}, or leave it out: metrics.jsonl is always there.",
            )
