"""int8: the frozen matrices of attention and mlp in 8 bits, a scale for each row.

    W_ij ~ s_i q_ij,   q_ij in -127..127,   s_i = max_j |W_ij| / 127

A quarter of the bytes of fp32, half of bf16, and an error of at most s_i / 2 an entry. What is
trained beside it stays fp32 and learns on the quantised matrices; activations are not
quantised. Take it when the base does not fit; training is no faster, since every product first
makes the matrix again.

The kernels are torchao's. The way back is the file that the model came from: remove() leaves
the quantised base, and an adapter that is written names the base as it was before, on which it
can be merged (its outputs shift by the rounding, which `eckart eval --against` measures).
Embeddings, heads, norms, fused experts and GPT-2's transposed maps stay as they are.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from eckart.errors import MissingExtra, UsageError
from eckart.linear import Site
from eckart.linear.sites import quantised
from eckart.recipe import Precision


@dataclass(frozen=True)
class Int8(Precision):
    """Frozen matrices in 8 bits, what is trained in fp32."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations and of what is not quantised."""

    converts: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype", self.compute)  # how the base is loaded

    def convert(self, sites: Sequence[Site]) -> None:
        chosen = [s for s in sites if s.kind == "linear" and s.role[:3] in ("att", "mlp")]
        if not chosen:
            kinds = sorted({site.kind for site in sites})
            raise UsageError(
                "int8 finds no matrix that it can hold",
                [("precision = int8", "linear maps in attention and mlp"),
                 ("this model", f"{', '.join(kinds) or 'none'}")],
                "Type precision=bf16.",
            )  # fmt: skip
        quantize, config = torchao()
        ours = {id(site.module) for site in chosen if not quantised(site.raw)}
        for site in chosen:
            quantize(site.module, config, filter_fn=lambda module, _: id(module) in ours)


def torchao() -> tuple[Any, Any]:
    """torchao's function and its choice of 8-bit weights. Raises MissingExtra without it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that kernels of other GPUs do not load is no news
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as fault:
        raise MissingExtra(
            "precision=int8 needs torchao",
            [("torchao", "not installed")],
            "Type pip install 'eckart[quant]'.",
        ) from fault
    finally:
        logging.disable(before)
    return quantize_, Int8WeightOnlyConfig()
