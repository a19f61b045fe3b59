"""The GPT's learning rate schedule."""

import math

from train.gpt.config import GptConfig


def learning_rate(config: GptConfig, step: int) -> float:
    """Return the learning rate of update `step` (from 0): linear warm-up, then constant for
    optim.hold of the steps, then decayed to zero at the last step as optim.schedule says."""
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    held = max(optim.warmup_steps, int(optim.hold * config.steps))
    if optim.schedule == "constant" or step < held:
        return optim.lr
    left = (config.steps - step) / max(config.steps - held, 1)  # 1 -> 0
    if optim.schedule == "linear":
        return optim.lr * left
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (1 - left)))
