"""DeepSpeed's ZeRO behind the verbs of train/parallel/strategy.py (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations").

Stage 0 replicates everything, 1 spreads the optimizer's state over the workers, 2 the gradients too, 3 the
parameters too. Checkpoints are not DeepSpeed's: each worker writes its shares under the parameters' names, so that any
number of workers, any stage, and DDP can go on from them, and nothing is pickled.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.parallel.state import MOMENTS, Shard, adam_state
from train.parallel.strategy import Learner, Strategy

BUCKET_ELEMENTS = 50_000_000  # exchanged at once; DeepSpeed's default of 5e8 costs 2 GB of buffers


class DeepSpeed(Strategy):
    """One DeepSpeed engine a learner. Needs a process group, also for one worker."""

    name = "deepspeed"

    def __init__(
        self,
        precision: str = "fp32",
        device: torch.device | None = None,
        stage: int = 1,
        offload: bool = False,
        micro_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        super().__init__(precision, device)
        self.stage, self.offload, self.micro_size, self.accumulation = (
            stage,
            offload,
            micro_size,
            accumulation,
        )
        self.deepspeed = _import(self.device)

    def _kind(self) -> "type[Learner]":
        return [_Replicated, _PartitionedOptimizer, _PartitionedOptimizer, _PartitionedParameters][
            self.stage
        ]

    def settings(self, clip: float | None) -> dict[str, Any]:
        """DeepSpeed's config."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": self.device.type == "cuda",
        }
        if self.stage == 3:
            # Small parameters would stay gathered, out of reach of what writes into the shares.
            zero["stage3_param_persistence_threshold"] = 0
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_size,
            "gradient_accumulation_steps": self.accumulation,
            # DeepSpeed would clip to 1.0 where nothing is said; stage 0 is clipped by us, which tells the norm.
            "gradient_clipping": float(clip or 0) if self.stage else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own are compiled on first use
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if self.precision == "bf16":
            # No module's gradients are exchanged in bfloat16: they are summed in fp32, as under DDP.
            settings["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        return settings


def _import(device: torch.device) -> Any:
    """DeepSpeed, kept from compiling anything."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives would be compiled at the first initialize(); gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings(
        "ignore",
        message=r".*(all_gather_into_tensor|reduce_scatter_tensor).*",
        category=FutureWarning,
    )
    return deepspeed


class _Engine(Learner):
    """A learner whose module is a DeepSpeed engine."""

    strategy: DeepSpeed

    def _wrap(self, module: nn.Module) -> Any:
        assert dist.is_initialized(), "DeepSpeed needs a process group"
        settings = self.strategy.settings(self.clip)
        return self.strategy.deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=settings, dist_init_required=False
        )[0]

    @property
    def zero(self) -> Any:
        """DeepSpeed's own optimizer around torch's."""
        return self.module.optimizer

    @contextmanager
    def accumulating(self, number: int, parts: int) -> Iterator[None]:
        assert parts == self.strategy.accumulation, (parts, self.strategy.accumulation)
        self._parts = parts
        self.module.set_gradient_accumulation_boundary(number == parts - 1)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss / self._parts, scale_wrt_gas=False)

    def step(self) -> torch.Tensor | None:
        self.module.step()
        return None if self.clip is None else torch.as_tensor(self.module.get_global_grad_norm())


class _Replicated(_Engine):
    """Stage 0: the optimizer is torch's own over whole parameters."""

    def step(self) -> torch.Tensor | None:
        norm = self._clip()
        self.module.step()
        return norm


class _PartitionedOptimizer(_Engine):
    """Stages 1 and 2: a group's parameters are laid end to end, and each worker owns an equal run of that line."""

    def _moments(self) -> dict[str, torch.Tensor | Shard]:
        found: dict[str, torch.Tensor | Shard] = {}
        if not self._updates():
            return found
        for name, parameter, flat, place in self._owned():
            here, whole = place.hp_fragment_address, place.lp_fragment_address
            for key in MOMENTS:
                values = self.optimizer.state[flat][key].narrow(0, here.start, here.numel)
                found[f"{key}/{name}"] = Shard(values, whole.start, tuple(parameter.shape))
        return found

    def _set_moments(self, saved: Any, updates: int) -> None:
        for flat in self.zero.single_partition_of_fp32_groups:
            self.optimizer.state[flat] = adam_state(flat, updates)
        for name, _, flat, place in self._owned():
            here, whole = place.hp_fragment_address, place.lp_fragment_address
            for key in MOMENTS:
                values = saved[f"{key}/{name}"].flatten().narrow(0, whole.start, whole.numel)
                self.optimizer.state[flat][key].narrow(0, here.start, here.numel).copy_(values)

    def _owned(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor, Any]]:
        """The parameters of which this worker owns a part: name, parameter, the owned run, and where the part lies in both."""
        for name, parameter in self.core.named_parameters():
            place = parameter._hp_mapping  # type: ignore[attr-defined]  # deepspeed.utils.tensor_fragment
            if place is not None:
                yield (
                    name,
                    parameter,
                    self.zero.single_partition_of_fp32_groups[place.param_group_index],
                    place,
                )


class _PartitionedParameters(_Engine):
    """Stage 3: each worker owns an equal part of every parameter, the last one padded."""

    def local(self) -> dict[str, torch.Tensor]:
        self.zero._partition_all_parameters()  # what a forward has gathered is a copy that a write to the shares would not reach
        return {
            name: self._owned(parameter, parameter.ds_tensor.data)  # type: ignore[attr-defined]
            for name, parameter in self.core.named_parameters()
        }

    def as_shards(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Shard]:
        return {
            name: self._shard(self.core.get_parameter(name), value)
            for name, value in values.items()
            if value.numel()
        }

    def local_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        parameter = self.core.get_parameter(name)
        start = self._start(parameter)
        return whole.flatten()[start : start + parameter.ds_tensor.numel()]  # type: ignore[attr-defined]

    def _moments(self) -> dict[str, torch.Tensor | Shard]:
        found: dict[str, torch.Tensor | Shard] = {}
        for name, parameter in self.core.named_parameters():
            for key in MOMENTS:
                values = self._owned(
                    parameter,
                    self.strategy.deepspeed.utils.safe_get_local_optimizer_state(parameter, key),
                )
                if values.numel():
                    found[f"{key}/{name}"] = self._shard(parameter, values)
        return found

    def _set_moments(self, saved: Any, updates: int) -> None:
        for flat in self.zero.fp32_partitioned_groups_flat:
            self.optimizer.state[flat] = adam_state(flat, updates)
        for name, parameter in self.core.named_parameters():
            for key in MOMENTS:
                padded = torch.zeros_like(parameter.ds_tensor.data, dtype=torch.float32)  # type: ignore[attr-defined]
                values = self.local_part(name, saved[f"{key}/{name}"])
                padded[: values.numel()].copy_(values)
                self.strategy.deepspeed.utils.safe_set_local_optimizer_state(parameter, padded, key)

    def _start(self, parameter: Any) -> int:
        return self.strategy.rank * parameter.ds_tensor.numel()

    def _owned(self, parameter: Any, padded: torch.Tensor) -> torch.Tensor:
        """A worker's share without the padding at the end of the last one's."""
        return padded.flatten()[: max(parameter.ds_numel - self._start(parameter), 0)]

    def _shard(self, parameter: Any, values: torch.Tensor) -> Shard:
        return Shard(values, self._start(parameter), tuple(parameter.ds_shape))
