"""Runs a bench's trials with Ray Tune: on the cluster at RAY_ADDRESS, else on this machine.

Tune schedules the trials, retries those of a lost node and writes its own result folder
(`tensorboard --logdir`, `tune.ExperimentAnalysis`). As without Ray, a trial is finished when its
file exists, so a bench started on a cluster can be resumed on one machine. Model and data must
have the same path on every node; results are written on the machine that started the bench.
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

TRIES = 2  # retries after a node or a worker is lost
PATIENCE = 10.0  # seconds to wait for a cluster; Ray itself waits for minutes
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled by us
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_AIR_NEW_OUTPUT": "0",  # it prints to stdout at any verbosity
    "RAY_worker_niceness": "0",  # the default, 15, starves runs beside any other work
}


class Cluster:
    """A connection to Ray; `close` ends it together with the workers.

    Tune releases its workers when it finishes, but not after Ctrl-C: they would keep the cores
    that the next round waits for. A connection that existed before is left open.
    """

    def __init__(self) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import ray
            from ray import tune
        except ImportError as fault:  # also where tune's dependencies are missing
            raise MissingExtra(
                "--ray needs ray", [("ray[tune]", "not installed")],
                "Type pip install 'eckart[sweeps]', or --processes 2 without it.",
            ) from fault  # fmt: skip
        self.ray, self.tune, self.ours = ray, tune, not ray.is_initialized()
        if self.ours:
            require_reachable(os.environ.get("RAY_ADDRESS", ""))
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are raised

    def close(self) -> None:
        """Disconnect, and stop what still runs."""
        if self.ours:
            self.ray.shutdown()

    def run(
        self,
        trials: Mapping[Path, Any],
        measure: Callable[[Any], Mapping[str, float]],
        ended: Callable[[Path, dict[str, float]], None],
    ) -> None:
        """Run all trials, calling `ended(path, numbers)` for each. Raises the first error.

        Tune's results go into `ray/N` beside the folder of the trials' files, N the round.
        """
        tune = self.tune
        paths = {path.name: path for path in trials}
        waiting = {path.name: trial for path, trial in trials.items()}
        place = next(iter(trials)).absolute().parent.parent / "ray"
        # one GPU for each run; on a cluster without GPUs, asking for one would wait for ever
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
                trial_dirname_creator=lambda trial: folder_name(waiting[trial.config["file"]]),
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


def require_reachable(address: str) -> None:
    """Raise UsageError where RAY_ADDRESS names a host that does not answer."""
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


def folder_name(trial: Any) -> str:
    """The name of Tune's folder for a trial: its description and the start of its hash."""
    words = re.sub(r"[^\w.+:=-]+", "_", trial.described)
    return f"{words}_{trial.file.stem[:8]}"
