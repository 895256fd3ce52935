"""Every operation against Pillow and torchvision, sample by sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from orl.config import Views
from orl.training import augment as A

PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini" / "train2017"


def made_images():
    """Noise, gradients, flat areas, saturated and gray colours: what rounding is sensitive to."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 64)
    images = [rng.integers(0, 256, (64, 64, 3)) for _ in range(4)]
    images += [np.stack([np.add.outer(ramp, ramp[:: 1 if i else -1]) / 2] * 3, -1) for i in range(2)]
    images += [np.broadcast_to(colour, (64, 64, 3)) for colour in ([0, 0, 0], [255, 255, 255], [255, 0, 1], [9, 9, 9])]
    images += [np.broadcast_to(rng.integers(0, 256, (64, 1, 3)), (64, 64, 3)) for _ in range(2)]
    return [Image.fromarray(np.asarray(image).astype(np.uint8)) for image in images]


@pytest.fixture(scope="module", params=["made", "photos"])
def images(request):
    if request.param == "made":
        return made_images()
    if not PHOTOS.is_dir():
        pytest.skip("the coco-mini photos are not there")
    return [Image.open(path).convert("RGB").resize((96, 96)) for path in sorted(PHOTOS.iterdir())[:12]]


def batch(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def factors(low, high):
    return np.random.default_rng(1).uniform(low, high, 12).astype(np.float32)


@pytest.mark.parametrize(
    ("operation", "reference", "low", "high"),
    [
        (A.brightness, "adjust_brightness", 0.2, 1.8),
        (A.contrast, "adjust_contrast", 0.2, 1.8),
        (A.saturation, "adjust_saturation", 0.2, 1.8),
        (A.hue, "adjust_hue", -0.5, 0.5),
    ],
)
def test_colour_jitter_equals_torchvision_on_pillow_images(images, operation, reference, low, high):
    functional = pytest.importorskip("torchvision.transforms.functional")
    factor = factors(low, high)
    expected = [getattr(functional, reference)(image, float(f)) for image, f in zip(images, factor, strict=True)]
    assert torch.equal(operation(batch(images).float(), torch.from_numpy(factor)), batch(expected).float())


@pytest.mark.parametrize("largest", [2.0, 7.0])
def test_blur_equals_pillow(images, largest):
    sigma = factors(0.1, largest)
    expected = [
        image.filter(ImageFilter.GaussianBlur(float(radius))) for image, radius in zip(images, sigma, strict=True)
    ]
    assert torch.equal(A.blur(batch(images).float(), torch.from_numpy(A.blur_taps(sigma))), batch(expected).float())


def test_grayscale_and_solarize_equal_pillow(images):
    x = batch(images)
    assert torch.equal(A.grayscale(x.float()), batch([image.convert("L").convert("RGB") for image in images]).float())
    assert torch.equal(A.solarize(x.float()), batch([ImageOps.solarize(image, 128) for image in images]).float())


def pillow_view(image, row):
    """One view by torchvision's functions on a Pillow image, from the same parameters."""
    from torchvision.transforms import functional as F

    value = dict(zip(A.COLUMNS, row.tolist(), strict=True))
    if value["flip"]:
        image = F.hflip(image)
    if value["jitter"]:
        names = ("brightness", "contrast", "saturation", "hue")
        for number in A.ORDERS[int(value["order"])]:
            image = getattr(F, f"adjust_{names[number]}")(image, value[names[number]])
    if value["grayscale"]:
        image = F.rgb_to_grayscale(image, 3)
    if value["blur"]:
        image = image.filter(ImageFilter.GaussianBlur(value["blur"]))
    if value["solarize"]:
        image = ImageOps.solarize(image, 128)
    return F.normalize(F.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("recipe", [0, 1])
def test_whole_view_equals_torchvision(images, recipe):
    pytest.importorskip("torchvision")
    views = Views(solarize_p=(0.5, 0.5), blur_p=(0.5, 0.5), jitter_p=0.7)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = np.stack([A.draw(views, recipe, rng) for _ in images])
        expected = torch.stack([pillow_view(image, row) for image, row in zip(images, rows, strict=True)])
        got = A.augment(batch(images), torch.from_numpy(rows))
        assert (got - expected).abs().max() < 1e-5


def test_draw_follows_the_settings():
    views, rng = Views(), np.random.default_rng(0)
    first = np.stack([A.draw(views, 0, rng) for _ in range(4000)])
    second = np.stack([A.draw(views, 1, rng) for _ in range(4000)])
    for rows, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        value = dict(zip(A.COLUMNS, rows.T, strict=True))
        assert value["flip"].mean() == pytest.approx(0.5, abs=0.03)
        assert value["jitter"].mean() == pytest.approx(0.8, abs=0.03)
        assert value["grayscale"].mean() == pytest.approx(0.2, abs=0.03)
        assert (value["blur"] > 0).mean() == pytest.approx(blur, abs=0.03)
        assert value["solarize"].mean() == pytest.approx(solarize, abs=0.03)
        assert value["blur"].max() <= 2.0
        assert set(value["order"]) == set(range(24))
        for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
            assert value[name].min() == pytest.approx(1 - strength, abs=0.01)
            assert value[name].max() == pytest.approx(1 + strength, abs=0.01)
        assert np.abs(value["hue"]).max() == pytest.approx(0.1, abs=0.01)


def test_samples_do_not_influence_each_other(images):
    """A view's pixels depend on its own parameters only, whoever shares its batch."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(np.stack([A.draw(Views(), 1, rng) for _ in images]))
    whole = A.augment(batch(images), rows)
    for number in range(len(images)):
        one = slice(number, number + 1)
        assert torch.equal(A.augment(batch(images)[one], rows[one])[0], whole[number])


def test_without_hue_the_hue_is_left_alone():
    """As torchvision's ColorJitter(hue=0): through 8-bit HSV and back, colours would change."""
    images = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)
    row = dict.fromkeys(A.COLUMNS, 0.0) | {"jitter": 1, "brightness": 1, "contrast": 1, "saturation": 1}
    parameters = torch.tensor([[row[name] for name in A.COLUMNS]] * 4)
    assert torch.equal(A.augment(images, parameters), A.normalize(images))
