"""Training in several processes started by `torchrun`; in a single one everything here is the identity.

Every process holds all images and computes a contiguous part of each global batch. With the same global batch, N
processes compute what one does, up to rounding: DistributedDataParallel averages the gradients, BatchNorm's
statistics are those of the global batch, and random fillings, augmentation and data order are drawn for all of it.
Dropout alone is drawn by each process for itself.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.errors import OptionError


def join(device: str) -> str:
    """Join the processes of `torchrun`, if it started this one, and return the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def leave() -> None:
    """Leave the other processes, where there are any, when all have come this far."""
    if size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; 0 is the one that writes files and prints."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def first_alone() -> Iterator[None]:
    """Let process 0 through first and the others after it, so that one downloads and the others find the files."""
    if size() > 1 and rank() > 0:
        dist.barrier()
    yield
    if size() > 1 and rank() == 0:
        dist.barrier()


def part(n: int) -> slice:
    """Return which of n rows belong to this process.

    Raises:
        OptionError: they cannot be divided equally.
    """
    if n % size():
        raise OptionError(
            f"batch of {n} images: {size()} processes cannot share it equally; "
            f"give --batch-size a multiple of {size()}, not above the number of training images"
        )
    share = n // size()
    return slice(rank() * share, (rank() + 1) * share)


def total(value: Tensor) -> Tensor:
    """Return the sum of `value` over the processes, differentiable any number of times."""
    if size() == 1:
        return value
    summed: Tensor = _Total.apply(value)
    return summed


def mean(value: Tensor) -> Tensor:
    """Return the mean of `value` over the processes, differentiable any number of times."""
    return total(value) / size() if size() > 1 else value


def parallel(model: nn.Module) -> nn.Module:
    """Return the model as the training step calls it: gradients averaged, BatchNorm over the global batch.

    The model itself keeps its parameters' and buffers' names, and may be evaluated and saved at any time.
    """
    if size() == 1:
        return model
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _GlobalBatchNorm
    # Said once per process of a convolution with one input channel; it costs nothing worth a line.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.contiguous().clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return total(grad_outputs[0])


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of the global batch.

    nn.SyncBatchNorm does that on GPUs only, and without the second derivative that `AdaptiveThreshold` needs.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Take what the BatchNorm took that this one replaces."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # statistics of bfloat16 are float32, as in PyTorch
        axes = [axis for axis in range(x.ndim) if axis != 1]
        average = mean(x.mean(axes, keepdim=True))
        variance = mean((x - average).square().mean(axes, keepdim=True))
        n = x.numel() // x.shape[1] * size()
        self._track(average.flatten(), variance.flatten() * (n / (n - 1)))
        shape = average.shape
        y = (x - average) * torch.rsqrt(variance + self.eps)
        y = y * self.weight.reshape(shape) + self.bias.reshape(shape) if self.affine else y
        return y.to(dtype)

    @torch.no_grad()
    def _track(self, average: Tensor, variance: Tensor) -> None:
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked.item() if momentum is None else momentum
        if momentum and self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(average, momentum)
            self.running_var.lerp_(variance, momentum)
