"""Faster forms of plain functions. Importing it registers them; without it all still runs."""

from eckart.kernels.low_rank import fused_frozen_linear, fused_linear_plus_low_rank
from eckart.kernels.shared_input import together
from eckart.linear import alone, frozen_linear, kernels, linear_plus_low_rank

kernels[linear_plus_low_rank] = fused_linear_plus_low_rank
kernels[frozen_linear] = fused_frozen_linear
kernels[alone] = together
