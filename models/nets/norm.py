"""Batch normalisation whose batch is the global one, at any number of workers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm(nn.Module):
    """BatchNorm over (B, C, H, W) with the statistics of all workers' batches together (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167).

    torch's SyncBatchNorm does the same on GPUs only. In eval mode, as served, it uses the running averages: a picture
    then does not depend on its company. Every worker must take part in a forward in training mode, with as many pictures.
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
        """(B, C, H, W), normalised, scaled and shifted by channel."""
        if not self.training:
            return self._scaled(inputs, self.running_mean, self.running_var)
        with torch.autocast(inputs.device.type, enabled=False):  # sums over thousands of pixels
            wide = inputs.to(self.weight.dtype)
            mean = _mean_over_workers(wide.mean(dim=(0, 2, 3)))
            var = _mean_over_workers((wide - mean.view(-1, 1, 1)).square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            count = (
                inputs.numel()
                / inputs.shape[1]
                * (dist.get_world_size() if dist.is_initialized() else 1)
            )
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # unbiased, as torch's
        return self._scaled(inputs, mean, var)

    def _scaled(self, inputs: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (inputs * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(inputs.dtype)


class _MeanOverWorkers(torch.autograd.Function):
    """The mean of each worker's values, on every worker; its gradient is the mean of each worker's gradients."""

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
    return (
        _MeanOverWorkers.apply(values)
        if dist.is_initialized() and dist.get_world_size() > 1
        else values
    )
