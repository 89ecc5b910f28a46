"""Interleaved timing for the comparisons in this folder, with ratios of neighbouring runs.

Times are processor seconds of one thread, so that other load on the machine has little effect;
a slow phase of the machine affects all candidates.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def take_turns(
    contenders: Mapping[str, Callable[[], object]], pairs: int = 9, repeat: int = 1
) -> dict[str, list[float]]:
    """Processor seconds of each candidate, `pairs` times in turn, after one warm-up each.

    The order is reversed every other time, since the previous run determines the caches' content.
    """
    torch.set_num_threads(1)
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    for _ in range(pairs):
        order.reverse()
        for name, run in order:
            start = time.process_time()
            for _ in range(repeat):
                run()
            seconds[name].append((time.process_time() - start) / repeat)
    return seconds


def ratios(over: list[float], under: list[float]) -> dict[str, float]:
    """The `spread` of ratios of neighbouring runs."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest, and a 95 % confidence interval `low` to `high` for the median.

    The interval's ends are two of the values (order statistics); valid from six values on.
    """
    ordered = sorted(values)
    outside = max(0, int(len(ordered) / 2 - 0.98 * len(ordered) ** 0.5))  # binomial(n, 1/2)
    found = {
        "min": ordered[0],
        "low": ordered[outside],
        "median": statistics.median(ordered),
        "high": ordered[-1 - outside],
        "max": ordered[-1],
    }
    return {name: round(value, 4) for name, value in found.items()}


def interval(found: Mapping[str, float]) -> str:
    """The median's confidence interval as text."""
    return f"{found['low']:.2f} to {found['high']:.2f}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of the libraries compared, and the machine."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def judge(name: str, value: float, aim: float, at_least: bool = True, remark: str = "") -> bool:
    """Print a figure with its aim, and whether it falls short."""
    met = value >= aim if at_least else value <= aim
    sign = ">=" if at_least else "<="
    words = f"{name}: {value:.3f} ({sign} {aim}){remark and f'  {remark}'}"
    print(f"{'met        ' if met else 'FALLS SHORT'}  {words}")
    return met


def write(name: str, result: Mapping[str, Any]) -> None:
    """Save the figures in results/NAME.json if --write is given."""
    if "--write" in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
