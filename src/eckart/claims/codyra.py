"""CoDyRA: fine-tune a small code model on four texts in sequence.

Source: H. Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual
Learning Vision-Language Models with Dynamic Rank-Selective LoRA", 2024, abstract: a higher
rank learns better and forgets more, and ranks that each matrix finds for itself learn as well
and forget the least.

The texts: prose, names of characters, the prose in ROT13, sums. The adapter is merged after each.
`loss` is the mean over all four texts at the end, which combines learning and retention;
`forgetting` is the mean increase over each text's best loss. To show that the learned choice of
ranks matters, two baselines use the ranks of a CoDyRA run at the same learning rate: components
dropped at random, and the best approximation of each task's update.

A run has 60 steps per text where the paper has 500, so the threshold is larger: its sum over a
task is 0.65 in both.
"""

import codecs
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch

from eckart.claims import UNTOUCHED, Arm, Claim, Lab, Quantities, Task, lower
from eckart.decompose import recompress
from eckart.io.corpora import Corpus, pydoc_prose
from eckart.linear import Term, seeded_generator
from eckart.methods import CoDyRA, LoRA
from eckart.methods.weights.codyra import Gated
from eckart.recipe import Handle, Recipe

DOCUMENTS, LENGTH = 48, 512
RANK, THRESHOLD = 16, 0.042  # 30 sparse steps at half of it on average sum to 0.65
Ranks = Mapping[str, int]
Prune = Callable[[Gated, str, int, int], None]  # (term, path, rank, seed)


# --- four texts ----------------------------------------------------------------------------


@cache
def texts() -> tuple[Corpus, ...]:
    """The four texts, about 25 kB each in 48 documents."""
    prose = tuple((name, text[:LENGTH]) for name, text in pydoc_prose().documents if text)
    prose = tuple(part for part in prose if len(part[1]) == LENGTH)[:DOCUMENTS]
    moved = tuple((name, codecs.encode(text, "rot13")) for name, text in prose)
    found = {"prose": prose, "names": names(), "moved": moved, "sums": sums()}
    return tuple(Corpus(name, documents) for name, documents in found.items())


def names() -> tuple[tuple[str, str], ...]:
    """A table of Unicode code points and their names."""
    named = (c for c in range(0x10000) if unicodedata.name(chr(c), ""))
    lines = (f"{code:04X} {unicodedata.name(chr(code))}\n" for code in named)
    return documents("names", lines)


def sums() -> tuple[tuple[str, str], ...]:
    """Lines such as `12 + 34 = 46`."""
    count = DOCUMENTS * LENGTH // 10  # a line has at least ten characters
    pairs = torch.randint(1000, (count, 2), generator=seeded_generator(0, "sums")).tolist()
    return documents("sums", (f"{a} + {b} = {a + b}\n" for a, b in pairs))


def documents(name: str, lines: Iterator[str]) -> tuple[tuple[str, str], ...]:
    """Concatenate lines and cut them into documents of equal length."""
    text = "".join(islice(lines, DOCUMENTS * LENGTH // 10))
    starts = range(0, DOCUMENTS * LENGTH, LENGTH)
    return tuple((f"{name} {i}", text[i : i + LENGTH]) for i in starts)


# --- one after the other -------------------------------------------------------------------


def stream(
    lab: Lab, recipe: Recipe, prune: Prune | None = None, ranks: list[Ranks] | None = None
) -> tuple[Quantities, list[Ranks]]:
    """Train on each text and merge; returns the quantities, and the merged ranks of each text.

    All texts so far are evaluated after each; `validation` and `loss` are means at the end.
    """
    labs = [lab.on(text) for text in texts()]
    steps, model = max(1, lab.steps // len(labs)), lab.model()
    losses: list[list[float]] = [[] for _ in labs]  # text -> after each training
    used, seconds, last = [], 0.0, []
    for i, there in enumerate(labs):
        trained = there.train(model, recipe, steps=steps)
        seconds += trained.quantities["seconds"]
        if prune is not None and ranks is not None:
            for path, term in terms_of(trained.handle).items():
                assert isinstance(term, Gated)
                prune(term, path, ranks[i][path], lab.seed)
        used.append(ranks_of(trained.handle))
        model = trained.handle.merge().train()
        last = [known.evaluate(model) for known in labs[: i + 1]]
        for of_text, found in zip(losses, last, strict=False):
            of_text.append(found["loss"])
    kept = [rank for by_site in used for rank in by_site.values()]
    lost = [of_text[-1] - min(of_text) for of_text in losses[:-1]]
    numbers = {
        "seconds": seconds,
        "loss": sum(found["loss"] for found in last) / len(labs),
        "validation": sum(found["validation"] for found in last) / len(labs),
        "learning": sum(of_text[0] for of_text in losses) / len(labs),
        "forgetting": sum(lost) / len(lost),
        "rank": sum(kept) / len(kept),
    }
    return numbers, used


def terms_of(handle: Handle) -> dict[str, Term]:
    return {path: next(iter(by_name.values())) for path, by_name in handle.terms().items()}


def ranks_of(handle: Handle) -> Ranks:
    """The number of components that are in use, by site."""
    found = {}
    for path, term in terms_of(handle).items():
        B, _ = term.factors() or (torch.zeros(0, 0), None)
        found[path] = B.shape[-1]
    return found


# --- what the arms do ----------------------------------------------------------------------


def codyra(**fields: Any) -> Recipe:
    return Recipe(CoDyRA(rank=RANK, threshold=THRESHOLD, **fields))


def fixed(rank: int) -> Recipe:
    return Recipe(LoRA(rank=rank, alpha=2 * rank))


def rank_1(lab: Lab) -> Quantities:
    return stream(lab, fixed(1))[0]


def rank_4(lab: Lab) -> Quantities:
    return stream(lab, fixed(4))[0]


def rank_16(lab: Lab) -> Quantities:
    return stream(lab, fixed(16))[0]


def adaptive(lab: Lab) -> Quantities:
    return stream(lab, codyra())[0]


def published(lab: Lab) -> Quantities:
    recipe = codyra(importance="gate", shrink="official", schedule="official", gates="normal")
    return stream(lab, recipe)[0]


def spectral(lab: Lab) -> Quantities:
    return stream(lab, codyra(importance="spectral"))[0]


def pruned(lab: Lab, prune: Prune) -> Quantities:
    """CoDyRA without a threshold, pruned after each text to the ranks that CoDyRA finds."""
    _, ranks = stream(lab, codyra())
    return stream(lab, Recipe(CoDyRA(rank=RANK, threshold=0.0)), prune, ranks)[0]


def at_random(lab: Lab) -> Quantities:
    return pruned(lab, drop_at_random)


def best_approximation(lab: Lab) -> Quantities:
    return pruned(lab, cut)


@torch.no_grad()
def drop_at_random(term: Gated, path: str, rank: int, seed: int) -> None:
    """Keep `rank` random components."""
    order = torch.randperm(len(term.s), generator=seeded_generator(seed, path))
    term.s[order[rank:]] = 0


@torch.no_grad()
def cut(term: Gated, path: str, rank: int, seed: int) -> None:
    """Replace the term by its best approximation of this rank."""
    B, A, _ = recompress(term.B * term.s, term.A, len(term.s))
    term.B.copy_(B)
    term.A.copy_(A)
    term.s.fill_(1.0)
    term.s[rank:] = 0


CLAIM = Claim(
    says="a larger rank forgets more; ranks found by each matrix forget less than the largest "
    "and end better than every fixed rank, and than the same ranks found otherwise",
    task=Task(steps=240),
    full=Task(steps=720),
    arms=(
        UNTOUCHED,
        Arm("rank 1", run=rank_1, lr=3e-3),
        Arm("rank 4", run=rank_4, lr=3e-3, full=True),
        Arm("rank 16", run=rank_16, lr=3e-3),
        Arm("CoDyRA", run=adaptive, lr=1e-2),
        Arm("at random", run=at_random, lr=1e-2),
        Arm("best approximation", run=best_approximation, lr=1e-2),
        Arm("as published", run=published, lr=1e-2, full=True),
        Arm("spectral", run=spectral, lr=1e-2, full=True),
    ),
    control=lower("rank 16", than="rank 1", by=0.02, quantity="learning"),
    statements=(
        lower("rank 1", than="rank 16", quantity="forgetting"),
        lower("CoDyRA", than="rank 16", quantity="forgetting"),
        *(lower("CoDyRA", than=f"rank {r}") for r in (1, 4, 16)),
        lower("CoDyRA", than="at random"),
        lower("CoDyRA", than="best approximation"),
        lower("CoDyRA", than="as published"),
    ),
    unseen="CLIP on eleven sets of images and what it still knows of others, language models of "
    "billions of parameters, orders of tasks",
)
