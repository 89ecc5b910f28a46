"""Runs of a bench as trials of Ray Tune: on the cluster that RAY_ADDRESS names, else here.

Tune places them, tries again what a lost node has taken, and keeps its own result folder
(`tensorboard --logdir`, `tune.ExperimentAnalysis`). What has ended is decided by the trials'
own files, as without Ray, so a bench may be begun on a cluster and resumed at home.
Model and data must be under the same path on every node; numbers are kept where it was started.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eckart.errors import MissingExtra, UsageError

TRIES = 2  # again, after a node or a worker is lost
PATIENCE = 10.0  # seconds for a cluster to answer; Ray itself waits for minutes
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the program's, as elsewhere
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints to stdout whatever the verbosity
    "RAY_worker_niceness": "0",  # 15 else: beside any other work a run hardly moves
}


class Cluster:
    """A connection to Ray. It ends with `close`, and with it all that runs there for us.

    Tune lets its workers go where it ends by itself, but not after Ctrl-C: they would hold
    the cores that the next round waits for. A connection that was there before is left.
    """

    def __init__(self) -> None:
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
        self.ray, self.tune, self.ours = ray, tune, not ray.is_initialized()
        if self.ours:
            require_answer(os.environ.get("RAY_ADDRESS", ""))
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is raised, and said

    def close(self) -> None:
        """Let go of what still runs."""
        if self.ours:
            self.ray.shutdown()

    def run(
        self,
        trials: Mapping[Path, Any],
        measure: Callable[[Any], Mapping[str, float]],
        ended: Callable[[Path, dict[str, float]], None],
    ) -> None:
        """Do all trials; `ended` is told of each as it reports. Raises the first one's error.

        Tune's results go into `ray/N` beside the folder of the trials' files, N counting rounds.
        """
        tune = self.tune
        paths = {path.name: path for path in trials}
        waiting = {path.name: trial for path, trial in trials.items()}
        place = next(iter(trials)).absolute().parent.parent / "ray"
        # a whole one for each run; asked of a cluster without, they would wait for ever
        gpus = min(1.0, self.ray.cluster_resources().get("GPU", 0.0))

        def trainable(config: Mapping[str, Any], waiting: Mapping[str, Any]) -> None:
            tune.report({"numbers": dict(measure(waiting[config["file"]]))})

        class Ended(tune.Callback):  # type: ignore[misc,name-defined]
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


def require_answer(address: str) -> None:
    """Raise UsageError where RAY_ADDRESS names a host and nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as fault:
        raise UsageError(
            "no Ray cluster answers",
            [(f"RAY_ADDRESS = {address}", str(fault))],
            "Start it (ray start --head), or unset RAY_ADDRESS for a local one.",
        ) from fault


def folder_of(trial: Any) -> str:
    """What Tune's folder of a trial is called: what is run, and the beginning of its hash."""
    words = re.sub(r"[^\w.+:=-]+", "_", trial.described)
    return f"{words}_{trial.file.stem[:8]}"
