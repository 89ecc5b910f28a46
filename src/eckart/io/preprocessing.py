"""Image preprocessing: resize, rescale and normalise to a model's input.

A model's own `preprocessor_config.json` is followed: size, crop, factor, mean and standard
deviation, as transformers' image processors interpret them. A model without one gets pixels from -1
to 1. The preprocessing is saved with the trained model, so that it is repeated. Nothing is random,
and neither torchvision nor, for arrays, PIL is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from eckart.errors import FileError, UsageError
from eckart.io.folder import write_text
from eckart.io.headers import read_json
from eckart.io.models import described, download, recognise, result_of

FILE = "preprocessor_config.json"
BYTE = 1 / 255  # the factor that brings bytes to 0 to 1
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: how bright the eye finds red, green and blue
CUBIC = 3  # PIL's number for bicubic; bilinear (2) is the other that image classifiers use
USUAL = 224  # height and width where nothing says them
UNCROPPED = 384  # from this size on ConvNeXt's processors warp instead of cutting out
KNOWN = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
ORDINARY = {  # of a processor that transformers builds for what we did
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "do_normalize": True,
}


@dataclass(frozen=True)
class Preprocessing:
    """Converts pixels [c, h, w] to a model's [channels, height, width], fp32."""

    height: int
    width: int
    channels: int = 3
    factor: float = BYTE
    mean: tuple[float, ...] = (0.5,)  # one for all channels, or one each
    std: tuple[float, ...] = (0.5,)
    shorter: int | None = None  # the shorter side becomes this, and the middle is cut out
    cubic: bool = False
    source: str = ""  # where this is from, for a person
    file: Mapping[str, Any] = field(default_factory=dict)  # the file it is from

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels at the model's size and channels, in their own value range; bytes stay bytes."""
        x = with_channels(torch.from_numpy(np.array(pixels, np.float32)), self.channels)
        if self.shorter is not None:
            x = middle(self.resized(x, *around(x, self.shorter)), self.height, self.width)
        else:
            x = self.resized(x, self.height, self.width)
        if pixels.dtype == np.uint8:
            x = x.round().clamp(0, 255).to(torch.uint8)
        return np.ascontiguousarray(x.numpy())

    def resized(self, x: Tensor, height: int, width: int) -> Tensor:
        """[c, h, w] -> [c, height, width], with antialiasing."""
        if x.shape[1:] == (height, width):
            return x
        mode = "bicubic" if self.cubic else "bilinear"
        whole = interpolate(x[None], (height, width), mode=mode, antialias=True)[0]
        return whole.clamp(x.min(), x.max())  # bicubic overshoots

    def scaled(self, pixels: np.ndarray) -> Tensor:
        """Resized pixels, rescaled and normalised for the model."""
        x = torch.from_numpy(np.array(pixels, np.float32)) * self.factor
        return (x - column(self.mean)) / column(self.std)

    def spanning(self, low: float, high: float) -> Preprocessing:
        """The same for arrays whose values go from `low` to `high` instead of 0 to 255."""
        factor = 1 / (high - low)
        return replace(
            self, factor=factor, mean=tuple(m + low * factor for m in self.mean), file={}
        )

    @property
    def for_bytes(self) -> bool:
        """Is the factor the usual one, of bytes?"""
        return abs(self.factor - BYTE) < 1e-6

    def described(self) -> str:
        """`224 x 224 x 3, cut out of 256; mean 0.5, deviation 0.5 (no ...)`."""
        cut = f", cut out of {self.shorter}" if self.shorter else ""
        size = f"{self.height} x {self.width} x {self.channels}{cut}"
        mean, std = (", ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        return f"{size}; mean {mean}, deviation {std} ({self.source})"

    def document(self) -> dict[str, Any]:
        """The content of preprocessor_config.json: the original file, or an equivalent one."""
        if self.file:
            return dict(self.file)
        size: dict[str, int] = {"height": self.height, "width": self.width}
        cut: dict[str, Any] = {"resample": CUBIC} if self.cubic else {}
        if self.shorter is not None:
            cut |= {"image_processor_type": "BitImageProcessor", "do_center_crop": True}
            cut |= {"crop_size": size}
        return {
            **ORDINARY,
            **cut,
            "size": size if self.shorter is None else {"shortest_edge": self.shorter},
            "rescale_factor": self.factor,
            "image_mean": each(self.mean, self.channels),
            "image_std": each(self.std, self.channels),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it beside a model or an adapter, like a tokenizer."""
        write_text(Path(folder) / FILE, json.dumps(self.document(), indent=2) + "\n")


def column(values: tuple[float, ...]) -> Tensor:
    """[c, 1, 1], to broadcast over pixels [c, h, w]."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def each(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) if len(values) == channels else list(values) * channels


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Convert pixels [c, h, w] to `channels`: grey repeated, colour weighted, alpha dropped."""
    x = x[:3] if x.shape[0] == 4 else x
    if channels == 1 and x.shape[0] == 3:
        return torch.einsum("chw,c->hw", x, torch.tensor(LUMA))[None]
    if channels == 3 and x.shape[0] == 1:
        return x.expand(3, -1, -1)
    if x.shape[0] != channels:
        raise UsageError(
            "the images have another number of channels than the model",
            [("images", str(x.shape[0])), ("model", str(channels))],
        )
    return x


def around(x: Tensor, shorter: int) -> tuple[int, int]:
    """The height and width at which the shorter side is `shorter`, as transformers rounds it."""
    height, width = x.shape[1:]
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def middle(x: Tensor, height: int, width: int) -> Tensor:
    """The centre crop of [c, h, w], zero-padded if it is smaller."""
    lack = (max(0, height - x.shape[1]), max(0, width - x.shape[2]))
    if any(lack):
        up, left = (lack[0] + 1) // 2, (lack[1] + 1) // 2
        x = torch.nn.functional.pad(x, (left, lack[1] - left, up, lack[0] - up))
    top, side = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, side : side + width]


# --- from a model --------------------------------------------------------------------------


def load_preprocessing(source: str | Path, shape: tuple[int, int] | None = None) -> Preprocessing:
    """The preprocessing of a model, an adapter or a run.

    From its own file, or its base's; otherwise from its configuration, with pixels from -1 to 1.
    `shape`: height and width if nothing else defines them. Raises FileError for a file with
    unsupported options.
    """
    facts = described(source)
    found = recognise(source)
    if found.kind == "run":
        return load_preprocessing(result_of(found.path), shape)
    if found.kind == "hub":
        return load_preprocessing(download(found.path), shape)
    file = Path(found.path) / FILE
    if file.is_file():
        return from_file(read_json(file), int(facts.get("num_channels") or 3), file)
    if found.base:
        return load_preprocessing(found.base, shape)
    return from_config(facts, shape)


def from_config(facts: Mapping[str, Any], shape: tuple[int, int] | None) -> Preprocessing:
    """The default preprocessing for a configuration."""
    size = facts.get("image_size") or (facts.get("vision_config") or {}).get("image_size")
    why = "the model's image_size" if size else "the images' own size"
    if not size and shape is None:
        size, why = USUAL, "the usual size"
    height, width = sides(size) if size else shape or (USUAL, USUAL)
    channels = int(facts.get("num_channels") or 3)
    return Preprocessing(height, width, channels, source=f"no {FILE}; {why}")


def from_file(facts: Mapping[str, Any], channels: int, file: Path) -> Preprocessing:
    """The preprocessing in preprocessor_config.json. Raises FileError for unsupported options."""
    unknown = [
        key for key, wanted in facts.items()
        if key.startswith("do_") and wanted is True and key not in KNOWN
    ]  # fmt: skip
    size = facts.get("size")
    if unknown or (size is None and facts.get("do_resize", True)):
        fact = f"{unknown[0]} is not known here" if unknown else "it names no size"
        raise FileError(
            "this preprocessing cannot be followed",
            [(str(file), fact)],
            "Type arrays that are prepared already (.npz), and remove the file.",
        )
    scales = facts.get("do_rescale", True)
    centres = facts.get("do_normalize", True)
    found = Preprocessing(
        *sides(size or facts.get("crop_size") or USUAL),
        channels=channels,
        factor=float(facts.get("rescale_factor", BYTE)) if scales else 1.0,
        mean=numbers(facts.get("image_mean", 0.5)) if centres else (0.0,),
        std=numbers(facts.get("image_std", 0.5)) if centres else (1.0,),
        cubic=facts.get("resample", 2) == CUBIC,
        source=FILE,
        file=facts,
    )
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if facts.get("do_center_crop"):
        height, width = sides(facts.get("crop_size") or USUAL)
        both = sides(size or USUAL)
        return replace(found, height=height, width=width, shorter=edge or min(both))
    if "crop_pct" in facts and (edge or found.height) < UNCROPPED:
        edge = edge or found.height
        return replace(found, shorter=int(edge / float(facts["crop_pct"])))
    return found


def sides(size: Any) -> tuple[int, int]:
    """Height and width, from any of the forms that configurations use."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        return int(size.get("height", edge)), int(size.get("width", edge))
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, list | tuple) else (float(values),)
