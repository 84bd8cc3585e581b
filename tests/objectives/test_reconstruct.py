import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mimlet.objectives.reconstruct import (
    denormalise_channels,
    inside_weights,
    masked_absolute_loss,
    masked_pixel_loss,
    normalise_channels,
    normalise_patches,
    patchify,
    unpatchify,
    weighted_error,
)


def test_channels_are_normalised_one_by_one() -> None:
    # One patch of 2 x 2: red is 0, 0, 4, 4; green is constant; blue is 1, 2, 3, 4.
    patch = torch.tensor([[0.0, 5, 1, 0, 5, 2, 4, 5, 3, 4, 5, 4]])
    red, green, blue = normalise_channels(patch).view(4, 3).T
    assert_close(red, torch.tensor([-2.0, -2, 2, 2]) / (4 + 1e-5) ** 0.5)
    assert not green.any()
    assert_close(blue, torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (1.25 + 1e-5) ** 0.5)
    assert_close(denormalise_channels(normalise_channels(patch), patch), patch)


def test_patches_deep_inside_weigh_twice() -> None:
    hidden = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]).bool()
    expected = [[4, 6, 4, 0], [6, 9, 6, 0], [4, 6, 5, 0], [0, 0, 0, 2]]
    weights = inside_weights(hidden.flatten()[None], (4, 4))
    assert_close(weights.view(4, 4), hidden * (1 + torch.tensor(expected) / 9))


def test_weighted_error_is_a_mean_over_patches() -> None:
    prediction, target = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    assert weighted_error(prediction, target) == (5 + 2) / 2
    assert weighted_error(prediction, target, torch.tensor([[2.0, 1.0]])) == (2 * 5 + 2) / 2


def test_absolute_error_of_hidden_pixels() -> None:
    images = torch.arange(48.0).view(1, 3, 4, 4)  # patches of 2 x 2; the third begins at (8, 24, 40)
    prediction = torch.tensor([[[8.0, 24, 40, 9, 25, 41, 12, 28, 44, 13, 29, 41]]])
    loss = masked_absolute_loss(prediction, images, 2, torch.tensor([[2]]))
    assert_close(loss, torch.tensor(4 / (4 + 1e-5) / 3))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_patches_hold_rows_columns_channels(memory: torch.memory_format) -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6).contiguous(memory_format=memory)
    patches = patchify(images, 2)
    expected = [images[1, c, 2 + y, 4 + x] for y in range(2) for x in range(2) for c in range(3)]
    assert torch.equal(patches[1, 5], torch.stack(expected))
    assert torch.equal(unpatchify(patches, (2, 3)), images)
    ids = torch.tensor([[4, 0], [5, 5]])
    assert torch.equal(patchify(images, 2, ids), torch.stack([patches[i, ids[i]] for i in range(2)]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_pixel_loss_in_parts_is_the_mean_square_error(kind: torch.dtype, normalise: bool, weight: float) -> None:
    images, ids = torch.randn(6, 3, 8, 8), torch.rand(6, 4).argsort(1)[:, :3]  # a whole part of 4 images and a rest
    prediction = torch.randn(6, 3, 48).to(kind).requires_grad_()
    target = patchify(images, 4, ids)
    target = normalise_patches(target) if normalise else target
    losses = masked_pixel_loss(prediction, images, 4, ids, normalise), F.mse_loss(prediction.float(), target)
    assert_close(*losses)
    ours, theirs = (torch.autograd.grad(weight * loss, prediction)[0] for loss in losses)
    assert ours.dtype == kind
    if weight == 1:
        assert torch.equal(ours, theirs)
    assert_close(ours, theirs)
    with torch.no_grad():
        assert_close(masked_pixel_loss(prediction, images, 4, ids, normalise), losses[1])
