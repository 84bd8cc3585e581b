import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimlet.config import Config, EncoderSettings, OptimSettings
from mimlet.data.batch import Batch
from mimlet.methods.base import Clock, Method
from mimlet.models.build import encoder_of
from mimlet.models.vit import ViT
from mimlet.tasks.classify import Classify
from mimlet.train.optim import (
    follow,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parameter_groups,
    peak_learning_rate,
    set_rates,
    trained_parameters,
    weight_decay,
)
from tests.shared import golden
from tests.train.toy import Toy

HEAD = ("fc_norm.", "head.", "dist_norm.", "head_dist.")


class Deep(nn.Module):
    """Has layers as a ViT has."""

    depth: int

    def layer_of(self, name: str) -> int:
        return ViT.layer_of(self, name)  # type: ignore[arg-type]


class Named(Method):
    """Parameters with given names and shapes."""

    weights: dict[str, float]

    def __init__(self, shapes: dict[str, list[int]], depth: int) -> None:
        super().__init__()
        self.encoder = Deep()
        self.encoder.depth = depth
        for name, shape in shapes.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, nn.Parameter(torch.zeros(shape)))

    @classmethod
    def build(cls, config: Config, classes: int = 0) -> "Named":
        raise NotImplementedError

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        raise NotImplementedError


def flat_groups(method: Method, optim: OptimSettings) -> dict[str, list[float]]:
    names = {parameter: name for name, parameter in method.named_parameters()}
    groups = parameter_groups(method, optim)
    return {names[p]: [group["lr_scale"], group["weight_decay"]] for group in groups for p in group["params"]}


@pytest.mark.parametrize("variant", ["gap", "cls", "distilled", "rpe", "rpe_ls"])
def test_groups_equal_the_official_fine_tuning(variant: str) -> None:
    oracle = golden("mae_lite_classifier")
    official = oracle.meta["param_groups"]["groups"][variant]
    ours = {name: f"head.{name}" if name.startswith(HEAD) else f"encoder.{name}" for name in official}
    shapes = {ours[name]: oracle.meta["weights_shapes"][f"{variant}.{name}"] for name in official}
    optim = OptimSettings(layer_decay=0.85, weight_decay=0.05, decay_tokens=False)
    groups = flat_groups(Named(shapes, depth=3), optim)
    assert groups.keys() == shapes.keys()
    for name, expected in official.items():
        assert groups[ours[name]] == pytest.approx(expected, rel=1e-9), name


def test_a_distillation_token_learns_as_fast_as_the_heads() -> None:
    """G2SD's specific stage: full rate for it and both heads, that of the patch embedding for the class token."""
    shapes = {"encoder.cls_token": [1, 1, 4], "encoder.dist_token": [1, 1, 4], "head.head_dist.weight": [3, 4]}
    optim = OptimSettings(layer_decay=0.75, weight_decay=0.05, decay_tokens=False)
    groups = flat_groups(Named(shapes, depth=12), optim)
    assert groups == {
        "encoder.cls_token": [pytest.approx(0.75**13), 0],
        "encoder.dist_token": [1, 0],
        "head.head_dist.weight": [1, 0.05],
    }
    decaying = flat_groups(Named(shapes, depth=12), optim.model_copy(update={"decay_tokens": True}))
    assert decaying["encoder.dist_token"] == [1, 0.05]


def fine_tuning(name: str, **settings: Any) -> Classify:
    """Of an encoder of the zoo with its blocks, but narrow."""
    shape = EncoderSettings(name=name, dim=32, heads=2, image_size=32, **settings).shape()
    return Classify(encoder_of(shape), 3)


@pytest.mark.parametrize("fast", [False, True])
def test_layers_of_itpn_count_without_merges(fast: bool) -> None:
    """iTPN's fine-tuning: 0.60 rescaled by 13 / 31, which leaves the power of the layer. Fast-iTPN's released code
    counts merges as layers, so that what is before a merge learns slower there by one factor for each merge.
    """
    decay = 0.60 ** (13 / 31)
    method = fine_tuning("fast_itpn_base" if fast else "itpn_base", pyramid_dim=16)
    optim = OptimSettings(layer_decay=decay, weight_decay=0.05, decay_tokens=False)
    groups = flat_groups(method, optim)
    table = "pos_embed" if fast else "absolute_pos_embed"
    layers = {f"encoder.{table}": 0, "encoder.patch_embed.proj.weight": 0, "encoder.blocks.0.norm2.weight": 1}
    layers |= {"encoder.blocks.3.reduction.weight": 3, "encoder.blocks.7.reduction.weight": 6}
    layers |= {"encoder.blocks.4.mlp.fc1.weight": 4, "encoder.blocks.6.mlp.fc2.weight": 6}
    layers |= {"encoder.blocks.8.attn.proj.weight": 7, "encoder.blocks.31.attn.proj.weight": 30}
    layers |= {"encoder.split_16to8.norm.weight": 31, "head.head.weight": 31, "head.fc_norm.weight": 31}
    for name, layer in layers.items():
        assert groups[name][0] == pytest.approx(decay ** (31 - layer), rel=1e-12), name
    assert {groups[name][1] for name in groups if name.endswith(("pos_embed", "bias", "gamma_1"))} == {0}
    if fast:
        released = {"encoder.pos_embed": 0, "encoder.blocks.0.norm2.weight": 1, "encoder.blocks.4.mlp.fc1.weight": 5}
        factors = {name: groups[name][0] / decay ** (33 - number) for name, number in released.items()}
        assert factors == pytest.approx(dict(zip(released, (decay**-2, decay**-2, decay**-1), strict=True)))
        assert groups["encoder.blocks.8.attn.proj.weight"][0] == pytest.approx(decay ** (33 - 9))


def test_layers_of_hiera() -> None:
    optim = OptimSettings(layer_decay=0.85, weight_decay=0.05, decay_tokens=False)
    groups = flat_groups(fine_tuning("hiera_tiny46"), optim)
    layers = {"encoder.pos_embed": 0, "encoder.patch_embed.proj.weight": 0, "encoder.blocks.0.norm1.weight": 1}
    layers |= {"encoder.blocks.1.proj.weight": 2, "encoder.blocks.11.mlp.fc2.weight": 12, "head.head.weight": 13}
    layers |= {"encoder.multi_scale_fusion_heads.0.weight": 13}
    for name, layer in layers.items():
        assert groups[name][0] == pytest.approx(0.85 ** (13 - layer)), name
    assert groups["encoder.pos_embed"][1] == 0
    assert groups["encoder.patch_embed.proj.weight"][1] == 0.05


def test_tokens_decay_in_pre_training_and_vectors_never_do() -> None:
    shapes = {
        "encoder.cls_token": [1, 1, 4],
        "encoder.norm.weight": [4],
        "decoder.mask_token": [1, 1, 4],
        "decoder.pos_embed": [1, 5, 4],
        "odd.bias": [2, 2],
    }
    optim = OptimSettings(weight_decay=0.1)
    assert flat_groups(Named(shapes, 1), optim) == {
        "encoder.cls_token": [1, 0.1],
        "encoder.norm.weight": [1, 0],
        "decoder.mask_token": [1, 0.1],
        "decoder.pos_embed": [1, 0.1],
        "odd.bias": [1, 0],
    }
    without = flat_groups(Named(shapes, 1), optim.model_copy(update={"decay_tokens": False}))
    assert {decay for _, decay in without.values()} == {0}


def test_frozen_parts_followers_and_fixed_parameters_are_left_out() -> None:
    toy = Toy()
    toy.head.bias.requires_grad_(False)
    names = trained_parameters(toy).keys()
    assert {name.split(".")[0] for name in names} == {"encoder", "head", "idle"}
    assert "head.bias" not in names


def test_learning_rate_numbers() -> None:
    rates = [learning_rate(step, 12, 4, 2.0, 0.2) for step in range(12)]
    assert rates[:5] == [0, 0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.1)
    assert rates[11] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(12, 12, 4, 2.0, 0.2) == pytest.approx(0.2)
    assert learning_rate(0, 10, 0, 2.0, 0.0) == 2.0


def test_the_rate_falls_to_a_tenth_at_every_milestone() -> None:
    rates = [learning_rate(step, 16, 2, 1.0, 1e-3, (0.5, 0.875)) for step in range(16)]
    assert rates == pytest.approx([0, 0.5] + [1.0] * 6 + [0.1] * 6 + [0.01] * 2)
    assert learning_rate(15, 16, 2, 1.0, 0.05, (0.5, 0.875)) == 0.05


def test_weight_decay_rises_as_in_the_official_code() -> None:
    oracle = golden("dino_loss")
    optim = OptimSettings(weight_decay=0.04, weight_decay_end=0.4)
    found = torch.tensor([weight_decay(step, 20, optim) for step in range(20)], dtype=torch.float64)
    torch.testing.assert_close(found, oracle.io["wd_schedule"].double(), atol=1e-6, rtol=1e-6)
    assert weight_decay(7, 20, OptimSettings(weight_decay=0.04)) == 0.04


def test_only_what_decays_gets_the_decay_of_the_step() -> None:
    optim = OptimSettings(weight_decay=0.04, weight_decay_end=0.4)
    optimizer = make_optimizer(parameter_groups(Named({"head.w": [2, 2], "head.bias": [2]}, 1), optim), optim)
    set_rates(optimizer, 0.1, 0.3)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0.3]


def test_peak_learning_rate_is_linear_in_the_batch_or_absolute() -> None:
    assert peak_learning_rate(OptimSettings(lr=1.5e-4, lr_batch=256), 4096) == pytest.approx(2.4e-3)
    assert peak_learning_rate(OptimSettings(lr=0.03, lr_batch=0), 512) == 0.03


def test_the_scale_multiplies_the_whole_schedule() -> None:
    shapes = {"encoder.cls_token": [1, 1, 4], "encoder.blocks.0.w": [4, 4], "head.w": [4, 4]}
    optim = OptimSettings(layer_decay=0.5)
    optimizer = make_optimizer(parameter_groups(Named(shapes, 1), optim), optim)
    set_rates(optimizer, 0.8, 0.0)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.2, 0.4, 0.8]


def test_adamw_is_torch_adamw() -> None:
    optim = OptimSettings(weight_decay=0.1, betas=(0.8, 0.9))
    ours, theirs = Named({"head.w": [2, 2]}, 1), Named({"head.w": [2, 2]}, 1)
    optimizer = make_optimizer(parameter_groups(ours, optim), optim)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1, betas=(0.8, 0.9), foreach=False)
    for _ in range(3):
        set_rates(optimizer, 0.1, 0.1)
        for method, one in ((ours, optimizer), (theirs, other)):
            w = method.get_parameter("head.w")
            w.grad = 2 * (w.detach() + torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
            one.step()
    torch.testing.assert_close(ours.get_parameter("head.w"), theirs.get_parameter("head.w"))


def test_sgd_has_nesterov_momentum() -> None:
    optim = OptimSettings(name="sgd", momentum=0.9, nesterov=True, weight_decay=0)
    method = Named({"head.w": [1, 1]}, 1)
    optimizer = make_optimizer(parameter_groups(method, optim), optim)
    for _ in range(2):
        set_rates(optimizer, 1.0, 0.0)
        method.get_parameter("head.w").grad = torch.tensor([[2.0]])
        optimizer.step()
    # Steps of g + 0.9 v with v = 2, then 0.9 * 2 + 2.
    assert method.get_parameter("head.w").item() == pytest.approx(-(2 + 0.9 * 2) - (2 + 0.9 * 3.8))


def test_lars_adapts_matrices_without_decay_and_never_vectors() -> None:
    optim = OptimSettings(name="lars", momentum=0.9, weight_decay=0)
    method = Named({"head.w": [1, 2], "head.b": [2]}, 1)
    matrix, vector = method.get_parameter("head.w"), method.get_parameter("head.b")
    nn.init.constant_(matrix, 3.0)
    optimizer = make_optimizer(parameter_groups(method, optim), optim)
    set_rates(optimizer, 2.0, 0.0)
    matrix.grad, vector.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 1.0])
    optimizer.step()
    ratio = 0.001 * 18**0.5 / 5
    torch.testing.assert_close(matrix.data, 3 - 2 * ratio * torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(vector.data, torch.tensor([-2.0, -2.0]))


def test_optimizer_memory_survives_another_grouping() -> None:
    first, second = Toy(), Toy()
    settings = [OptimSettings(weight_decay=0.05), OptimSettings(weight_decay=0)]
    optimizers = [make_optimizer(parameter_groups(m, s), s) for m, s in zip((first, second), settings, strict=True)]
    assert [len(optimizer.param_groups) for optimizer in optimizers] == [2, 1]
    first.encoder(torch.randn(4, 3, 4, 4)).square().sum().backward()
    optimizers[0].step()
    state = optimizer_state(optimizers[0], trained_parameters(first))
    assert "head.weight" not in state
    load_optimizer_state(optimizers[1], trained_parameters(second), state)
    again = optimizer_state(optimizers[1], trained_parameters(second))
    assert again.keys() == state.keys()
    torch.testing.assert_close(again, state, rtol=0, atol=0)
    assert optimizers[1].param_groups[0]["weight_decay"] == 0


def test_followers_average_floats_and_copy_counters() -> None:
    leader, follower = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(leader.weight, 5.0)
    leader.get_buffer("running_mean").fill_(4.0)
    leader.get_buffer("num_batches_tracked").fill_(7)
    follow(follower, leader, 0.75)
    assert follower.weight.tolist() == [2, 2]
    assert follower.get_buffer("running_mean").tolist() == [1, 1]
    assert follower.get_buffer("running_var").tolist() == [1, 1]
    assert follower.get_buffer("num_batches_tracked").item() == 7
