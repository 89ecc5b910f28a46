"""bf16: the frozen base and the activations in bfloat16, what is trained in fp32.

Half the bytes of fp32 with its range and 8 bits of precision. Where the base itself is
trained it stays in fp32 and products run under autocast, so that small updates are not
rounded away.
"""

from dataclasses import dataclass
from typing import ClassVar

from eckart.recipe import Precision


@dataclass(frozen=True)
class BF16(Precision):
    """Frozen weights and activations in bf16; trained tensors in fp32."""

    dtype: ClassVar = "bfloat16"
