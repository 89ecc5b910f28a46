"""Runs of a bench as trials of Ray Tune: on the cluster that RAY_ADDRESS names, else here.

Tune places them, tries again what a lost node has taken, and keeps its own result folder
(`tensorboard --logdir`, `tune.ExperimentAnalysis`). What has ended is decided by the trials'
own files, as without Ray, so a bench may be begun on a cluster and gone on with at home.
Model and data must be under the same path on every node; numbers are kept where it was started.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from eckart.errors import MissingExtra

TRIES = 2  # again, after a node or a worker is lost
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the program's, as elsewhere
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
}


def run(
    trials: Mapping[Path, Any],
    measure: Callable[[Any], Mapping[str, float]],
    ended: Callable[[Path, dict[str, float]], None],
) -> None:
    """Do all trials; `ended` is told of each as it reports. Raises the first one's error.

    Tune's results go into `ray/N` beside the folder of the trials' files, N counting rounds.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import tune
    except ImportError as fault:  # ray without tune's own needs, too
        raise MissingExtra(
            "--ray needs ray", [("ray[tune]", "not installed")],
            "Type pip install 'eckart[sweeps]', or --processes 2 without it.",
        ) from fault  # fmt: skip
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    paths = {path.name: path for path in trials}
    waiting = {path.name: trial for path, trial in trials.items()}
    place = next(iter(trials)).absolute().parent.parent / "ray"
    gpus = float(torch.cuda.is_available())  # a run has a whole one

    def trainable(config: Mapping[str, Any], waiting: Mapping[str, Any]) -> None:
        tune.report({"numbers": dict(measure(waiting[config["file"]]))})

    class Ended(tune.Callback):  # type: ignore[misc]
        def on_trial_result(self, trial: Any, result: Any, **more: Any) -> None:
            if "numbers" in result:
                ended(paths[trial.config["file"]], dict(result["numbers"]))

    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trainable, waiting=waiting), {"cpu": 1.0, "gpu": gpus}
        ),
        param_space={"file": tune.grid_search(list(paths))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # a worker reads the model and the data once
            trial_dirname_creator=lambda trial: folder_of(waiting[trial.config["file"]]),
        ),
        run_config=tune.RunConfig(
            name=str(1 + len(list(place.glob("*")))),
            storage_path=str(place),
            verbose=0,
            callbacks=[Ended()],
            failure_config=tune.FailureConfig(max_failures=TRIES),
        ),
    )
    if errors := tuner.fit().errors:
        raise errors[0]


def folder_of(trial: Any) -> str:
    """What Tune's folder of a trial is called: what is run, and the beginning of its hash."""
    words = re.sub(r"[^\w.+:=-]+", "_", trial.described)
    return f"{words}_{trial.file.stem[:8]}"
