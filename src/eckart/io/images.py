"""Images and their classes: a folder per class, arrays in .npz, or a Parquet file.

Pixels reach the model as fp32 in [-1, 1], fitted to its size and channels. Images in files
are decoded when they are asked for; nothing is random, and torchvision is not needed.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from eckart.errors import FileError, MissingExtra, UsageError, did_you_mean
from eckart.io.folder import sha256_of
from eckart.io.models import missing

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PIXEL_NAMES = ("images", "image", "pixel_values", "x", "X", "data")
CLASS_NAMES = ("labels", "label", "y", "target", "targets")
HELD_OUT = ("test", "validation", "valid", "val", "eval")

Picture = np.ndarray | Path | bytes  # [c, h, w] in its own range, or something to decode


class ImageRows(Dataset[dict[str, Any]]):
    """Pictures with classes; a row is {pixel_values: [c, h, w] fp32 in [-1, 1], labels: int}."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        labels: Sequence[int],
        where: Sequence[str],
        size: int,
        channels: int,
        span: tuple[float, float],
    ):
        self.pictures = pictures
        self.labels = labels
        self.where = where
        self.size = size
        self.channels = channels
        self.span = span  # the values that become -1 and 1

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture = self.pictures[i]
        pixels = picture if isinstance(picture, np.ndarray) else opened(picture, self.where[i])
        low, high = self.span
        scaled = (torch.as_tensor(pixels, dtype=torch.float32) - low) * (2 / (high - low)) - 1
        return {
            "pixel_values": fitted(scaled, self.size, self.channels),
            "labels": self.labels[i],
        }


@dataclass(frozen=True)
class ImageData:
    """Images to train on and to evaluate on, as `text.Data` is for text."""

    train: ImageRows
    evaluation: dict[str, ImageRows]
    labels: tuple[str, ...]
    summary: str
    sha256: str
    format: str = "images"

    @property
    def collate(self) -> Any:
        """Rows of these data sets to a batch."""
        return collate_images


def collate_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows to pixel_values [b, c, h, w] and labels [b]."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@dataclass(frozen=True)
class Found:
    """What a source holds, before it is split."""

    pictures: list[Picture]
    classes: list[str]
    where: list[str]
    keys: list[bytes]  # hashes of the contents: equal images stay on one side of the split
    held: list[bool] | None = None  # where the source itself says what is held out


def read_images(source: str | Path, size: int, channels: int, eval: float = 0.2) -> ImageData:
    """Read labelled images for a model of this image size and number of channels.

    `source`: a folder with a folder per class (below train/ and test/ where it has these), an
    .npz file with images [n, h, w], [n, h, w, c] or [n, c, h, w] and labels [n], a Parquet
    file with the columns image and label, or "digits", scikit-learn's 8 x 8 digits. `eval`:
    the share of each class held out, by the hash of the image. Raises FileError by file.
    """
    if not 0 <= eval <= 0.5:
        fact = (f"data.eval = {eval}", "a share from 0 to 0.5")
        raise UsageError("data.eval is out of range", [fact])
    found = found_in(str(source))
    names = sorted(set(found.classes), key=lambda n: (0, int(n), "") if n.isdigit() else (1, 0, n))
    if len(names) < 2:
        raise FileError("the images have one class only", [(str(source), ", ".join(names))])
    labels = [names.index(c) for c in found.classes]
    held = found.held if found.held is not None else stratified(labels, found.keys, eval)
    span = span_of(found.pictures)

    def rows(which: bool) -> ImageRows:
        at = [i for i, h in enumerate(held) if h is which]
        return ImageRows(
            [found.pictures[i] for i in at],
            [labels[i] for i in at],
            [found.where[i] for i in at],
            size,
            channels,
            span,
        )

    train, test = rows(False), rows(True)
    name = Path(str(source)).name.split(".")[0]
    summary = (
        f"{name}: {len(labels):,} images of {len(names)} classes; loss on the class; "
        f"{len(test) / len(labels):.1%} held out; values {span[0]:g} to {span[1]:g} as -1 to 1"
    )
    digest = hashlib.sha256()
    for key, c in zip(found.keys, found.classes, strict=True):
        digest.update(key + c.encode())
    evaluation = {name: test} if len(test) else {}
    return ImageData(train, evaluation, tuple(names), summary, digest.hexdigest())


def stratified(labels: Sequence[int], keys: Sequence[bytes], share: float) -> list[bool]:
    """Of each class the share with the lowest hashes; at least one where it has two."""
    held = [False] * len(labels)
    for c in sorted(set(labels)):
        members = sorted((i for i, x in enumerate(labels) if x == c), key=lambda i: keys[i])
        count = max(round(share * len(members)), 1) if share and len(members) > 1 else 0
        for i in members[:count]:
            held[i] = True
    return held


def span_of(pictures: Sequence[Picture]) -> tuple[float, float]:
    """The values that become -1 and 1: 0 to 255 of bytes and files, else least and largest."""
    arrays = [p for p in pictures if isinstance(p, np.ndarray)]
    if not arrays or arrays[0].dtype == np.uint8:
        return 0.0, 255.0
    low = min(float(a.min()) for a in arrays)
    high = max(float(a.max()) for a in arrays)
    if not np.isfinite([low, high]).all() or low == high:
        raise FileError("the images hold no picture", [("values", f"{low:g} to {high:g}")])
    return low, high


def found_in(source: str) -> Found:
    """The images of a source, whichever kind it is."""
    path = Path(source).expanduser()
    if not path.exists():
        if source == "digits":
            return digits()
        raise missing(path)
    if path.is_dir():
        return in_folder(path)
    if path.suffix == ".npz":
        return in_npz(path)
    if path.suffix == ".parquet":
        return in_parquet(path)
    raise FileError(
        "this is no file of images",
        [(source, path.suffix or "no ending")],
        "Type a folder with a folder per class, an .npz or a .parquet file.",
    )


def in_folder(root: Path) -> Found:
    """A folder per class; `train` and one of `test`, `val`, ... split it where they are there."""
    below = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] != "."}
    test = next((below[name] for name in HELD_OUT if name in below), None)
    parts = [(root, False)]
    if "train" in below:
        parts = [(below["train"], False), *([(test, True)] if test else [])]
    files = [
        (file, folder.name, held)
        for part, held in parts
        for folder in sorted(p for p in part.iterdir() if p.is_dir() and p.name[0] != ".")
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGES
    ]
    if not files:
        raise FileError(
            "no images in this folder",
            [(str(root), f"no folder with {', '.join(IMAGES[:3])} files")],
            "Put the images of each class into a folder of its name.",
        )
    return Found(
        pictures=[file for file, _, _ in files],
        classes=[name for _, name, _ in files],
        where=[str(file) for file, _, _ in files],
        keys=[bytes.fromhex(sha256_of(file)) for file, _, _ in files],
        held=[held for _, _, held in files] if len(parts) > 1 else None,
    )


def in_npz(path: Path) -> Found:
    """Arrays by name, read without pickle."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as fault:
        raise FileError("this .npz cannot be read", [(str(path), str(fault))]) from fault
    pixels = named(arrays, PIXEL_NAMES, path)
    labels = named(arrays, CLASS_NAMES, path)
    return in_arrays(pixels, labels, str(path))


def named(arrays: Mapping[str, np.ndarray], names: Sequence[str], path: Path) -> np.ndarray:
    """The array under one of the names. Raises FileError with the names that are there."""
    for name in names:
        if name in arrays:
            return arrays[name]
    there = ", ".join(arrays) or "empty"
    fix = next((f for a in arrays if (f := did_you_mean(a, names, " ")) != " "), "")
    raise FileError(f"no array called {names[0]}", [(str(path), there)], fix)


def in_arrays(pixels: np.ndarray, labels: np.ndarray, where: str) -> Found:
    """Images [n, h, w], [n, h, w, c] or [n, c, h, w] with labels [n]."""
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[-1] in (1, 3, 4) and pixels.shape[1] not in (1, 3, 4):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or labels.ndim != 1 or len(pixels) != len(labels) or not len(labels):
        shapes = f"images {list(pixels.shape)}, labels {list(labels.shape)}"
        raise FileError("images and labels do not fit", [(where, shapes)])
    if pixels.dtype == object or not np.isfinite(pixels).all():
        raise FileError("the images hold values that are no numbers", [(where, str(pixels.dtype))])
    contents = [np.ascontiguousarray(p) for p in pixels]
    return Found(
        pictures=list(contents),
        classes=[str(label) for label in labels.tolist()],
        where=[f"{where}, image {i + 1}" for i in range(len(labels))],
        keys=[hashlib.sha256(p.tobytes()).digest() for p in contents],
    )


def in_parquet(path: Path) -> Found:
    """Columns image (encoded bytes, alone or as {bytes, path}) and label."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as fault:
        reason = str(fault).splitlines()[0]
        raise FileError("this is not parquet", [(str(path), reason)]) from fault
    columns = table.column_names
    pixel = next((n for n in PIXEL_NAMES if n in columns), None)
    label = next((n for n in CLASS_NAMES if n in columns), None)
    if pixel is None or label is None or not table.num_rows:
        lost = "image" if pixel is None else "label" if label is None else "row"
        raise FileError(f"the file has no {lost}", [(str(path), "columns " + ", ".join(columns))])
    values = table[pixel].to_pylist()
    contents = [v.get("bytes") if isinstance(v, dict) else v for v in values]
    if isinstance(contents[0], list):
        return in_arrays(np.asarray(contents), np.asarray(table[label].to_pylist()), str(path))
    encoded = [content for content in contents if isinstance(content, bytes)]
    if len(encoded) < len(contents):
        i = next(i for i, content in enumerate(contents, 1) if not isinstance(content, bytes))
        raise FileError("a row has no image", [(f"{path}, row {i}", "no bytes")])
    return Found(
        pictures=list(encoded),
        classes=[str(c) for c in table[label].to_pylist()],
        where=[f"{path}, row {i + 1}" for i in range(len(encoded))],
        keys=[hashlib.sha256(content).digest() for content in encoded],
    )


def digits() -> Found:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, values 0 to 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as fault:
        raise MissingExtra(
            "the digits come with scikit-learn, which is not installed",
            [("data.train = digits", "")],
            "Type: pip install eckart[claims]",
        ) from fault
    bunch = load_digits()
    return in_arrays(bunch.images, bunch.target, "digits")


def opened(picture: Path | bytes, where: str) -> np.ndarray:
    """An encoded image as uint8 [c, h, w], grey or RGB. Raises FileError by name."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            pixels = np.array(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as fault:
        raise FileError("the image cannot be read", [(where, str(fault))]) from fault
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# ITU-R BT.601: how bright the eye finds red, green and blue
LUMA = (0.299, 0.587, 0.114)


def fitted(pixels: Tensor, size: int, channels: int) -> Tensor:
    """Pixels [c, h, w] as [channels, size, size]: grey repeated, colour weighed, alpha dropped."""
    if pixels.shape[0] == 4:
        pixels = pixels[:3]
    if channels == 1 and pixels.shape[0] == 3:
        pixels = torch.einsum("chw,c->hw", pixels, torch.tensor(LUMA))[None]
    elif channels == 3 and pixels.shape[0] == 1:
        pixels = pixels.expand(3, -1, -1)
    if pixels.shape[0] != channels:
        raise UsageError(
            "the images have another number of channels than the model",
            [("images", str(pixels.shape[0])), ("model", str(channels))],
        )
    if pixels.shape[1:] != (size, size):
        whole = interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)
        return whole[0].clamp(-1, 1)
    return pixels.contiguous()
