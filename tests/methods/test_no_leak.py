"""No pixel under a mask reaches anything but the target: whatever a module computes stays the same when they change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimlet.config import merge, read_recipe, smoke, validate
from mimlet.data.batch import Batch
from mimlet.data.masks import Mask
from mimlet.methods.base import Clock, Method
from mimlet.methods.settings import METHODS
from mimlet.models.build import encoder_of
from mimlet.models.encoder import Encoder
from mimlet.models.teacher import Teacher, Teachers

CLOCK = Clock(0, 10, 10, 0)
DMAE = {"name": "dmae", "mask_ratio": 0.6, "decoder": {"depth": 1, "dim": 48, "heads": 3}}
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # recipe, what is changed in it, parts that see whole images because they make the target
    "mae": ("mae_micro32", {}, ()),
    "mae on Hiera": ("mae_hiera_micro32", {}, ()),
    "mae on HiViT": ("mae_hivit_micro32", {}, ()),
    "mae on Fast-iTPN": ("mae_hivit_micro32", {"encoder": {"name": "fast_itpn_micro"}}, ()),
    "dmae": ("mae_micro32", {"method": DMAE}, ()),
    "dmae on Hiera": ("mae_hiera_micro32", {"method": DMAE}, ()),
    "dmae on HiViT": ("mae_hivit_micro32", {"method": DMAE}, ()),
    "itpn, the average sees visible patches": ("itpn_micro32", {}, ()),
    "itpn, the average sees all": ("itpn_micro32", {"method": {"features": {"input": "full"}}}, ("target",)),
    "itpn_clip": ("fast_itpn_micro32", {}, ("teacher",)),
    "itpn_clip on HiViT": ("fast_itpn_micro32", {"encoder": {"name": "itpn_micro"}}, ("teacher",)),
    "simmim": ("simmim_micro32", {}, ()),
    "maskfeat": ("maskfeat_micro32", {}, ("hog",)),
    "bootmae": ("bootmae_micro32", {}, ("target",)),
}
FILL = ("simmim", "maskfeat", "itpn_clip", "itpn_clip on HiViT")


def built(recipe: str, changes: dict[str, Any]) -> Method:
    """The smoke form of a changed recipe; a teacher, where it needs one, is an untrained encoder like its own."""
    values = read_recipe(recipe)
    if "method" in changes and "name" in changes["method"]:
        values["method"] = {}
    merge(values, changes)
    values = smoke(values)
    teaches = METHODS[values["method"]["name"]].teacher
    config = validate(values | ({"teacher": {"path": "python:"}} if teaches else {}))
    torch.manual_seed(0)
    teachers = None
    if teaches:
        encoder = encoder_of(config.encoder.shape())
        teachers = Teachers(Teacher(encoder, grid=encoder.grid))
    module = METHODS[config.method.name].load()
    method: Method = module.build(config, 0, teachers)
    return method.eval()


def batch_for(method: Method) -> Batch:
    generator = torch.Generator().manual_seed(1)
    encoder = method.encoder
    assert isinstance(encoder, Encoder)
    side = encoder.shape.image_size
    samplers = method.masks()
    masks = {
        name: sampler.collate(torch.stack([sampler.draw(generator) for _ in range(3)]))
        for name, sampler in samplers.items()
    }
    views = {"image": torch.randn(3, 3, side, side, generator=generator)}
    if "teacher" in dict(method.named_children()) and "itpn" in type(method).__name__.lower():
        views["clean"] = views["image"].clone()
    return Batch(views, torch.arange(3), masks)


def scrambled(batch: Batch, encoder: Encoder) -> Batch:
    """The same with other pixels wherever the mask hides."""
    hidden = pixels(batch.mask, encoder)
    images = batch.views["image"]
    other = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)) * 5
    views = {name: torch.where(hidden, other, view) for name, view in batch.views.items()}
    return Batch(views, batch.indices, batch.masks)


def pixels(mask: Mask, encoder: Encoder) -> Tensor:
    """Where a mask over units hides pixels, [B,1,h,w]."""
    rows, columns = encoder.unit_grid
    side = encoder.patch * encoder.unit
    whole = mask.hidden.view(-1, 1, rows, columns)
    return whole.repeat_interleave(side, 2).repeat_interleave(side, 3)


def outputs(method: Method, batch: Batch, exempt: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """What every module computed in one step, by name."""
    found: dict[str, list[Tensor]] = {}
    handles = []

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, given: Any, answer: Any) -> None:
            found.setdefault(name, []).extend(tensors(answer))

        return record

    for name, module in method.named_modules():
        if name and not name.startswith(exempt):
            handles.append(module.register_forward_hook(recorder(name)))
    with torch.no_grad():
        method(batch, CLOCK)
    for handle in handles:
        handle.remove()
    return found


def tensors(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, dict):
        return [x for value in answer.values() for x in tensors(value)]
    if isinstance(answer, list | tuple):
        return [x for value in answer for x in tensors(value)]
    return tensors(vars(answer)) if hasattr(answer, "__dict__") else []


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_hidden_pixels_is_seen(case: str) -> None:
    recipe, changes, exempt = CASES[case]
    method = built(recipe, changes)
    assert isinstance(method.encoder, Encoder)
    batch = batch_for(method)
    before, after = (outputs(method, each, exempt or ("-",)) for each in (batch, scrambled(batch, method.encoder)))
    assert len(before) > 10
    assert before.keys() == after.keys()
    seen = {
        name
        for name, values in before.items()
        if not all(torch.equal(x, y) for x, y in zip(values, after[name], strict=True))
    }
    if case in FILL:  # they embed all patches, and then replace the hidden ones
        seen -= {"encoder.patch_embed", "encoder.patch_embed.proj", "encoder.patch_embed.norm"}
    assert not seen, sorted(seen)[:5]


def test_the_check_sees_a_leak() -> None:
    method = built(*CASES["mae"][:2])
    batch = batch_for(method)
    assert isinstance(method.encoder, Encoder)
    shown = {"mask": batch.mask.complement()}
    views = scrambled(batch, method.encoder).views
    before, after = (outputs(method, Batch(each, batch.indices, shown), ("-",)) for each in (batch.views, views))
    assert not torch.equal(before["decoder"][0], after["decoder"][0])
