"""Are features healthy? Three numbers per layer that need no labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Health:
    """Accumulates moments of one layer's patch tokens: memory is D x D, however many images.

    - `effective_rank`: exp of the entropy of the shares p_i = s_i / sum(s) of the singular values s of the images' mean
      patch features, centred (Roy and Vetterli 2007; RankMe, Garrido et al. 2023, takes them uncentred). From 1
      (everything on a line) to min(D, images - 1).
    - `spread`: standard deviation over images of each dimension of the L2-normalised mean patch feature, averaged over
      dimensions and times sqrt(D) (Chen and He 2021, SimSiam, section 4.1). Near 1: isotropic; 0: all images alike.
    - `similarity`: mean cosine between two different patches of an image. Near 1: patches have become one.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.images = 0
        self.sums = torch.zeros(3, dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.cosines = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, patches: Tensor) -> None:
        """Patch tokens [B,N,D] of B images."""
        N = patches.shape[1]
        pooled = patches.double().mean(dim=1)
        unit = F.normalize(pooled, dim=1)
        self.images += len(patches)
        self.sums[0] += pooled.sum(dim=0)
        self.sums[1] += unit.sum(dim=0)
        self.sums[2] += unit.square().sum(dim=0)
        self.outer += pooled.T @ pooled
        together = F.normalize(patches.float(), dim=-1).sum(dim=1).double().square().sum(dim=1)
        self.cosines += ((together - N) / (N * (N - 1))).sum()

    @property
    def effective_rank(self) -> float:
        """See the class."""
        mean = self.sums[0] / self.images
        values = torch.linalg.eigvalsh(self.outer / self.images - mean[:, None] * mean).clamp(min=0).sqrt()
        share = values / values.sum().clamp(min=1e-30)
        return float(torch.special.entr(share).sum().exp())

    @property
    def spread(self) -> float:
        """See the class."""
        mean, square = self.sums[1:3] / self.images
        return float((square - mean.square()).clamp(min=0).sqrt().mean() * len(mean) ** 0.5)

    @property
    def similarity(self) -> float:
        """See the class."""
        return float(self.cosines / self.images)
