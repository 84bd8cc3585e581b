"""Batch norm over the whole batch of a step, whatever the number of processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mimlet import processes
from mimlet.errors import ConfigError


class GlobalBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose statistics in training are those of all processes together, gradients included.

    PyTorch's own works on GPUs only. Every process brings equally many rows. In evaluation, and alone, it is the plain
    one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[n,D] -> [n,D]; in float32 even under autocast (float64 stays). `ConfigError` for a single row in training,
        which has no variance.
        """
        x = input if input.dtype == torch.float64 else input.float()
        if not self.training:
            return self._plain(x)
        count = len(x) * processes.world_size()
        if count < 2:
            raise ConfigError("batch norm cannot learn from a batch of 1 image; raise schedule.batch to 2 or more")
        if processes.world_size() == 1:
            return self._plain(x)
        mean = processes.total(x.sum(dim=0)) / count
        centred = x - mean
        variance = processes.total(centred.square().sum(dim=0)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / (count - 1), share)
        out = centred * (variance + self.eps).rsqrt()
        return out if self.weight is None else out * self.weight + self.bias

    def _plain(self, x: Tensor) -> Tensor:
        normed: Tensor = super().forward(x)
        return normed
