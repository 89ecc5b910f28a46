"""Optional faster implementations of plain functions. Importing this package registers them."""

from eckart.kernels.low_rank import fused_frozen_linear, fused_linear_plus_low_rank
from eckart.kernels.shared_input import peers_at_once
from eckart.linear import frozen_linear, kernels, linear_plus_low_rank, linear_plus_term

kernels[linear_plus_low_rank] = fused_linear_plus_low_rank
kernels[frozen_linear] = fused_frozen_linear
kernels[linear_plus_term] = peers_at_once
