"""What methods that compare images with each other, follow themselves or average over ragged masks make of one batch;
alone, or as one of several processes, which `test_contrastive` has this script start.
"""

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet import processes
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.base import Clock, Method
from mimlet.methods.dino import DINO
from mimlet.methods.itpn import ITPN
from mimlet.methods.itpn_clip import ITPNClip
from mimlet.methods.mocov3 import MoCoV3
from mimlet.methods.settings import DINOSettings, ITPNClipSettings
from mimlet.models.decoders import make_decoder
from mimlet.models.hivit import HiViT
from mimlet.models.norm import GlobalBatchNorm
from mimlet.models.shapes import HiViTShape, ViTShape
from mimlet.models.teacher import Teacher
from mimlet.models.vit import ViT
from mimlet.train.distributed import weighted
from mimlet.train.optim import follow

BATCH, WORLDS = 16, (4, 2)
SHAPE = ViTShape(image_size=16, patch=8, dim=24, depth=2, heads=3)
PYRAMID = HiViTShape(16, 4, 16, (1, 1, 2), 2, pyramid_dim=8, pyramid_depth=1, pyramid_hidden=16)


def mine(x: Tensor) -> Tensor:
    """This process's rows of the whole batch."""
    return x.chunk(processes.world_size())[processes.rank()]


def mean_gradients(module: nn.Module) -> dict[str, Tensor]:
    """What DDP makes of the gradients."""
    return {name: processes.mean(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def norm(affine: bool) -> dict[str, Tensor]:
    """Two steps of batch norm under a loss that is a mean over rows: outputs, gradients, statistics."""
    torch.manual_seed(1)
    layer = GlobalBatchNorm(5, affine=affine)
    if affine:
        nn.init.normal_(layer.weight)
    target = torch.randn(BATCH, 5)
    found: dict[str, Tensor] = {}
    for step in range(2):
        whole = torch.randn(BATCH, 5) * 3 + 10 * torch.arange(BATCH)[:, None] ** step
        x = mine(whole).clone().requires_grad_()
        layer.zero_grad()
        out = layer(x)
        (out - mine(target)).square().sum(dim=1).mean().backward()
        assert x.grad is not None
        found |= {f"{step} out": processes.gather(out), f"{step} input": processes.gather(x.grad)}
        found[f"{step} input"] /= processes.world_size()  # the loss is the mean of the processes' losses
        found |= {f"{step} gradient {name}": value for name, value in mean_gradients(layer).items()}
        found |= {f"{step} {name}": value.clone() for name, value in layer.named_buffers()}
    return found


def views(*sizes: int) -> list[Tensor]:
    """Noisy pictures of the same images, this process's rows."""
    images = torch.randn(BATCH, 3, 16, 16)
    noisy = [images + 0.3 * torch.randn_like(images) for _ in sizes]
    return [F.interpolate(mine(view), size) for view, size in zip(noisy, sizes, strict=True)]


def step(method: Method, batch: Batch, loss: str) -> dict[str, Tensor]:
    """One step without optimiser: losses, gradients, buffers."""
    clock = Clock(0, 10, 10, 0)
    losses = method(batch, clock)
    losses[loss].backward()
    found = {f"loss {name}": processes.mean(value) for name, value in losses.items()}
    found |= {f"gradient {name}": value for name, value in mean_gradients(method).items()}
    method.after_step(clock)
    return found | {name: value.clone() for name, value in method.named_buffers()}


def moco() -> dict[str, Tensor]:
    """MoCo v3 in double precision (its gradients are large at the start): logits too."""
    torch.manual_seed(2)
    method = MoCoV3(ViT(SHAPE), hidden=20, outputs=8).double()
    for part in (method.momentum_encoder, method.momentum_projector):
        part.requires_grad_(False)
        for parameter in part.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    one, two = (view.double() for view in views(16, 16))
    found = step(method, Batch({"view1": one, "view2": two}, torch.arange(len(one))), "contrast")
    with torch.no_grad():
        q, k = (F.normalize(processes.gather(x), dim=1) for x in (method.queries(one), method.keys(two)))
    return found | {"logits": q @ k.T / method.temperature}


def dino() -> dict[str, Tensor]:
    """DINO, its centre included."""
    torch.manual_seed(3)
    method = DINO(ViT(SHAPE), DINOSettings(outputs=32, hidden=20, bottleneck=8, local_crops=1, local_size=8))
    for part in (method.encoder, method.head):
        part.requires_grad_(False)
    nn.init.normal_(method.centre)
    crops = views(16, 16, 8)
    return step(
        method,
        Batch(dict(zip(("global0", "global1", "local0"), crops, strict=True)), torch.arange(len(crops[0]))),
        "cross_entropy",
    )


def step_whole(method: Method, mask: Mask) -> dict[str, Tensor]:
    """One step of gradient descent on all weighted losses, and of the average."""
    clock, images = Clock(0, 10, 10, 0), mine(torch.randn(BATCH, 3, 16, 16))
    losses = method(Batch({"image": images}, torch.arange(len(images)), {"mask": mask}), clock)
    weighted(losses, method.weights).backward()
    for parameter in method.parameters():
        if parameter.grad is not None:
            parameter.grad = processes.mean(parameter.grad)
    method.on_gradients(clock)
    found = {f"loss {name}": processes.mean(value) for name, value in losses.items()}
    found |= {f"gradient {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    for follower, leader in method.ema.items():
        follow(getattr(method, follower), getattr(method, leader), 0.5)
        found |= {f"{follower}.{name}": value for name, value in getattr(method, follower).state_dict().items()}
    return found


def itpn() -> dict[str, Tensor]:
    """iTPN's pixels and features."""
    torch.manual_seed(4)
    encoder = HiViT(PYRAMID)
    method = ITPN(encoder, make_decoder(encoder, 48, 16, 1, 2))
    assert method.target is not None
    method.target.requires_grad_(False)
    return step_whole(method, Mask.from_noise(mine(torch.rand(BATCH, 16)), 0.75))


def itpn_clip() -> dict[str, Tensor]:
    """Images hide different numbers of patches."""
    torch.manual_seed(5)
    method = ITPNClip(HiViT(PYRAMID), ITPNClipSettings(), Teacher(ViT(ViTShape(16, 4, 12, 1, 2))))
    hidden = torch.rand(BATCH, 16) < torch.linspace(0.1, 0.8, BATCH)[:, None]
    return step_whole(method, Mask.from_hidden(mine(hidden)))


def measure() -> dict[str, dict[str, Tensor]]:
    """Everything."""
    return {
        "norm": norm(True),
        "plain norm": norm(False),
        "moco": moco(),
        "dino": dino(),
        "itpn": itpn(),
        "itpn_clip": itpn_clip(),
    }


def main(out: Path, world: int, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/meet{world}", rank=rank, world_size=world)
    found = measure()
    if rank == 0:
        torch.save(found, out / f"{world}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")  # everything is imported once
    for world in WORLDS:
        workers = [fork.Process(target=main, args=(Path(sys.argv[1]), world, rank)) for rank in range(world)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not any(worker.exitcode for worker in workers)
