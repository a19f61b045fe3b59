"""The part of a checkpoint that holds a model and its optimizer, the same for every backend."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

# By part: {name: tensor or Shard}, or JSON.
State: TypeAlias = dict[str, Mapping[str, Any]]
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's moments


class Halt(ValueError):
    """Training cannot continue, and a restart would not help; raised on every worker alike.

    The message is one sentence.
    """


@dataclass(frozen=True)
class Shard:
    """A worker's shard of a tensor."""

    values: torch.Tensor
    """1-D: the elements from `start` on of the flattened whole."""
    start: int
    shape: tuple[int, ...]
    """Of the whole."""


def adam_state(parameter: torch.Tensor, updates: int) -> dict[str, torch.Tensor]:
    """Return what torch's Adam keeps of a parameter after `updates` steps, with moments of zero."""
    # Torch's fused Adam keeps its step count on the parameter's device.
    step = torch.tensor(float(updates), dtype=torch.float32, device=parameter.device)
    moments = {
        key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS
    }
    return {"step": step, **moments}
