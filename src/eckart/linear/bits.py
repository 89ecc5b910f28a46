"""Packs small integers, several to a byte, as files store them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [*, k] of 1, 2, 4 or 8 bits as uint8 [*, ceil(k bits / 8)], lowest bits first."""
    each = 8 // bits
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    return (codes << places(bits, codes)).sum(-1, dtype=torch.uint8)


def unpacked(held: Tensor, bits: int, k: int) -> Tensor:
    """The codes [*, k] that were packed into these bytes, uint8."""
    return (held.unsqueeze(-1) >> places(bits, held) & 2**bits - 1).flatten(-2)[..., :k]


def places(bits: int, like: Tensor) -> Tensor:
    """The bit offset of each code in a byte."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)
