"""Finds labelled images: a folder per class, arrays in .npz, tables with an image column.

Nothing is decoded here; `images.py` makes rows of them.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from eckart.errors import FileError, MissingExtra, did_you_mean
from eckart.io.folder import sha256_of
from eckart.io.models import missing
from eckart.io.sources import dataset_in, files_below, matches

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PIXEL_NAMES = ("images", "image", "img", "pixel_values", "x", "X", "data")
CLASS_NAMES = ("labels", "label", "y", "target", "targets", "fine_label")
HELD_OUT = ("test", "validation", "valid", "val", "eval")
DIGITS = "digits"

Picture = np.ndarray | Path | bytes  # [c, h, w] in its own range, or something to decode


@dataclass(frozen=True)
class Found:
    """The content of a source, before it is split."""

    pictures: list[Picture]
    classes: list[str]
    where: list[str]
    held: list[bool] | None = None  # where the source itself says what is held out

    @cached_property
    def keys(self) -> list[bytes]:
        """Hashes of the contents: equal images are on the same side of the split."""
        return [content_of(picture) for picture in self.pictures]


def content_of(picture: Picture) -> bytes:
    """SHA-256 of an image as stored."""
    if isinstance(picture, Path):
        return bytes.fromhex(sha256_of(picture))
    raw = picture.tobytes() if isinstance(picture, np.ndarray) else picture
    return hashlib.sha256(raw).digest()


def holds_images(source: str) -> bool:
    """Is this a source of images, not of text? Decided by names, suffixes and columns.

    A folder is one if it has subfolders with more images than other data.
    """
    path = Path(source).expanduser()
    if not path.exists() and source == DIGITS:
        return True
    if (table := dataset_in(source)) is not None:
        return any(name in PIXEL_NAMES and is_picture(f) for name, f in table.features.items())
    if not path.exists():
        tables = tables_of(source)
        return bool(images_of(source) or (tables and in_columns(tables[0])))
    if path.is_dir():
        inside = files_below(path)
        pictures = [p for p in inside if p.suffix.lower() in IMAGES and p.parent != path]
        tables = [p for p in inside if p.suffix == ".parquet"]
        others = sum(p.suffix.lower() in (".txt", ".md", ".jsonl", ".json", ".csv") for p in inside)
        return len(pictures) > others or bool(tables and not others and in_columns(tables[0]))
    return path.suffix == ".npz" or (path.suffix == ".parquet" and in_columns(path))


def is_picture(feature: Any) -> bool:
    """Is this a column of images in `datasets`?"""
    return type(feature).__name__ == "Image"


def images_of(pattern: str) -> list[Path]:
    """The image files that match a glob."""
    return [path for path in matches(pattern) if path.suffix.lower() in IMAGES]


def tables_of(source: str) -> list[Path]:
    """The Parquet files of a folder or a glob."""
    path = Path(source).expanduser()
    found = files_below(path) if path.is_dir() else matches(source)
    return [p for p in found if p.suffix == ".parquet"]


def in_columns(path: Path) -> bool:
    """Does a Parquet file have a column of images, by name and type? False for a broken file."""
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pa.ArrowException, OSError):
        return False
    return any(name in PIXEL_NAMES and is_image(schema.field(name).type) for name in schema.names)


def is_image(kind: pa.DataType) -> bool:
    """Bytes, {bytes, path}, or rows of pixels."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or (
        nested and pa.types.is_nested(kind.value_type)
    )  # fmt: skip


def found_in(source: str) -> Found:
    """The images of a source of any kind. Raises FileError with the file."""
    path = Path(source).expanduser()
    if has_magic(source) and not path.exists():
        return of_files(images_of(source)) if images_of(source) else in_tables(tables_of(source))
    if not path.exists() and source == DIGITS:
        return digits()
    if (table := dataset_in(source)) is not None:
        return in_dataset(table, source)
    if not path.exists():
        raise missing(path)
    if path.is_dir():
        tables = tables_of(source)
        return in_tables(tables) if tables and in_columns(tables[0]) else in_folder(path)
    if path.suffix == ".npz":
        return in_npz(path)
    if path.suffix == ".parquet":
        return in_tables([path])
    raise FileError(
        "this is no file of images",
        [(source, path.suffix or "no ending")],
        "Type a folder with a folder per class, an .npz or a .parquet file.",
    )


def in_folder(root: Path) -> Found:
    """A folder per class; subfolders `train` and `test`, `val`, ... define the split."""
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
        if file.suffix.lower() in IMAGES and file.name[0] != "."
    ]
    if not files:
        raise FileError(
            "no images in this folder",
            [(str(root), f"no folder with {', '.join(IMAGES[:3])} files")],
            "Put the images of each class into a folder of its name.",
        )
    found = of_files([file for file, _, _ in files], [name for _, name, _ in files])
    held = [held for _, _, held in files] if len(parts) > 1 else None
    return replace(found, held=held)


def of_files(files: Sequence[Path], classes: Sequence[str] = ()) -> Found:
    """Image files with their classes, by default the names of their folders."""
    return Found(
        pictures=list(files),
        classes=list(classes) or [file.parent.name for file in files],
        where=[str(file) for file in files],
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
    """The array under one of the names. Raises FileError with the existing names."""
    for name in names:
        if name in arrays:
            return arrays[name]
    there = ", ".join(arrays) or "empty"
    choices = f"Name it {names[0]}: np.savez(FILE, images=pixels, labels=classes)"
    fix = next((f for a in arrays if (f := did_you_mean(a, names, " ")) != " "), choices)
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
    if pixels.dtype.kind not in "biuf" or not np.isfinite(pixels).all():
        raise FileError("the images hold values that are no numbers", [(where, str(pixels.dtype))])
    contents = [np.ascontiguousarray(p) for p in pixels]
    return Found(
        pictures=list(contents),
        classes=[str(label) for label in labels.tolist()],
        where=[f"{where}, image {i + 1}" for i in range(len(labels))],
    )


def in_tables(paths: Sequence[Path]) -> Found:
    """Parquet files of one kind, concatenated."""
    parts = [in_parquet(path) for path in paths]
    return Found(
        pictures=[x for part in parts for x in part.pictures],
        classes=[x for part in parts for x in part.classes],
        where=[x for part in parts for x in part.where],
    )


def in_parquet(path: Path) -> Found:
    """Columns image (encoded bytes, alone or as {bytes, path}; or rows of pixels) and label."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as fault:
        reason = str(fault).splitlines()[0]
        raise FileError("this is not parquet", [(str(path), reason)]) from fault
    return in_table(table, str(path))


def in_dataset(dataset: Any, source: str) -> Found:
    """A data set of `datasets`, with its class names if it has any."""
    found = in_table(dataset.with_format("arrow")[:], source)
    label = next(name for name in CLASS_NAMES if name in dataset.column_names)
    names = getattr(dataset.features[label], "names", None)
    classes = [names[int(c)] for c in found.classes] if names else found.classes
    return replace(found, classes=classes)


def in_table(table: pa.Table, path: str) -> Found:
    """The rows of a table with a column of images and one of labels."""
    columns = table.column_names
    pixel = next((n for n in PIXEL_NAMES if n in columns), None)
    label = next((n for n in CLASS_NAMES if n in columns), None)
    if pixel is None or label is None or not table.num_rows:
        lost = "image" if pixel is None else "label" if label is None else "row"
        raise FileError(f"the file has no {lost}", [(path, "columns " + ", ".join(columns))])
    classes = table[label].to_pylist()
    if None in classes:
        raise FileError("the row has no label", [(f"{path}, row {classes.index(None) + 1}", "")])
    values = table[pixel].to_pylist()
    contents = [encoded_in(v) if isinstance(v, dict) else v for v in values]
    if isinstance(contents[0], list):
        return in_arrays(same_shapes(contents, path), np.asarray(classes), path)
    encoded: list[Picture] = []
    for i, content in enumerate(contents, 1):
        if not isinstance(content, bytes | Path):
            raise FileError("a row has no image", [(f"{path}, row {i}", "no bytes")])
        encoded.append(content)
    return Found(
        pictures=encoded,
        classes=[str(c) for c in classes],
        where=[f"{path}, row {i + 1}" for i in range(len(encoded))],
    )


def encoded_in(entry: Mapping[str, Any]) -> bytes | Path | None:
    """The image of a {bytes, path} entry; the bytes if it has both."""
    path = entry.get("path")
    return entry.get("bytes") or (Path(path) if path and Path(path).is_file() else None)


def same_shapes(rows: Sequence[Any], path: str) -> np.ndarray:
    """Rows of pixels as one array. Raises FileError with the first of another shape."""
    shapes: list[tuple[int, ...]] = []
    for i, row in enumerate(rows, 1):
        try:
            shapes.append(np.shape(row))
        except ValueError as fault:
            raise FileError(
                "an image is no rectangle", [(f"{path}, row {i}", "rows of several lengths")]
            ) from fault
        if shapes[-1] != shapes[0]:
            fact = f"{list(shapes[-1])}, and {list(shapes[0])} in row 1"
            raise FileError(
                "the images have different shapes", [(f"{path}, row {i}", fact)],
                "Keep them as encoded bytes (PNG), which are fitted one by one.",
            )  # fmt: skip
    return np.asarray(rows)


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
    return in_arrays(bunch.images, bunch.target, DIGITS)


def decoded(picture: Path | bytes, where: str) -> np.ndarray:
    """An encoded image as uint8 [c, h, w], grey or RGB. Raises FileError with its name."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as fault:
        raise MissingExtra(
            "image files are decoded by Pillow, which is not installed",
            [(where, "")],
            "Type pip install 'eckart[images]', or arrays in an .npz file, which need none.",
        ) from fault
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if image.mode in ("I", "F"):
                raise FileError(
                    "the image does not say how bright its values are",
                    [(where, "numbers of 32 bits")],
                    "Keep such images as arrays: np.savez(FILE, images=pixels, labels=classes)",
                )
            if image.mode.startswith("I;16"):  # PIL would make all above 255 white
                return (np.asarray(image) >> 8).astype(np.uint8)[None]
            pixels = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as fault:
        known = isinstance(fault, UnidentifiedImageError)  # whose text names an object in memory
        reason = "no kind of image that is known" if known else str(fault).partition("\n")[0]
        raise FileError("the image cannot be read", [(where, reason)]) from fault
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
