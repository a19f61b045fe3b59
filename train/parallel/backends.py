"""The choice of a backend."""

import torch

from train.config.sections import Config
from train.parallel.strategy import Ddp, Strategy


def build(config: Config, device: torch.device | None = None) -> Strategy:
    """Return the strategy that parallel.strategy names."""
    parallel = config.parallel
    if parallel.strategy == "ddp":
        return Ddp(parallel.precision, device)
    from train.parallel.zero import DeepSpeed  # DeepSpeed takes seconds to import

    return DeepSpeed(
        parallel.precision,
        device,
        parallel.zero_stage,
        parallel.offload,
        config.micro_size,
        config.accumulation,
    )
