"""Labelled images as rows for training: recognised, split, resized and cached.

`image_sources.py` finds the images and `preprocessing.py` converts them for a model. Resized pixels
are cached between runs, under the hash of the images and of the size, so that each image is decoded
once; sets too large for that are decoded on access, to the same bits. Nothing is random.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from eckart.errors import EckartError, FileError, UsageError
from eckart.io.data import Data, cache_folder
from eckart.io.folder import close_with_manifest, manifest_holds, write_folder
from eckart.io.image_sources import Found, Picture, decoded, found_in
from eckart.io.preprocessing import Preprocessing
from eckart.io.reading import in_order
from eckart.io.sources import DataSource, held_out_share, sources_of

CACHE_VERSION = 1  # to increase when the preprocessing changes
KEPT = 4 * 10**9  # bytes of resized pixels up to which a source is cached
BRIGHTEST = 4.0  # a factor that brings 255 above it is not for bytes: 1/255 gives 1, 1/127.5 2
USUAL = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))  # ranges in which people keep pixels


class ImageRows(Dataset[dict[str, Any]]):
    """Images with classes; a row is {pixel_values: [c, h, w] fp32, labels: int}."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        labels: Sequence[int],
        where: Sequence[str],
        preprocessing: Preprocessing,
    ):
        self.pictures = pictures
        self.labels = labels
        self.where = where
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = pixels_of(self.pictures[i], self.where[i])
        fitted = self.preprocessing.fit(pixels)
        return {"pixel_values": self.preprocessing.scaled(fitted), "labels": self.labels[i]}

    def select(self, chosen: Sequence[int]) -> ImageRows:
        """Some of the rows, in the order given."""
        return ImageRows(
            [self.pictures[i] for i in chosen],
            [self.labels[i] for i in chosen],
            [self.where[i] for i in chosen],
            self.preprocessing,
        )


@dataclass(frozen=True)
class ImageData(Data):
    """Images for training and evaluation."""

    preprocessing: Preprocessing | None = field(default=None, kw_only=True)
    """What was done to them, to be saved with the model."""

    @property
    def collate(self) -> Any:
        """The function that collates rows of these data sets to a batch."""
        return collate_images

    def lengths(self, rows: Any) -> list[int]:
        """All equal; no image is decoded for this."""
        return [1] * len(rows)

    def unit(self, count: int) -> str:
        return f"{count:,} images"

    def keeping(self, reader: Any) -> Any:
        """The preprocessing that was applied, with the detected value range of arrays."""
        return self.preprocessing or reader


def collate_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows to pixel_values [b, c, h, w] and labels [b]."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def read_images(source: str | Path, size: int, channels: int, eval: float = 0.2) -> ImageData:
    """Read labelled images for a model of this image size and number of channels.

    `source`: a folder with a folder per class (below train/ and test/ where it has these), an
    .npz file with images [n, h, w], [n, h, w, c] or [n, c, h, w] and labels [n], a Parquet
    file with the columns image and label, or "digits", scikit-learn's 8 x 8 digits. `eval`:
    the share of each class held out, by the hash of the image. Pixels reach the model from -1
    to 1. Raises FileError by file.
    """
    plain = Preprocessing(size, size, channels, source="as asked")
    return read([str(source)], plain, eval, cache=False)


def read(
    sources: Any,
    preprocessing: Preprocessing,
    eval: Any = 0.02,
    labels: Sequence[str] = (),
    cache: bool = True,
) -> ImageData:
    """Read, split and fit images for a model that takes what `preprocessing` makes of them.

    `sources` and `eval` as `text.read` takes them; with no sources those of `eval` are all
    there is. `labels` are the classes in the order of the model's numbers; without them they
    are the data's, numbers by size and names by alphabet. Raises FileError by file and image.
    """
    given, (share, others) = sources_of(sources), held_out_share(eval)
    found = [found_in(str(source.path)) for source in [*given, *others]]
    names = list(labels) or in_order({c for one in found for c in one.classes})
    if len(names) < 2:
        raise FileError(
            "the images have one class only",
            [(str([*given, *others][0].path), ", ".join(names))],
            "Type the folder that has a folder for each class.",
        )
    made = ranged(preprocessing, [p for one in found for p in one.pictures])
    train: list[tuple[ImageRows, list[int]]] = []
    evaluation: dict[str, ImageRows] = {}
    lines, hashes = [], {}
    for i, (source, one) in enumerate(zip([*given, *others], found, strict=True)):
        numbers = [names.index(c) for c in one.classes]
        rows = ImageRows(fitted(one, made, cache), numbers, one.where, made)
        hashes[source.name] = hash_of(one)
        if i >= len(given):  # a source named for evaluation
            evaluation[source.name] = rows
            note = "for evaluation" if given else ""
        else:
            held = one.held if one.held is not None else stratified(numbers, one.keys, share)
            learnt = repeated([i for i, h in enumerate(held) if not h], source)
            train.append((rows, learnt))
            if any(held):
                evaluation[source.name] = rows.select([i for i, h in enumerate(held) if h])
            note = f"{sum(held) / len(held):.1%} held out" if any(held) else "nothing held out"
        count = f"{len(one.pictures):,} images of {len(set(one.classes))} classes"
        lines.append(source.described(count, "loss on the class", note))
    lines.append(made.described())
    kept = joined(train, made)
    if given and not len(kept):
        raise FileError("nothing to train on", [(s.name, "no images left") for s in given])
    return ImageData(
        format="image+label",
        summary="\n".join(lines),
        example=example_of(kept if len(kept) else next(iter(evaluation.values())), names),
        hashes=hashes,
        labels=tuple(names),
        task="image",
        train=kept,
        evaluation=evaluation,
        preprocessing=made,
    )


def stratified(labels: Sequence[int], keys: Sequence[bytes], share: float) -> list[bool]:
    """For each class the share with the lowest hashes; at least one if it has two."""
    held = [False] * len(labels)
    for c in sorted(set(labels)):
        members = sorted((i for i, x in enumerate(labels) if x == c), key=lambda i: keys[i])
        count = max(round(share * len(members)), 1) if share and len(members) > 1 else 0
        for i in members[:count]:
            held[i] = True
    return held


def repeated(indices: Sequence[int], source: DataSource) -> list[int]:
    """Rows `weight` times: whole copies, and an even share of one more."""
    whole, share = divmod(source.weight, 1)
    extra = [i for n, i in enumerate(indices) if int((n + 1) * share) > int(n * share)]
    return [*list(indices) * int(whole), *extra]


def joined(parts: Sequence[tuple[ImageRows, Sequence[int]]], made: Preprocessing) -> ImageRows:
    """The chosen rows of several sources, concatenated."""
    chosen = [rows.select(indices) for rows, indices in parts]
    return ImageRows(
        [p for rows in chosen for p in rows.pictures],
        [x for rows in chosen for x in rows.labels],
        [w for rows in chosen for w in rows.where],
        made,
    )


def hash_of(found: Found) -> str:
    """SHA-256 over all images with their classes."""
    digest = hashlib.sha256()
    for key, c in zip(found.keys, found.classes, strict=True):
        digest.update(key + c.encode())
    return digest.hexdigest()


# --- pixels --------------------------------------------------------------------------------


def pixels_of(picture: Picture, where: str) -> np.ndarray:
    """[c, h, w], decoded if it is a file."""
    return picture if isinstance(picture, np.ndarray) else decoded(picture, where)


def ranged(preprocessing: Preprocessing, pictures: Sequence[Picture]) -> Preprocessing:
    """The preprocessing for the value range of these arrays, if they are not bytes.

    A preprocessing with its own rescale factor was made for such arrays, and is unchanged. Raises
    FileError if all values are equal, or outside the range that the factor is for.
    """
    arrays = [p for p in pictures if isinstance(p, np.ndarray) and p.dtype != np.uint8]
    if len(arrays) < len(pictures) and 255 * preprocessing.factor > BRIGHTEST:
        most = f"values up to {1 / preprocessing.factor:.3g}"
        raise FileError(
            "the images exceed the model's range of values",
            [("the images", "bytes, up to 255"), (preprocessing.source, most)],
            "Keep them as arrays in that range (.npz), as those that it was taught with.",
        )
    if not arrays or not preprocessing.for_bytes:
        return preprocessing
    if len(arrays) < len(pictures):
        raise UsageError(
            "images in files and arrays of other numbers cannot be mixed",
            [("arrays", str(arrays[0].dtype)), ("files", "bytes from 0 to 255")],
            "Keep the arrays as uint8.",
        )
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    if low == high:
        raise FileError("all values of the images are equal", [("values", f"{low:g} to {high:g}")])
    usual = (r for r in USUAL if r[0] <= low and high <= r[1] and high > r[1] / 2)
    return preprocessing.spanning(*next(usual, (low, high)))


def fitted(found: Found, preprocessing: Preprocessing, cache: bool) -> Sequence[Picture]:
    """The images at the model's size: cached and memory-mapped, or else the originals.

    If they are to be cached every image is decoded, so that a broken one is reported at once.
    """
    p = preprocessing
    geometry = [CACHE_VERSION, p.height, p.width, p.channels, p.shorter, p.cubic]
    first = pixels_of(found.pictures[0], found.where[0])
    each = p.height * p.width * p.channels * (1 if first.dtype == np.uint8 else 4)
    if not cache or each * len(found.pictures) > KEPT:
        return found.pictures
    name = hashlib.sha256(json.dumps(geometry).encode() + b"".join(found.keys)).hexdigest()[:32]
    folder = cache_folder() / "images" / name
    if not manifest_holds(folder):
        made = np.stack(
            [
                p.fit(pixels_of(picture, where))
                for picture, where in zip(found.pictures, found.where, strict=True)
            ]
        )
        try:
            with write_folder(folder, overwrite=True) as beside:
                np.save(beside / "pixels.npy", made)
                close_with_manifest(beside)
        except EckartError:  # a cache that cannot be written is done without
            return list(made)
    return list(np.load(folder / "pixels.npy", mmap_mode="r"))


# --- what is said --------------------------------------------------------------------------


def example_of(rows: ImageRows, names: Sequence[str]) -> str:
    """A description of the first image: its size, the model's input, and its class."""
    pixels = pixels_of(rows.pictures[0], rows.where[0])
    c, height, width = pixels.shape
    seen = rows[0]["pixel_values"]
    low, high, mean = (float(x) for x in (seen.min(), seen.max(), seen.mean()))
    return (
        f"{height} x {width} x {c}, seen from {low:.2f} to {high:.2f}, mean {mean:.2f} "
        f"«{names[rows.labels[0]]}»"
    )
