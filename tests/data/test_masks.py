import pickle
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimlet.data.masks import BlockMasking, Mask, RandomMasking, UnitMasking, visible_units
from mimlet.errors import ConfigError
from tests.shared import golden

SEEDS = st.integers(0, 2**31 - 1)


def noise(images: int, units: int, seed: int) -> torch.Tensor:
    return torch.rand(images, units, generator=torch.Generator().manual_seed(seed))


def check(mask: Mask) -> None:
    """What holds for every mask with equally many visible units per image."""
    assert mask.ids_keep is not None
    assert mask.ids_restore is not None
    images, units = mask.hidden.shape
    visible = mask.ids_keep.shape[1]
    everything = torch.arange(units).expand(images, -1)
    assert torch.equal(mask.order.sort(dim=1).values, everything)
    assert torch.equal(mask.order.gather(1, mask.ids_restore), everything), "restoring undoes the order"
    assert torch.equal(torch.cat([mask.ids_keep, mask.ids_hidden], dim=1), mask.order)
    assert not mask.hidden.gather(1, mask.ids_keep).any()
    assert mask.hidden.gather(1, mask.ids_hidden).all()
    assert (mask.hidden.sum(dim=1) == units - visible).all()


@given(st.integers(1, 4), st.integers(2, 40), st.floats(0.05, 0.95), SEEDS)
def test_masks_from_noise(images: int, units: int, ratio: float, seed: int) -> None:
    keep = int(units * (1 - ratio))
    drawn = noise(images, units, seed)
    if not 1 <= keep < units:
        with pytest.raises(ConfigError, match=f"leaves {keep} of {units} units visible"):
            Mask.from_noise(drawn, ratio)
        return
    mask = Mask.from_noise(drawn, ratio)
    check(mask)
    assert mask.ids_keep is not None
    assert mask.ids_keep.shape == (images, keep)
    kept = drawn.gather(1, mask.ids_keep)
    assert torch.equal(kept, kept.sort(dim=1).values), "visible units come in the order of their noise"
    assert (kept[:, -1] <= drawn.masked_fill(~mask.hidden, 2).amin(dim=1)).all()


@given(st.integers(1, 4), st.integers(1, 30), SEEDS)
def test_masks_from_hidden_units(images: int, units: int, seed: int) -> None:
    hidden = noise(images, units, seed) < 0.5
    mask = Mask.from_hidden(hidden)
    assert torch.equal(mask.hidden, hidden)
    counts = hidden.sum(dim=1)
    if (counts != counts[0]).any():
        assert mask.ids_keep is None
        assert mask.ids_restore is None
        return
    check(mask)
    assert mask.ids_keep is not None
    assert torch.equal(mask.ids_keep, mask.ids_keep.sort(dim=1).values), "visible units keep raster order"
    assert torch.equal(mask.ids_hidden, mask.ids_hidden.sort(dim=1).values)


@given(st.integers(1, 4), st.integers(2, 30), SEEDS)
def test_complement(images: int, units: int, seed: int) -> None:
    mask = Mask.from_noise(noise(images, units, seed), 0.5)
    other = mask.complement()
    check(other)
    assert torch.equal(other.hidden, ~mask.hidden)
    assert torch.equal(other.ids_keep, mask.ids_hidden)
    assert torch.equal(other.ids_hidden, mask.ids_keep)
    assert torch.equal(other.complement().hidden, mask.hidden)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(1, 3), SEEDS)
def test_units_divided_into_patches(images: int, rows: int, columns: int, side: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = Mask.from_noise(torch.rand(images, rows * columns, generator=generator), 0.5)
    small = mask.divided((rows, columns), side)
    assert mask.ids_keep is not None
    assert small.ids_keep is not None
    assert small.ids_restore is not None
    pooled = small.hidden.view(images, rows, side, columns, side)
    assert torch.equal(pooled.all(dim=4).all(dim=2).flatten(1), mask.hidden)
    assert torch.equal(pooled.any(dim=4).any(dim=2).flatten(1), mask.hidden)
    unit = small.ids_keep // (columns * side) // side * columns + small.ids_keep % (columns * side) // side
    assert torch.equal(unit, mask.ids_keep.repeat_interleave(side * side, 1))
    within = small.ids_keep.view(images, -1, side * side)
    assert bool((within.diff(dim=2) > 0).all()), "raster order inside a unit"
    assert torch.equal(small.order.gather(1, small.ids_restore), torch.arange(small.hidden.shape[1]).expand(images, -1))


def test_ragged_units_divided_into_patches() -> None:
    hidden = torch.tensor([[True, False], [True, True]])
    small = Mask(hidden).divided((1, 2), 2)
    assert small.ids_keep is None
    first = [[True, True, False, False]] * 2
    assert small.hidden.view(2, 2, 4).tolist() == [first, [[True] * 4] * 2]


def test_small_numbers() -> None:
    mask = Mask.from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 0.5)
    assert mask.hidden.tolist() == [[True, False, True, False]]
    assert mask.ids_keep.tolist() == [[1, 3]]
    assert mask.order.tolist() == [[1, 3, 2, 0]]
    assert mask.ids_restore.tolist() == [[3, 0, 2, 1]]
    assert mask.ids_hidden.tolist() == [[2, 0]]


@pytest.mark.parametrize(("units", "ratio", "keep"), [(196, 0.75, 49), (49, 0.4, 29), (49, 0.6, 19), (196, 0.6, 78)])
def test_published_counts(units: int, ratio: float, keep: int) -> None:
    assert visible_units(units, ratio) == keep


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.99])
def test_impossible_ratio(ratio: float) -> None:
    with pytest.raises(ConfigError, match=rf"mask ratio {ratio} leaves .* of 16 units.*between 0\.062 and 0\.938 here"):
        RandomMasking(16, ratio)


def test_sampler_draws_from_its_generator_alone() -> None:
    sampler = pickle.loads(pickle.dumps(RandomMasking(16, 0.75)))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draws = torch.stack([sampler.draw(torch.Generator().manual_seed(seed)) for seed in (1, 2, 1)])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(draws[0], draws[2])
    mask = sampler.collate(draws)
    assert torch.equal(mask.hidden, Mask.from_noise(draws, 0.75).hidden)
    assert (mask.hidden.sum(dim=1) == 12).all()
    assert not torch.equal(mask.hidden[0], mask.hidden[1])


def test_moving_keeps_what_is_absent() -> None:
    assert Mask(torch.ones(1, 2, dtype=torch.bool)).to("meta").ids_keep is None
    moved = Mask.from_noise(torch.rand(2, 4), 0.5).to("meta")
    assert {t.device.type for t in (moved.hidden, moved.ids_keep, moved.ids_restore)} == {"meta"}


def test_no_images() -> None:
    mask = Mask.from_hidden(torch.zeros(0, 4, dtype=torch.bool))
    assert mask.order.shape == (0, 4)


def test_order_needs_equal_counts() -> None:
    mask = Mask.from_hidden(torch.tensor([[True, False], [False, False]]))
    with pytest.raises(AssertionError, match="different numbers of units"):
        _ = mask.order
    with pytest.raises(AssertionError, match="different numbers of units"):
        _ = mask.ids_hidden


@pytest.mark.parametrize("number", range(3))
def test_blocks_equal_the_official_code(number: int) -> None:
    oracle = golden("beit_block_mask")
    setting = oracle.meta["config"]["configs"][number]
    sampler = BlockMasking(
        (14, 14), setting["num_masking_patches"], setting["min_num_patches"], setting["max_num_patches"] or 0
    )
    for seed, expected in zip(oracle.io["seeds"].tolist(), oracle.io[f"mask_cfg{number}"], strict=True):
        assert torch.equal(sampler.blocks(random.Random(seed)), expected.flatten().bool())


def test_blocks_are_ragged_as_in_the_official_statistics() -> None:
    sampler = BlockMasking((14, 14), 75)
    counts = torch.tensor([int(sampler.draw(torch.Generator().manual_seed(i)).sum()) for i in range(600)]).double()
    assert counts.max() == 75
    assert counts.mean().item() == pytest.approx(74.47, abs=0.15)
    assert (counts == 75).double().mean().item() == pytest.approx(0.665, abs=0.06)
    mask = sampler.collate(torch.stack([sampler.draw(torch.Generator().manual_seed(i)) for i in range(40)]))
    assert mask.ids_keep is None


def test_blocks_with_an_exact_count_can_drop() -> None:
    sampler = BlockMasking((14, 14), 120, 16, 60, tries=0, exact=147)
    draws = torch.stack([sampler.draw(torch.Generator().manual_seed(i)) for i in range(8)])
    mask = sampler.collate(draws)
    assert mask.ids_keep is not None
    assert mask.ids_keep.shape == (8, 49)
    assert mask.hidden.sum(1).tolist() == [147] * 8
    blocks = draws >= 1
    assert blocks.sum(1).tolist() == [120] * 8
    assert not (blocks & ~mask.hidden).any(), "all of the blocks are hidden"


def test_units_are_hidden_whole_and_counted_up() -> None:
    sampler = UnitMasking((14, 14), 2, 0.6)
    drawn = sampler.draw(torch.Generator().manual_seed(0))
    assert int(drawn.sum()) == 120  # 30 of 49 squares
    squares = drawn.view(7, 2, 7, 2).permute(0, 2, 1, 3).flatten(2)
    assert torch.equal(squares.all(-1), squares.any(-1))
    mask = sampler.collate(torch.stack([drawn, sampler.draw(torch.Generator().manual_seed(1))]))
    assert mask.ids_keep is not None
    assert not torch.equal(mask.hidden[0], mask.hidden[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnitMasking((7, 7), 2, 0.6), "7 x 7 patches cannot be masked in squares of 2 x 2 patches"),
        (lambda: UnitMasking((4, 4), 2, 0.99), "hides 4 of 4 squares of 2 x 2 patches; expected at least one hidden"),
        (lambda: BlockMasking((4, 4), 16), r"is to hide 16 \(total\) of 16 patches; expected 1 to 15"),
        (lambda: BlockMasking((4, 4), 4), "the smallest block has 16 patches and 4 are hidden in all; expected 1 to 4"),
        (lambda: BlockMasking((4, 4), 4, 2, exact=20), r"is to hide 20 \(exact\) of 16 patches"),
    ],
)
def test_masks_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
