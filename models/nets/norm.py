"""Batch normalization over the global batch of all workers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm(nn.Module):
    """BatchNorm over (B, C, H, W) with the statistics of all workers' batches together.

    Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167. torch's SyncBatchNorm does the same, but
    on GPUs only.

    In training mode every worker must call forward, with equally many images. In eval mode, which
    serving uses, the running averages are used and an image does not depend on the other images of
    its batch.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize, scale and shift inputs (B, C, H, W) by channel."""
        if not self.training:
            return self._normalize(inputs, self.running_mean, self.running_var)
        # Without autocast: the sums are over thousands of pixels.
        with torch.autocast(inputs.device.type, enabled=False):
            wide = inputs.to(self.weight.dtype)
            mean = _mean_over_workers(wide.mean(dim=(0, 2, 3)))
            var = _mean_over_workers((wide - mean.view(-1, 1, 1)).square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            world_size = dist.get_world_size() if dist.is_initialized() else 1
            count = inputs.numel() / inputs.shape[1] * world_size
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # unbiased, as torch's
        return self._normalize(inputs, mean, var)

    def _normalize(self, inputs: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (inputs * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(inputs.dtype)


class _MeanOverWorkers(torch.autograd.Function):
    """The mean of the workers' values; its gradient is the mean of the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(values: Tensor) -> Tensor:
    total = values.contiguous().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _mean_over_workers(values: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    mean: Tensor = _MeanOverWorkers.apply(values)
    return mean
