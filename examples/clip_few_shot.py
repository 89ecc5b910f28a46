"""Few images per class, classes named by prompts: Block-LoRA on both towers of a CLIP model.

    python examples/clip_few_shot.py [IMAGES] [SHOTS] [STEPS] [MODEL]

IMAGES is a folder with a folder per class, an .npz file of arrays, or "digits". The head is
the text tower's own words for each class, computed anew at every step since that tower is
trained too: a few prompts at a time, so that a thousand classes fit. MODEL is a CLIP folder;
without one a tiny model is built, which first learns the leading two thirds of the classes
and is then shown the others. Offline.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

import eckart
from eckart.io import Shuffled, read_images

END, VOCABULARY = 257, 258  # bytes, then the end of a prompt, at which CLIP reads it out
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tiny_clip() -> CLIPModel:
    """A CLIP of two small towers, random."""
    text = {**TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 48}
    text |= {"bos_token_id": 256, "eos_token_id": END, "pad_token_id": 0}
    vision = {**TOWER, "image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def prompts(classes: Sequence[str], source: str) -> dict[str, Tensor]:
    """A sentence for each class as tokens [c, t], cut after the end token."""
    sentences = [f"a photo of {name}" for name in classes]
    if source:
        tokens = AutoTokenizer.from_pretrained(source)(sentences, padding=True)
        return {k: torch.tensor(tokens[k]) for k in ("input_ids", "attention_mask")}
    rows = [[*sentence.encode(), END] for sentence in sentences]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def features(output: object) -> Tensor:
    """A tower's projected features [b, d], of length 1."""
    return normalize(getattr(output, "pooler_output", output), dim=-1)


def few_shot_loss(
    model: CLIPModel, batch: dict[str, Tensor], words: dict[str, Tensor], chunk: int = 64
) -> Tensor:
    """Backward of the cross-entropy over all prompts [c, t], `chunk` prompts at a time.

    Exact: the text features are computed once without a graph, the loss gives their gradient,
    and each chunk is computed again to pass its share of it on. Returns the loss.
    """
    parts = [{k: v[i : i + chunk] for k, v in words.items()} for i in range(0, count(words), chunk)]
    with torch.no_grad():
        heads = torch.cat([features(model.get_text_features(**part)) for part in parts])
    heads.requires_grad_()
    image = features(model.get_image_features(pixel_values=batch["pixel_values"]))
    loss = cross_entropy(model.logit_scale.exp() * image @ heads.mT, batch["labels"])
    loss.backward()
    assert heads.grad is not None
    for part, gradient in zip(parts, heads.grad.split(chunk), strict=True):
        features(model.get_text_features(**part)).backward(gradient)
    return loss.detach()


def count(words: dict[str, Tensor]) -> int:
    return len(words["input_ids"])


@torch.no_grad()
def accuracy(model: CLIPModel, images: Dataset, words: dict[str, Tensor], collate) -> float:
    heads, right, seen = features(model.get_text_features(**words)), 0, 0
    for batch in DataLoader(images, 64, collate_fn=collate):
        image = features(model.get_image_features(pixel_values=batch["pixel_values"]))
        right += int(((image @ heads.mT).argmax(-1) == batch["labels"]).sum())
        seen += len(batch["labels"])
    return right / seen


class Of(Dataset):
    """Images of some classes, these counted from 0, at most so many of each."""

    def __init__(self, images: Subset | Dataset, classes: Sequence[int], most: int = sys.maxsize):
        left = dict.fromkeys(classes, most)
        self.images, self.classes, self.at = images, list(classes), []
        for i, label in enumerate(images.labels):
            if left.get(label, 0):
                self.at.append(i)
                left[label] -= 1

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, i: int) -> dict:
        row = self.images[self.at[i]]
        return {**row, "labels": self.classes.index(row["labels"])}


def train(model, optimizer, images: Dataset, words, collate, steps: int) -> list[float]:
    losses: list[float] = []
    while len(losses) < steps:
        order = Shuffled(len(images), len(losses))
        for batch in DataLoader(images, 16, sampler=order, collate_fn=collate):
            losses.append(few_shot_loss(model, batch, words).item())
            optimizer.step()
            optimizer.zero_grad()
            if len(losses) == steps:
                break
    return losses


def main(
    images: str = "digits", shots: int = 8, steps: int = 60, source: str = "", out: str = "out/clip"
) -> tuple[float, float]:
    """Accuracy on held-out images of the new classes, before and after."""
    torch.manual_seed(0)
    model = CLIPModel.from_pretrained(source) if source else tiny_clip()
    vision = model.config.vision_config
    data = read_images(images, vision.image_size, vision.num_channels)
    held_out = next(iter(data.evaluation.values()))
    new = range(len(data.labels))
    if not source:
        split = 2 * len(data.labels) // 3 if len(data.labels) > 4 else 0
        known, new = range(split or len(data.labels)), range(split, len(data.labels))
        words = prompts([data.labels[c] for c in known], source)
        plain = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, plain, Of(data.train, known, 50), words, data.collate, 5 * steps)
        score = accuracy(model, Of(held_out, known), words, data.collate)
        print(f"built here: {score:.1%} right on the {len(known)} classes it was shown")

    words = prompts([data.labels[c] for c in new], source)
    few, test = Of(data.train, new, shots), Of(held_out, new)
    weights = eckart.BlockLoRA(rank=16, blocks=4, targets=("attn.q", "attn.k", "attn.v"))
    handle = eckart.attach(model, eckart.Recipe(weights=weights), steps=steps, lr=5e-3)
    print(handle.coverage)
    before = accuracy(model, test, words, data.collate)
    train(model, handle.optimizer(clip=1.0), few, words, data.collate, steps)
    after = accuracy(model, test, words, data.collate)
    print(f"{shots} images each of {len(new)} new classes: {before:.1%} -> {after:.1%} right")
    eckart.export(handle, out, "peft", overwrite=True)
    return before, after


if __name__ == "__main__":
    words_ = sys.argv[1:]
    main(*words_[:1], *map(int, words_[1:3]), *words_[3:4])
