"""What a checkpoint holds of a model and its optimizer, whatever backend trained it."""

from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, Any]  # part -> {name: tensor or Shard}, or -> what JSON can hold
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam and AdamW keep of each parameter (torch's names)


class Halt(ValueError):
    """Training can't go on, and starting it again would not help: raised on every worker alike, with one sentence."""


@dataclass(frozen=True)
class Shard:
    """A worker's share of a tensor that is spread over the workers."""

    values: torch.Tensor  # 1-D: the elements from `start` on of the flattened whole
    start: int
    shape: tuple[int, ...]  # of the whole


def adam_state(parameter: torch.Tensor, updates: int) -> dict[str, torch.Tensor]:
    """What torch's Adam keeps of a parameter after `updates` steps; its moments are still to be filled in."""
    # Where torch's fused Adam keeps its count: beside the parameter.
    step = torch.tensor(float(updates), dtype=torch.float32, device=parameter.device)
    return {
        "step": step,
        **{
            key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS
        },
    }
