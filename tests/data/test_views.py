import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, v2
from torchvision.transforms.v2 import functional as F

from mimlet.config import AugmentSettings
from mimlet.data.augment import check_crop
from mimlet.data.dataset import ImageDataset, Sample
from mimlet.data.decode import Photo
from mimlet.data.pixels import Pixels, cut, planes, resize
from mimlet.data.seeding import seeded
from mimlet.data.source import open_source
from mimlet.data.views import View, Views, blur_range, gaussian_blur, refuse_other_augmentation
from mimlet.errors import ConfigError
from tests.data.images import encoded, picture

PLAIN = View(24, scale=(1.0, 1.0), flip=0, jitter_p=0, gray_p=0)
IMAGE = picture(0, (40, 30))


def drawn(view: View, seed: int, image: Image.Image = IMAGE) -> Tensor:
    with seeded(seed):
        return Views({"view": view})(image)["view"]


def cropped(view: View = PLAIN) -> Tensor:
    box, mode = view.draw(IMAGE.size)
    return planes(resize(cut(IMAGE, box), view.size, view.size, mode))


def crop(seed: int, view: View = PLAIN) -> Tensor:
    with seeded(seed):
        return cropped(view)


def test_nothing_but_the_crop() -> None:
    view = replace(PLAIN, scale=(0.08, 0.5), interpolation="random")
    for seed in range(10):
        assert torch.equal(drawn(view, seed), crop(seed, view))


def test_gray_is_exact() -> None:
    got = drawn(replace(PLAIN, gray_p=1.0), 0)
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    assert torch.equal(got, (crop(0).double() * weights).sum(0).to(torch.uint8).expand(3, -1, -1))


def test_solarisation_inverts_from_128_on() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    got = drawn(replace(PLAIN, size=16, ratio=(1.0, 1.0), solarize_p=1.0), 0, ramp)
    expected = torch.tensor([i if i < 128 else 255 - i for i in range(256)], dtype=torch.uint8).view(16, 16)
    assert torch.equal(got, expected.expand(3, -1, -1))


def test_flip() -> None:
    assert torch.equal(drawn(replace(PLAIN, flip=1.0), 0), crop(0).flip(-1))


def test_jitter_equals_torchvision_on_pillow() -> None:
    """Official code jitters Pillow images; the parameters' draws follow the crop's and the chance's."""
    view = replace(PLAIN, jitter_p=1.0)
    theirs = ColorJitter(0.4, 0.4, 0.2, 0.1)
    for seed in range(20):
        with seeded(seed):
            pixels = cropped(view)
            torch.rand(())
            expected = F.pil_to_tensor(theirs(F.to_pil_image(pixels)))
        assert torch.equal(drawn(view, seed), expected)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5, 1.3, 2.0])
def test_blur_equals_torchvision(sigma: float) -> None:
    pixels = F.pil_to_tensor(picture(1, (40, 30)))
    got = gaussian_blur(pixels, sigma).int()
    difference = (got - F.gaussian_blur(pixels, [17, 17], [sigma, sigma]).int()).abs()
    assert difference.max() <= 1  # of rounding
    assert difference.float().mean() < 0.01


def test_blur_keeps_flat_colours_and_takes_tiny_images() -> None:
    flat = torch.tensor([3, 100, 255], dtype=torch.uint8)[:, None, None].expand(3, 9, 9)
    assert torch.equal(gaussian_blur(flat, 2.0), flat)
    assert gaussian_blur(torch.randint(256, (3, 2, 5), dtype=torch.uint8), 2.0).shape == (3, 2, 5)


def test_deviations_are_even_over_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr("mimlet.data.views.gaussian_blur", lambda pixels, sigma: seen.append(sigma) or pixels)
    view = replace(PLAIN, size=4, blur_p=1.0, blur_sigma=(0.1, 2.0))
    for seed in range(1000):
        drawn(view, seed)
    low, middle, high = np.quantile(seen, [0, 0.5, 1])
    assert 0.1 <= low < 0.12
    assert 1.98 < high <= 2
    assert abs(middle - 1.05) < 0.1


def test_probabilities() -> None:
    """Each change alone happens as often as it should, within 4 deviations of 500 draws."""
    image = picture(1, (8, 8))
    pixels = F.pil_to_tensor(image)
    names = {"flip": 0.5, "jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.1, "solarize_p": 0.2}
    for name, p in names.items():
        view = replace(PLAIN, size=8, ratio=(1.0, 1.0), blur_sigma=(2.0, 2.0), **{name: p})
        changed = sum(not torch.equal(drawn(view, seed, image), pixels) for seed in range(500))
        assert abs(changed / 500 - p) < 4 * (p * (1 - p) / 500) ** 0.5, name


def test_changes_are_independent() -> None:
    """Gray and solarisation, 0.5 each: four equally frequent outcomes. Both views of an image differ likewise."""
    dark = Image.new("RGB", (8, 8), (200, 30, 30))
    views = Views({name: replace(PLAIN, size=4, gray_p=0.5, solarize_p=0.5) for name in ("a", "b")})
    outcomes: Counter[tuple[int, ...]] = Counter()
    pairs: Counter[bool] = Counter()
    for seed in range(800):
        with seeded(seed):
            got = views(dark)
        outcomes[tuple(got["a"][:, 0, 0].tolist())] += 1
        pairs[torch.equal(got["a"], got["b"])] += 1
    # gray: 0.2989 * 200 + 0.701 * 30 = 80.8, below the threshold, so that solarisation leaves it
    assert set(outcomes) == {(200, 30, 30), (55, 30, 30), (80, 80, 80)}
    assert abs(outcomes[80, 80, 80] - 400) < 60
    assert abs(outcomes[55, 30, 30] - 200) < 60
    assert abs(pairs[True] - 800 * (0.25 + 2 / 16)) < 60


def test_order() -> None:
    """Crop, jitter, gray, blur, solarise, flip: with everything certain, as if done by hand."""
    view = replace(PLAIN, flip=1.0, jitter_p=1.0, gray_p=1.0, blur_p=1.0, blur_sigma=(1.0, 1.0), solarize_p=1.0)
    jittered = drawn(replace(PLAIN, jitter_p=1.0), 3)
    by_hand = F.solarize(gaussian_blur(F.rgb_to_grayscale(jittered, 3), 1.0), 128).flip(-1)
    assert torch.equal(drawn(view, 3), by_hand)


def test_views_are_contiguous_seeded_and_travel() -> None:
    views = Views({"large": View(32, blur_p=0.5, solarize_p=0.5), "small": View(16, scale=(0.05, 0.4), flip=1.0)})
    copy = pickle.loads(pickle.dumps(views))
    for seed in range(5):
        with seeded(seed):
            first = views(IMAGE)
        with seeded(seed):
            again = copy(IMAGE)
        for name, size in (("large", 32), ("small", 16)):
            assert (first[name].dtype, first[name].shape) == (torch.uint8, (3, size, size))
            assert first[name].is_contiguous()
            assert torch.equal(first[name], again[name])
    with seeded(1):
        assert not torch.equal(first["large"], views(IMAGE)["large"])


def test_a_data_set_repeats_its_views(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        picture(i, (40, 30)).save(folder / f"{i}.png")
    views = Views({"view1": View(16, blur_p=1.0), "view2": View(16, blur_p=0.1, solarize_p=0.2)})
    data = ImageDataset(open_source([str(folder)]), views, seed=3)
    first = data[2, 1]
    torch.rand(7)
    again, later = data[2, 1], data[3, 1]
    for name in ("view1", "view2"):
        assert torch.equal(first.views[name], again.views[name])
        assert not torch.equal(first.views[name], later.views[name])


def test_a_large_jpeg_is_decoded_once_and_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as the view allows that needs most of it; the crops are those of the whole image."""
    decoded: list[int] = []
    read = Photo._read

    def counted(self: Photo, reduction: int) -> Pixels:
        decoded.append(reduction)
        return read(self, reduction)

    (tmp_path / "0.jpg").write_bytes(encoded(picture(3, (640, 480)), quality=95))
    views = Views(
        {"large": replace(PLAIN, size=16, scale=(0.9, 1.0)), "small": replace(PLAIN, size=8, scale=(0.1, 0.2))}
    )
    whole, reduced = (ImageDataset(open_source([str(tmp_path)]), views, reduced=reduced) for reduced in (False, True))
    monkeypatch.setattr(Photo, "_read", counted)
    for epoch in range(5):
        one, two = whole[epoch, 0], reduced[epoch, 0]
        assert isinstance(one, Sample)
        assert isinstance(two, Sample)
        for name in views.views:
            assert 0 < (one.views[name].int() - two.views[name].int()).abs().double().mean() < 3
    assert decoded[::2] == [1] * 5
    assert set(decoded[1::2]) == {8}
    tiny = ImageDataset(open_source([str(tmp_path)]), Views({**views.views, "huge": View(200)}), reduced=True)
    tiny[0, 0]
    assert decoded[10:] == [1]


def test_wide_and_tiny_images() -> None:
    for size in [(1, 1), (1, 50), (300, 2)]:
        assert drawn(View(32, blur_p=1.0, solarize_p=1.0), 0, picture(2, size)).shape == (3, 32, 32)


def test_deviations_follow_the_image_size() -> None:
    assert blur_range(224) == (0.1, 2.0)
    assert blur_range(112) == (0.05, 1.0)


def test_other_augmentation_is_refused() -> None:
    refuse_other_augmentation(AugmentSettings(crop_scale=(0.2, 1.0), flip=0.0), "mocov3")
    for settings, message in (
        ({"color_jitter": 0.4}, r"data\.augment\.color_jitter is 0\.4, but method 'dino' makes views of its own"),
        ({"randaugment": "rand-m9"}, r"data\.augment\.randaugment is 'rand-m9'"),
        ({"pad_crop": 4}, r"data\.augment\.pad_crop is 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse_other_augmentation(AugmentSettings(**settings), "dino")
    with pytest.raises(ConfigError, match=r"data\.augment\.crop_scale is \(0\.5, 1\.0\)"):
        refuse_other_augmentation(AugmentSettings(crop_scale=(0.5, 1.0)), "dino", also=("crop_scale",))
    with pytest.raises(ConfigError, match=r"method\.local_scale is 0\.5, 0\.1; expected smallest and largest share"):
        check_crop((0.5, 0.1), (0.75, 1.33), "method.local_scale")


def test_a_view_is_no_slower_than_torchvisions() -> None:
    """The same changes by torchvision's transforms on tensors take three times as long (12.7 ms against 3.9)."""
    image = picture(0, (500, 375))
    ours = Views({"view": View(224, jitter_p=1.0, blur_p=1.0)})
    theirs = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(224, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.ColorJitter(0.4, 0.4, 0.2, 0.1),
            v2.RandomGrayscale(0.2),
            v2.GaussianBlur(17, (0.1, 2.0)),
            v2.RandomHorizontalFlip(),
        ]
    )
    seconds = {}
    for name, transform in (("ours", ours), ("theirs", theirs)):
        rounds = []
        for _ in range(3):
            began = process_time()
            for seed in range(5):
                with seeded(seed):
                    transform(image)
            rounds.append(process_time() - began)
        seconds[name] = min(rounds)
    assert seconds["ours"] < seconds["theirs"]
