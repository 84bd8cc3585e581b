import torch
from torch.testing import assert_close

from mimlet.objectives.reconstruct import (
    denormalise_channels,
    inside_weights,
    masked_absolute_loss,
    normalise_channels,
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
