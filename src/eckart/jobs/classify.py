"""`eckart generate` for a classifier: the most probable classes of each prompt.

A prompt is a text (a tagger classifies each of its words) or the path of an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.io.heads import names_of
from eckart.io.image_sources import decoded
from eckart.io.models import load_tokenizer, missing
from eckart.io.opening import open_model
from eckart.io.packing import IGNORE
from eckart.io.preprocessing import load_preprocessing
from eckart.io.text import Encoder
from eckart.jobs.settings.config import Job

MOST = 5  # classes that are shown
Choices = list[tuple[str, float]]  # names with probabilities, highest first


def run(job: Job, task: str, prompts: Sequence[str], begun: float) -> Mapping[str, Any]:
    """Print the classes of each prompt, or return them in the --json document."""
    assert job.model is not None
    if words := job.options.get("adapter"):
        raise UsageError(
            "--adapter is for models that go on from a text", [(words[0], task)],
            f"Type eckart generate {words[0].partition('=')[2]} -p TEXT",
        )  # fmt: skip
    model = open_model(job.model).model.eval()
    found = CLASSIFY[task](model, job.model, prompts)
    if not job.flags.json:
        for prompt, entries in zip(prompts, found, strict=True):
            print(prompt)
            for word, choices in entries:
                shares = "   ".join(f"{name} {p:.3f}" for name, p in choices)
                print(f"  {word}   {shares}" if word else f"  {shares}")
    texts = [
        {
            "prompt": prompt,
            "classes": [
                {**({"word": word} if word else {}), "class": choices[0][0],
                 "probabilities": dict(choices)}
                for word, choices in entries
            ],
        }
        for prompt, entries in zip(prompts, found, strict=True)
    ]  # fmt: skip
    seconds = time.monotonic() - begun
    return {"command": "generate", "exit": 0, "seconds": seconds, "texts": texts}


Entries = list[tuple[str, Choices]]  # what was classified, "" for the whole prompt


@torch.inference_mode()
def of_texts(model: Any, source: str, prompts: Sequence[str]) -> list[Entries]:
    """The class of each text."""
    tokenizer = load_tokenizer(source)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found.append([("", choices_of(model, model(input_ids=ids).logits[0]))])
    return found


@torch.inference_mode()
def of_words(model: Any, source: str, prompts: Sequence[str]) -> list[Entries]:
    """The tag of each word, predicted at its first token."""
    tokenizer = load_tokenizer(source)
    found = []
    for prompt in prompts:
        encoder = Encoder(tokenizer, seq_len=10**6)
        ids, first = encoder.words(prompt.split())
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        at = [i for i, word in enumerate(first) if word != IGNORE]
        words = prompt.split()
        found.append([(words[first[i]], choices_of(model, logits[i])) for i in at])
    return found


@torch.inference_mode()
def of_images(model: Any, source: str, prompts: Sequence[str]) -> list[Entries]:
    """The class of each image file."""
    preprocessing = load_preprocessing(source)
    found = []
    for prompt in prompts:
        path = Path(prompt).expanduser()
        if not path.is_file():
            raise missing(path)
        pixels = preprocessing.scaled(preprocessing.fit(decoded(path, prompt)))
        found.append([("", choices_of(model, model(pixel_values=pixels[None]).logits[0]))])
    return found


def choices_of(model: Any, logits: Tensor) -> Choices:
    """The most probable classes with their probabilities."""
    top = logits.float().softmax(-1).topk(min(MOST, len(logits)))
    names = names_of(model)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(names[i], p) for i, p in pairs]


CLASSIFY: dict[str, Callable[[Any, str, Sequence[str]], list[Entries]]] = {
    "classification": of_texts,
    "tagging": of_words,
    "image": of_images,
}
