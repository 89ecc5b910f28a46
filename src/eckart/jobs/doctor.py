"""`eckart doctor`: lists installed packages, devices, and what each extra is for."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from textwrap import wrap
from typing import Any

import eckart
from eckart.recipe import registry

UNLOCKS = {  # extra -> the commands and examples that use it
    "peft": "PEFT itself, to load adapters without eckart",
    "images": "image files as data (arrays need nothing)",
    "quant": "precision=int8: a frozen base in 8 bits",
    "bitsandbytes": "bases that bitsandbytes holds in 4 or 8 bits",
    "trackers": "track=[tensorboard]: the curves of a run in TensorBoard",
    "sweeps": "eckart bench --sampler tpe (Optuna) and --ray (Ray Tune)",
    "claims": "eckart reproduce and bench, intervals in eckart eval, the digits as images",
}
GB = 1e9


@dataclass(frozen=True)
class Package:
    """A requirement: the version range, and the installed version ("" if missing)."""

    name: str
    least: str
    found: str

    @property
    def fits(self) -> bool:
        """Is it installed, in a version that fits?"""
        return bool(self.found) and numbers(self.found) >= numbers(self.least)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    leading = re.match(r"[\d.]*", text)
    return tuple(int(part) for part in (leading[0] if leading else "").split(".") if part)


def run(as_json: bool = False) -> dict[str, Any]:
    """Print what is there; returns the --json document. Exit 6 where a package is missing."""
    core, extras = packages()
    lacking = [p for p in core if not p.fits]
    found = {
        "command": "doctor",
        "exit": 6 if lacking else 0,
        "eckart": eckart.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {p.name: {"found": p.found or None, "needs": p.least} for p in core},
        "devices": [] if any(p.name == "torch" for p in lacking) else devices(),
        "methods": len(registry.methods()),
        "cache": cache(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "extras": {
            name: {
                "there": all(p.fits for p in needed),
                "packages": {p.name: p.found or None for p in needed},
                "unlocks": UNLOCKS.get(name, ""),
            }
            for name, needed in extras.items()
        },
    }
    if not as_json:
        for label, text in lines(found, core):
            print(f"{label:<10}{text}")
    return found


def packages() -> tuple[list[Package], dict[str, list[Package]]]:
    """The requirements of eckart and of each extra, from the package's metadata."""
    core: list[Package] = []
    extras: dict[str, list[Package]] = {name: [] for name in UNLOCKS}
    for text in requires("eckart") or []:
        wanted, _, condition = text.partition(";")
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:>=([\d.]+))?", wanted.strip())
        if match is None:
            continue
        package = Package(match[1], match[2] or "", installed(match[1]))
        extra = re.search(r"extra == '(\w+)'", condition)
        if extra is None:
            core.append(package)
        elif extra[1] in extras:
            extras[extra[1]].append(package)
    return core, extras


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def devices() -> list[dict[str, Any]]:
    """The CPU and each accelerator, with memory and bf16 support."""
    import torch

    from eckart.jobs.measuring.memory import room

    free, total = room(torch.device("cpu"))
    found: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "what": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use",
            "free_bytes": free,
            "total_bytes": total,
            "bf16": False,
        }
    ]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append(
            {
                "name": f"cuda:{i}",
                "what": torch.cuda.get_device_name(i),
                "free_bytes": free,
                "total_bytes": total,
                "bf16": torch.cuda.is_bf16_supported(),
            }
        )
    if torch.backends.mps.is_available():
        found.append({**found[0], "name": "mps", "what": "Apple GPU, shares the memory"})
    return found


def cache() -> dict[str, Any]:
    """The cache folder, its size in bytes and the free bytes on its disk."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("ECKART_CACHE") or Path(home) / "eckart")
    used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return {"folder": str(folder), "bytes": used, "free_bytes": free}


def lines(found: dict[str, Any], core: list[Package]) -> Iterator[tuple[str, str]]:
    """The printed lines as (label, text)."""
    yield "eckart", f"{found['eckart']}   Python {found['python']}, {found['system']}"
    yield "", sys.executable
    good = ", ".join(f"{p.name} {p.found}" for p in core if p.fits)
    for i, line in enumerate(wrap(good, 90)):
        yield "" if i else "packages", line
    for p in core:
        if not p.fits:
            what = f"{p.found} is older than {p.least}" if p.found else "is missing"
            yield "problem", f"{p.name} {what}: type pip install -U '{p.name}>={p.least}'"
    for i, device in enumerate(found["devices"]):
        memory = f"{device['free_bytes'] / GB:.1f} GB free of {device['total_bytes'] / GB:.1f}"
        bf16 = ", bf16" if device["bf16"] else ""
        text = f"{device['name']:<8}{device['what']}; {memory}{bf16}"
        yield "" if i else "devices", text
    yield "methods", f"{found['methods']}   eckart methods lists them"
    held = found["cache"]
    amounts = f"{held['bytes'] / 1e6:.0f} MB used, {held['free_bytes'] / GB:.0f} GB free"
    yield "cache", f"{held['folder']}   {amounts}"
    reach = (
        "HF_HUB_OFFLINE is set: nothing is fetched" if found["offline"] else "hub ids are fetched"
    )
    yield "network", reach
    for i, (name, extra) in enumerate(found["extras"].items()):
        state = "there" if extra["there"] else "missing"
        way = "" if extra["there"] else f"   pip install 'eckart[{name}]'"
        yield "" if i else "extras", f"{name:<14}{state:<10}{extra['unlocks']}{way}"
