"""How training is distributed over the workers, as methods that are the same for every backend.

    learner = strategy.learner("model", model, optimizer, clip=1.0, saved=state)
    for number, micro_batch in enumerate(micro_batches):
        with learner.accumulating(number, len(micro_batches)), strategy.autocast():
            loss = learner(micro_batch)
        learner.backward(loss)
    norm = learner.step()

This file has DDP; DeepSpeed is in train/parallel/zero.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.parallel.state import MOMENTS, Halt, Shard, State, adam_state


class Strategy:
    """What all backends have in common: this worker's rank, and collective operations.

    Args:
        precision: "fp32", "bf16" or "fp16".
        device: this worker's; the CPU by default.
    """

    name = ""

    def __init__(self, precision: str = "fp32", device: torch.device | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.device = device or torch.device("cpu")
        self.precision = precision

    def learner(
        self,
        name: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float | None = None,
        saved: State | None = None,
        model: nn.Module | None = None,
    ) -> "Learner":
        """Return the learner that trains `module`.

        Args:
            name: of its parts of a checkpoint: `name`, `name_optimizer`, `name_progress`.
            module: is on this worker's device and has its weights, restored ones included.
            optimizer: torch's Adam or AdamW over the module's parameters.
            clip: the largest gradient norm; 0 measures the norm without clipping, None does
                neither.
            saved: the state of the checkpoint to resume from.
            model: the submodule of `module` whose parameters a checkpoint holds; by default
                `module`.
        """
        learner = self._learner_class()(self, name, module, optimizer, clip, model)
        if saved is not None:
            learner.restore(saved)
        return learner

    def _learner_class(self) -> "type[Learner]":
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context in which operations that support it run in the run's precision."""
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Return the mean of each value over the workers, which all call it with the same keys."""
        if self.world_size == 1:
            return values
        keys = sorted(values)
        total = torch.tensor([values[key] for key in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return {
            key: float(value) / self.world_size
            for key, value in zip(keys, total.tolist(), strict=True)
        }

    def sum(self, values: list[float]) -> list[float]:
        """Return the sum of each value over the workers."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def from_rank_0(self, function: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Call `function` on rank 0 and return its result on every worker; the others wait.

        Raises:
            Halt: it raised a ValueError; raised on every worker.
        """
        result: list[dict[str, float] | str] = [{}]
        if self.rank == 0:
            try:
                result = [function()]
            except ValueError as problem:
                result = [str(problem)]
        if self.world_size > 1:
            dist.broadcast_object_list(result, device=self.device)
        if isinstance(result[0], str):
            raise Halt(result[0])
        return result[0]

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()


class Learner:
    """A module and its optimizer on one worker, with DDP: replicated parameters, all-reduced
    gradients.

    The gradient that `backward` leaves is the mean over workers and micro-batches: a loss that is
    a mean over its micro-batch gives the mean over the global batch, whatever the number of
    workers.

    Args: as for `Strategy.learner`.
    """

    def __init__(
        self,
        strategy: Strategy,
        name: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.strategy, self.name, self.optimizer, self.clip = strategy, name, optimizer, clip
        self.model = model or module
        self.module = self._wrap(module)
        """What a forward pass goes through."""
        self.scaler = (
            torch.amp.GradScaler(strategy.device.type) if strategy.precision == "fp16" else None
        )
        self._micro_batches = 1

    # Any: DDP's module, or DeepSpeed's engine, which has no types.
    def _wrap(self, module: nn.Module) -> Any:
        if self.strategy.world_size == 1:
            return module
        device = self.strategy.device
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            # Broadcast buffers would change between two forward passes before one backward pass
            # (a GAN's critic), which autograd refuses.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self.module(*args, **kwargs)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @contextmanager
    def accumulating(self, number: int, micro_batches: int) -> Iterator[None]:
        """Wrap the forward and backward pass of micro-batch `number` (from 0) of `micro_batches`.

        Gradients are exchanged in the last one only.
        """
        self._micro_batches = micro_batches
        ddp = self.module if isinstance(self.module, DistributedDataParallel) else None
        last = number == micro_batches - 1
        with nullcontext() if ddp is None or last else ddp.no_sync():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, divided by the number of
        micro-batches."""
        loss = loss / self._micro_batches
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()

    def warm_up(self, loss: Callable[[], torch.Tensor]) -> None:
        """Run one backward pass and discard its gradients, where the first step of a process would
        otherwise differ from later ones.

        DDP rebuilds its buckets after the first backward pass. With more than two workers the
        position in a bucket decides the order in which an element is summed, so a resumed run
        would differ from an uninterrupted one in the last bits.

        Args:
            loss: computes the loss of any micro-batch.
        """
        if isinstance(self.module, DistributedDataParallel) and self.strategy.world_size > 2:
            loss().backward()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> torch.Tensor | None:
        """Update the parameters and clear the gradients.

        Returns:
            The gradient's norm before clipping; None where `clip` is None. With fp16 an update
            whose gradients overflowed is skipped, and the norm is infinite or NaN.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> torch.Tensor | None:
        """Clip replicated gradients; return their norm before that."""
        if self.clip is None:
            return None
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or math.inf)

    def metrics(self, norm: torch.Tensor | None) -> dict[str, float]:
        """Return grad_norm, and with fp16 loss_scale.

        Args:
            norm: what `step` returned.
        """
        metrics = {} if norm is None else {"grad_norm": float(norm)}
        if self.scaler is not None:
            metrics["loss_scale"] = self.scaler.get_scale()
            if not math.isfinite(metrics.get("grad_norm", 0.0)):
                # The update was skipped and the scale reduced: this is no divergence.
                del metrics["grad_norm"]
        return metrics

    # ---- what a checkpoint holds

    def state(self) -> State:
        """Return all that a resumed run needs, by the names of the parameters.

        It does not depend on the backend or the number of workers.
        """
        progress: dict[str, Any] = {"updates": self._updates()}
        if self.scaler is not None:
            progress["scaler"] = self.scaler.state_dict()
        return {
            self.name: self.as_shards(self.local()) | dict(self.model.named_buffers()),
            f"{self.name}_optimizer": self._moments(),
            f"{self.name}_progress": progress,
        }

    def restore(self, saved: State) -> None:
        """Load what `state` returned, with any backend and at any number of workers; the model has
        its weights already."""
        progress = saved[f"{self.name}_progress"]
        # Without updates there are no moments: fp16 has skipped all of them so far, or only a
        # GAN's other net was updated.
        if progress["updates"]:
            self._set_moments(saved[f"{self.name}_optimizer"], progress["updates"])
        if self.scaler is not None:
            self.scaler.load_state_dict(progress["scaler"])

    def local(self) -> dict[str, torch.Tensor]:
        """Return this worker's part of the weights by name, to be read and written in place."""
        return {name: parameter.data for name, parameter in self.model.named_parameters()}

    def as_shards(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Shard]:
        """Return tensors shaped like those of `local` as a checkpoint takes them: as `Shard`s
        where the backend shards parameters."""
        return dict(values)

    def local_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Return this worker's part of a whole tensor, shaped like that of `local`."""
        return whole

    def _updates(self) -> int:
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def _moments(self) -> dict[str, torch.Tensor | Shard]:
        """Return Adam's moments as {"exp_avg/<parameter>": ...}."""
        state = self.optimizer.state
        return {
            f"{key}/{name}": state[p][key]
            for name, p in self.model.named_parameters()
            if p in state
            for key in MOMENTS
        }

    def _set_moments(self, saved: Mapping[str, torch.Tensor], updates: int) -> None:
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = adam_state(parameter, updates)
            for key in MOMENTS:
                self.optimizer.state[parameter][key].copy_(saved[f"{key}/{name}"])


class Ddp(Strategy):
    """PyTorch's DistributedDataParallel; with one worker the module itself."""

    name = "ddp"

    def _learner_class(self) -> type[Learner]:
        return Learner
