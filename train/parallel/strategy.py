"""How the work is spread over the workers, behind verbs that the loops use whatever the backend.

    learner = strategy.learner("model", model, optimizer, clip=1.0, saved=state)
    for number, part in enumerate(parts):
        with learner.accumulating(number, len(parts)), strategy.autocast():
            loss = learner(part)
        learner.backward(loss)
    norm = learner.step()

Here: DDP. DeepSpeed, behind the same verbs: train/parallel/zero.py.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.parallel.state import MOMENTS, Halt, Shard, State, adam_state


class Strategy:
    """What every backend has in common: who this worker is, and the exchange of figures."""

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
        core: nn.Module | None = None,
    ) -> "Learner":
        """What trains `module`, which is on this worker's device and has its weights, saved ones included.

        Args:
            name: of its parts of a checkpoint: `name`, `name_optimizer`, `name_progress`.
            optimizer: torch's Adam or AdamW over the module's parameters.
            clip: the largest gradient norm; 0 measures the norm and does not clip, None does not measure it.
            saved: a checkpoint's state, to go on from.
            core: the module inside `module` that is saved under its own names; by default `module`.
        """
        learner = self._kind()(self, name, module, optimizer, clip, core)
        if saved is not None:
            learner.restore(saved)
        return learner

    def _kind(self) -> "type[Learner]":
        """Which backend's learner trains."""
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 or float16 for the operations that bear it, as the run's precision says."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float16
        )

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Each value's mean over the workers; all of them must call it with the same keys."""
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
        """Each value's sum over the workers."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def from_rank_0(self, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What rank 0 makes, on every worker; the others wait.

        Raises:
            Halt: rank 0 met a ValueError: on every worker alike.
        """
        found: list[dict[str, float] | str] = [{}]
        if self.rank == 0:
            try:
                found = [make()]
            except ValueError as problem:
                found = [str(problem)]
        if self.world_size > 1:
            dist.broadcast_object_list(found, device=self.device)
        if isinstance(found[0], str):
            raise Halt(found[0])
        return found[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


class Learner:
    """A module, its optimizer and what steps them, on one worker: replicated parameters, all-reduced gradients.

    The gradient that `backward` leaves is the mean over the workers and the micro-batches: a loss that is the
    mean over its micro-batch gives the mean over the global batch at any number of workers.
    """

    def __init__(
        self,
        strategy: Strategy,
        name: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float | None = None,
        core: nn.Module | None = None,
    ) -> None:
        self.strategy, self.name, self.optimizer, self.clip = strategy, name, optimizer, clip
        self.core = core or module
        self.module = self._wrap(module)  # what a forward goes through
        self.scaler = (
            torch.amp.GradScaler(strategy.device.type) if strategy.precision == "fp16" else None
        )
        self._parts = 1

    def _wrap(self, module: nn.Module) -> Any:
        if self.strategy.world_size == 1:
            return module
        device = self.strategy.device
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            # Buffers are not broadcast at each forward: two forwards before one backward (a GAN's critic) would find them
            # changed in place.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @contextmanager
    def accumulating(self, number: int, parts: int) -> Iterator[None]:
        """Around the forward and backward of micro-batch `number` of `parts`: gradients are exchanged with the last one only."""
        self._parts = parts
        wrapper = self.module if isinstance(self.module, DistributedDataParallel) else None
        with wrapper.no_sync() if wrapper is not None and number < parts - 1 else nullcontext():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's mean loss, divided by the number of micro-batches."""
        loss = loss / self._parts
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()

    def warm_up(self, loss: Callable[[], torch.Tensor]) -> None:
        """One backward whose gradients are thrown away, before the first step of a process, where that step would differ from later ones.

        DDP orders its buckets anew after the first backward it sees. With more than two workers the place in a bucket
        decides in which order an element is summed: a resumed run would differ from an uninterrupted one in the last bits.
        """
        if isinstance(self.module, DistributedDataParallel) and self.strategy.world_size > 2:
            loss().backward()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> torch.Tensor | None:
        """One update and gradients cleared; the gradient's norm before it was clipped (None where clip is None).

        With fp16 an update whose gradients overflowed is left out, and the norm is infinite or NaN.
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
        """Clips whole gradients; their norm before it."""
        return (
            None
            if self.clip is None
            else nn.utils.clip_grad_norm_(self.core.parameters(), self.clip or math.inf)
        )

    def metrics(self, norm: torch.Tensor | None) -> dict[str, float]:
        """What is worth watching of a step: the gradient's norm, and the scale that keeps fp16 gradients in range."""
        found = {} if norm is None else {"grad_norm": float(norm)}
        if self.scaler is not None:
            found["loss_scale"] = self.scaler.get_scale()
            if not math.isfinite(found.get("grad_norm", 0.0)):
                del found[
                    "grad_norm"
                ]  # this update was left out, and the scale is lower now: no divergence
        return found

    # ------------------------------------------------------------ what a checkpoint holds

    def state(self) -> State:
        """All that a resumed run needs of it, under parameters' names: no trace of the backend or the number of workers."""
        progress: dict[str, Any] = {"updates": self._updates()}
        if self.scaler is not None:
            progress["scaler"] = self.scaler.state_dict()
        return {
            self.name: self.as_shards(self.local()) | dict(self.core.named_buffers()),
            f"{self.name}_optimizer": self._moments(),
            f"{self.name}_progress": progress,
        }

    def restore(self, saved: State) -> None:
        """Goes on from what `state` gave, at any number of workers and with any backend; the weights are there already."""
        progress = saved[f"{self.name}_progress"]
        if progress[
            "updates"
        ]:  # else there are no moments yet: fp16 has left out every update so far, or it is the other net's turn
            self._set_moments(saved[f"{self.name}_optimizer"], progress["updates"])
        if self.scaler is not None:
            self.scaler.load_state_dict(progress["scaler"])

    def local(self) -> dict[str, torch.Tensor]:
        """This worker's share of the weights by name, to be read and written in place."""
        return {name: parameter.data for name, parameter in self.core.named_parameters()}

    def as_shards(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Shard]:
        """Tensors shaped like `local`'s as what a checkpoint takes: as they are, or as shares of a whole."""
        return dict(values)

    def local_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What of a whole tensor belongs to this worker, shaped like `local`'s."""
        return whole

    def _updates(self) -> int:
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def _moments(self) -> dict[str, torch.Tensor | Shard]:
        """Adam's moments as {"exp_avg/<parameter>": ...}."""
        state = self.optimizer.state
        return {
            f"{key}/{name}": state[p][key]
            for name, p in self.core.named_parameters()
            if p in state
            for key in MOMENTS
        }

    def _set_moments(self, saved: Any, updates: int) -> None:
        for name, parameter in self.core.named_parameters():
            self.optimizer.state[parameter] = adam_state(parameter, updates)
            for key in MOMENTS:
                self.optimizer.state[parameter][key].copy_(saved[f"{key}/{name}"])


class Ddp(Strategy):
    """PyTorch's DistributedDataParallel; a process of its own where there is one worker."""

    name = "ddp"

    def _kind(self) -> type[Learner]:
        return Learner
