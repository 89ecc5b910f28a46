"""Loads what the laws wrote, in a process that has seen nothing of it; prints JSON.

    python -m tests.laws.fresh FOLDER plain      transformers and PEFT alone
    python -m tests.laws.fresh FOLDER eckart     with `import eckart.hf`

FOLDER/ARCHITECTURE/ holds `base`, `batch.safetensors` and, for each method, its forms beside
`logits.safetensors`. For each form: the largest error as a share of the largest logit, or how
loading was refused.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def plain(cls: Any, method: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """How each form is loaded by those who do not have eckart."""
    from peft import PeftModel

    base = method.parent / "base"
    yield "dense", lambda: cls.from_pretrained(method / "dense")
    yield "peft", lambda: PeftModel.from_pretrained(cls.from_pretrained(base), method / "peft")
    yield "foreign", lambda: cls.from_pretrained(method / "foreign")
    yield "foreign", lambda: transformers.AutoConfig.from_pretrained(method / "foreign")


def eckart(cls: Any, method: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """How each form is loaded by those who have it."""
    import eckart.hf  # noqa: F401
    from eckart.io import native

    base = method.parent / "base"
    yield "native", lambda: native.load(cls.from_pretrained(base), method / "native").model
    yield "factored", lambda: cls.from_pretrained(method / "factored")
    yield "foreign", lambda: cls.from_pretrained(method / "foreign")


def outcome(load: Callable[[], Any], batch: dict[str, Any], expected: torch.Tensor) -> Any:
    try:
        model = load().eval()
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}"
    with torch.no_grad():
        found = model(**batch)["logits"]
    return float((found - expected).abs().max() / expected.abs().max())


def main(folder: Path, ways: Callable[..., Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for place in sorted(folder.iterdir()):
        name = json.loads((place / "base" / "config.json").read_text())["architectures"][0]
        batch = load_file(place / "batch.safetensors")
        for method in sorted(p for p in place.iterdir() if (p / "logits.safetensors").exists()):
            expected = load_file(method / "logits.safetensors")["logits"]
            for form, load in ways(getattr(transformers, name), method):
                if (method / form).exists():
                    case = f"{place.name}/{method.name}/{form}"
                    answers.setdefault(case, []).append(outcome(load, batch, expected))
    return answers


if __name__ == "__main__":
    where, who = sys.argv[1:]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # PEFT's, about keys that it reads once at the root
    answers = main(Path(where), {"plain": plain, "eckart": eckart}[who])
    assert (who == "plain") == ("eckart" not in sys.modules)
    print("RESULT " + json.dumps(answers))
