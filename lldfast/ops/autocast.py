"""What torch's autocast means for an op that takes hidden states and a head."""

import torch
from torch import Tensor


def autocast_factors(hidden: Tensor, weight: Tensor, precision: str | None) -> tuple[Tensor, Tensor, str | None]:
    """Hidden states, weight and precision; under autocast those that a linear layer would multiply by. Sums stay in fp32."""
    device = hidden.device.type
    if precision is None and device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        if dtype == torch.bfloat16:
            return hidden, weight, "bf16"
        return hidden.to(dtype), weight.to(dtype), None
    return hidden, weight, precision
