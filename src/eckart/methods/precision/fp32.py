"""fp32: every product in 32-bit floating point. The reference, and the choice on old CPUs."""

from dataclasses import dataclass
from typing import ClassVar

from eckart.recipe import Precision


@dataclass(frozen=True)
class FP32(Precision):
    """Weights and activations in fp32."""

    dtype: ClassVar = "float32"
