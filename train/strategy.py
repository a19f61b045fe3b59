"""How the work is spread over the workers, behind verbs that the loops use: prepare, backward, mean, barrier."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Ddp:
    """Replicated parameters, all-reduced gradients; one process of its own when no group was started.

    The gradient that `backward` leaves is the mean over the workers: a loss that is the mean over its
    micro-batch gives the mean over the global batch at any number of workers.
    """

    name = "ddp"

    def __init__(self, precision: str = "fp32", device: torch.device | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.device = device or torch.device("cpu")
        self.precision = precision

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module on this worker's device, wrapped where there is more than one worker.

        Buffers are not broadcast at each forward by default: two forwards before one backward (a GAN's
        critic) would find them changed in place.
        """
        module = module.to(self.device)
        if self.world_size == 1:
            return module
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for the operations that bear it when the run's precision is bf16."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are exchanged only with the last micro-batch of a step."""
        if last or not isinstance(module, DistributedDataParallel):
            yield
        else:
            with module.no_sync():
                yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Each value's mean over the workers; all of them must call it with the same keys."""
        if self.world_size == 1:
            return values
        keys = sorted(values)
        total = torch.tensor([values[key] for key in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return {key: float(value) / self.world_size for key, value in zip(keys, total.tolist(), strict=True)}

    def sum(self, values: list[float]) -> list[float]:
        """Each value's sum over the workers."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def unwrap(module: nn.Module) -> nn.Module:
    """The module behind a wrapper: what is saved, sampled and exported."""
    return module.module if isinstance(module, DistributedDataParallel) else module
