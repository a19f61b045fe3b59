"""DeepSpeed's ZeRO behind the methods of train/parallel/strategy.py.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".

Stage 0 replicates everything; stage 1 partitions the optimizer state over the workers, stage 2
the gradients too, stage 3 the parameters too. Checkpoints are not DeepSpeed's: each worker writes
its shards under the parameters' names, so that any number of workers, any stage, and DDP can
resume from them, and nothing is pickled.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.parallel.state import MOMENTS, Shard, adam_state
from train.parallel.strategy import Learner, Strategy

# Exchanged at once; DeepSpeed's default of 5e8 needs buffers of 2 GB.
BUCKET_ELEMENTS = 50_000_000


class DeepSpeed(Strategy):
    """One DeepSpeed engine per learner. Needs a process group, also for one worker.

    Args:
        precision: "fp32" or "bf16".
        device: this worker's; the CPU by default.
        stage: of ZeRO, 0 to 3.
        offload: keep the optimizer state in CPU memory.
        micro_size: samples that a worker processes at once.
        accumulation: micro-batches per step.
    """

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
        self.stage, self.offload = stage, offload
        self.micro_size, self.accumulation = micro_size, accumulation
        self.deepspeed = _import(self.device)

    def _learner_class(self) -> "type[Learner]":
        partitioned = _PartitionedOptimizer
        return [_Replicated, partitioned, partitioned, _PartitionedParameters][self.stage]

    def settings(self, clip: float | None) -> dict[str, Any]:
        """Return DeepSpeed's config."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": self.device.type == "cuda",
        }
        if self.stage == 3:
            # Small parameters would stay gathered, and writes to their shards would be lost.
            zero["stage3_param_persistence_threshold"] = 0
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_size,
            "gradient_accumulation_steps": self.accumulation,
            # DeepSpeed's default is 1.0. In stage 0 `_Replicated` clips, which returns the norm.
            "gradient_clipping": float(clip or 0) if self.stage else 0.0,
            "zero_optimization": zero,
            # torch's AdamW: DeepSpeed's own optimizers are compiled on first use.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if self.precision == "bf16":
            # Without "safe" modules all gradients are summed in fp32, as under DDP.
            settings["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        return settings


def _import(device: torch.device) -> Any:
    """Import DeepSpeed and keep it from compiling anything."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops

    # initialize() would compile its shared-memory collectives; gloo replaces them.
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
        """DeepSpeed's optimizer, which wraps torch's."""
        return self.module.optimizer

    @contextmanager
    def accumulating(self, number: int, micro_batches: int) -> Iterator[None]:
        expected = self.strategy.accumulation
        assert micro_batches == expected, (micro_batches, expected)
        self._micro_batches = micro_batches
        self.module.set_gradient_accumulation_boundary(number == micro_batches - 1)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss / self._micro_batches, scale_wrt_gas=False)

    def step(self) -> torch.Tensor | None:
        self.module.step()
        return None if self.clip is None else torch.as_tensor(self.module.get_global_grad_norm())


class _Replicated(_Engine):
    """Stage 0: torch's own optimizer over whole parameters."""

    def step(self) -> torch.Tensor | None:
        norm = self._clip()
        self.module.step()
        return norm


class _PartitionedOptimizer(_Engine):
    """Stages 1 and 2: each worker owns a contiguous partition of every parameter group, which is
    flattened."""

    def _moments(self) -> dict[str, torch.Tensor | Shard]:
        moments: dict[str, torch.Tensor | Shard] = {}
        if not self._updates():
            return moments
        for name, parameter, partition, mapping in self._owned():
            local, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
            for key in MOMENTS:
                values = self.optimizer.state[partition][key].narrow(0, local.start, local.numel)
                moments[f"{key}/{name}"] = Shard(values, whole.start, tuple(parameter.shape))
        return moments

    def _set_moments(self, saved: Mapping[str, torch.Tensor], updates: int) -> None:
        for partition in self.zero.single_partition_of_fp32_groups:
            self.optimizer.state[partition] = adam_state(partition, updates)
        for name, _, partition, mapping in self._owned():
            local, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
            for key in MOMENTS:
                values = saved[f"{key}/{name}"].flatten().narrow(0, whole.start, whole.numel)
                moments = self.optimizer.state[partition][key]
                moments.narrow(0, local.start, local.numel).copy_(values)

    def _owned(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor, Any]]:
        """Yield the parameters of which this worker owns a part.

        Yields:
            The name, the parameter, the flat partition that holds its part, and DeepSpeed's
            mapping: the part's address in the partition (hp) and in the parameter (lp).
        """
        partitions = self.zero.single_partition_of_fp32_groups
        for name, parameter in self.model.named_parameters():
            # Set by deepspeed.utils.tensor_fragment.
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                yield name, parameter, partitions[mapping.param_group_index], mapping


class _PartitionedParameters(_Engine):
    """Stage 3: each worker owns an equal part of every parameter; the last part is padded."""

    def local(self) -> dict[str, torch.Tensor]:
        # A parameter that a forward pass has gathered is a copy: writes to the parts would not
        # reach it.
        self.zero._partition_all_parameters()
        return {
            # DeepSpeed's attribute.
            name: self._unpadded(parameter, parameter.ds_tensor.data)  # type: ignore[attr-defined]
            for name, parameter in self.model.named_parameters()
        }

    def as_shards(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Shard]:
        return {
            name: self._shard(self.model.get_parameter(name), value)
            for name, value in values.items()
            if value.numel()
        }

    def local_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        parameter: Any = self.model.get_parameter(name)
        start = self._start(parameter)
        part: torch.Tensor = whole.flatten()[start : start + parameter.ds_tensor.numel()]
        return part

    def _moments(self) -> dict[str, torch.Tensor | Shard]:
        read = self.strategy.deepspeed.utils.safe_get_local_optimizer_state
        moments: dict[str, torch.Tensor | Shard] = {}
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS:
                values = self._unpadded(parameter, read(parameter, key))
                if values.numel():
                    moments[f"{key}/{name}"] = self._shard(parameter, values)
        return moments

    def _set_moments(self, saved: Mapping[str, torch.Tensor], updates: int) -> None:
        write = self.strategy.deepspeed.utils.safe_set_local_optimizer_state
        for partition in self.zero.fp32_partitioned_groups_flat:
            self.optimizer.state[partition] = adam_state(partition, updates)
        parameter: Any  # with DeepSpeed's attributes
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS:
                padded = torch.zeros_like(parameter.ds_tensor.data, dtype=torch.float32)
                values = self.local_part(name, saved[f"{key}/{name}"])
                padded[: values.numel()].copy_(values)
                write(parameter, padded, key)

    def _start(self, parameter: Any) -> int:
        """Return where this worker's part begins in the flattened parameter."""
        return self.strategy.rank * int(parameter.ds_tensor.numel())

    def _unpadded(self, parameter: Any, padded: torch.Tensor) -> torch.Tensor:
        """Return this worker's part without the padding at the end of the last one."""
        return padded.flatten()[: max(parameter.ds_numel - self._start(parameter), 0)]

    def _shard(self, parameter: Any, values: torch.Tensor) -> Shard:
        return Shard(values, self._start(parameter), tuple(parameter.ds_shape))
