import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from orl.data import views
from orl.data.views import iou, jitter_box, random_resized_crop

SEEDS = st.integers(0, 2**32)
SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700))


def inside(box, size):
    x, y, w, h = box
    return all(type(value) is int for value in box) and 0 <= x < x + w <= size[0] and 0 <= y < y + h <= size[1]


# Random numbers


def test_random_numbers_depend_on_the_key_alone():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**31 - 1, 799, 241_689, 5)]
    draws = [views.rng(*key).random(4).tolist() for key in keys]
    assert draws == [views.rng(*key).random(4).tolist() for key in keys]
    assert len(set(map(tuple, draws))) == len(keys)


@given(SEEDS, SIZES)
@settings(max_examples=20)
def test_geometry_is_repeatable(seed, size):
    assert random_resized_crop(size, views.rng(seed)) == random_resized_crop(size, views.rng(seed))
    box = (0, 0, *size)
    assert jitter_box(box, size, views.rng(seed)) == jitter_box(box, size, views.rng(seed))


# Overlap

SIDE = 12


@st.composite
def small_boxes(draw):
    x, y = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
    return x, y, draw(st.integers(1, SIDE - x)), draw(st.integers(1, SIDE - y))


def pixels(box):
    x, y, w, h = box
    return {(column, row) for column in range(x, x + w) for row in range(y, y + h)}


@given(small_boxes(), st.lists(small_boxes(), max_size=5), st.sampled_from([np.int16, np.int32, np.float64]))
@settings(max_examples=100)
@example((0, 0, 2, 2), [(2, 0, 2, 2), (0, 0, 2, 2), (0, 0, 2, 1)], np.int16)
def test_iou_counts_pixels(box, others, dtype):
    found = iou(np.array(box, dtype), np.array(others, dtype).reshape(-1, 4))
    assert found.dtype == np.float64
    assert found.tolist() == [len(pixels(box) & pixels(o)) / len(pixels(box) | pixels(o)) for o in others]


def test_iou_of_large_int16_boxes_does_not_overflow():
    box = np.array([20_000, 20_000, 20_000, 20_000], np.int16)
    half = np.array([20_000, 20_000, 20_000, 10_000], np.int16)
    assert iou(box, np.stack([box, half])).tolist() == [1, 0.5]


# Crops


@given(SIZES, SEEDS)
@settings(max_examples=300)
@example((1, 1), 0)
@example((1, 700), 0)
@example((700, 1), 0)
def test_crops_lie_inside_the_image(size, seed):
    assert inside(random_resized_crop(size, views.rng(seed)), size)


@given(st.tuples(st.integers(60, 700), st.integers(60, 700)), SEEDS)
@settings(max_examples=100)
def test_crops_keep_their_bounds(size, seed):
    assume(3 / 4 <= size[0] / size[1] <= 4 / 3)  # else the fallback may be smaller than the bounds
    _, _, w, h = random_resized_crop(size, views.rng(seed), (0.2, 0.5), (0.8, 1.5))
    area, aspect = w * h / (size[0] * size[1]), w / h
    assert 0.2 * 0.95 <= area <= 0.5 * 1.05  # sides are rounded
    assert 0.8 * 0.95 <= aspect <= 1.5 * 1.05


@pytest.fixture(scope="module")
def torchvision_crop():
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")

    def crop(size, scale, ratio):
        image = torch.empty(1, size[1], size[0])
        y, x, h, w = transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio))
        return x, y, w, h

    torch.manual_seed(0)
    return crop


@pytest.mark.parametrize("size", [(640, 480), (375, 500), (224, 224), (900, 300)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_crops_are_distributed_as_torchvisions(size, scale, torchvision_crop):
    count, ratio, rng = 3000, (3 / 4, 4 / 3), views.rng(0)

    def describe(boxes):
        x, y, w, h = np.array(boxes, float).T
        free = np.maximum(size - np.stack([w, h], 1), 1)
        return {"area": w * h / (size[0] * size[1]), "aspect": w / h, "x": x / free[:, 0], "y": y / free[:, 1]}

    ours = describe([random_resized_crop(size, rng, scale, ratio) for _ in range(count)])
    theirs = describe([torchvision_crop(size, scale, ratio) for _ in range(count)])
    shares = np.linspace(0.02, 0.98, 25)
    for name, values in ours.items():
        # Quantiles of 3000 draws scatter by about 0.01 where the density is even.
        np.testing.assert_allclose(
            np.quantile(values, shares), np.quantile(theirs[name], shares), atol=0.05, err_msg=name
        )
        assert values.mean() == pytest.approx(theirs[name].mean(), abs=0.02)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (500, 3), (1, 77), (77, 1), (3000, 7)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.9, 1.1)])
def test_the_fallback_is_torchvisions(size, ratio, torchvision_crop):
    """No crop of at least half of such an image has an aspect within the bounds."""
    expected = torchvision_crop(size, (0.5, 1.0), ratio)
    assert random_resized_crop(size, views.rng(0), (0.5, 1.0), ratio) == expected


# Jittered boxes


@st.composite
def box_in_image(draw):
    width, height = draw(st.integers(1, 500)), draw(st.integers(1, 500))
    x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (x, y, draw(st.integers(1, width - x)), draw(st.integers(1, height - y))), (width, height)


def expected_jitter(box, size, rng, shift, scale, ratio, min_iou, attempts):
    """The method's sentence, one try after the other; also how many tries it took."""
    x, y, w, h = box
    for attempt in range(attempts):
        area = rng.uniform(*scale) * (w * h)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        new_w, new_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        cx = x + w / 2 + rng.uniform(-shift, shift) * w
        cy = y + h / 2 + rng.uniform(-shift, shift) * h
        left, top = round(cx - new_w / 2), round(cy - new_h / 2)
        if left < 0 or top < 0 or left + new_w > size[0] or top + new_h > size[1]:
            continue
        across = min(x + w, left + new_w) - max(x, left)
        down = min(y + h, top + new_h) - max(y, top)
        shared = across * down if across > 0 and down > 0 else 0
        if shared / (w * h + new_w * new_h - shared) > min_iou:
            return (left, top, new_w, new_h), attempt + 1
    return box, attempts


@given(
    box_in_image(),
    SEEDS,
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from([(0.5, 2.0), (0.25, 1.0), (1.0, 1.0)]),
    st.sampled_from([(0.5, 2.0), (1.0, 1.0), (0.2, 0.4)]),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.sampled_from([0, 1, 5, 200]),
)
@settings(max_examples=300)
def test_jitter_is_the_methods(where, seed, shift, scale, ratio, min_iou, attempts):
    box, size = where
    options = (shift, scale, ratio, min_iou, attempts)
    found = jitter_box(box, size, views.rng(seed), *options)
    assert found == expected_jitter(box, size, views.rng(seed), *options)[0]
    assert found == box or (inside(found, size) and iou(box, np.array([found]))[0] > min_iou)


@given(box_in_image(), SEEDS)
@settings(max_examples=200)
def test_defaults_of_jitter_are_the_methods(where, seed):
    box, size = where
    expected, _ = expected_jitter(box, size, views.rng(seed), 0.5, (0.5, 2), (0.5, 2), 0.5, 200)
    found = jitter_box(box, size, views.rng(seed))
    assert found == expected
    assert inside(found, size)


def test_no_attempts_give_the_box_itself():
    assert jitter_box((3, 4, 50, 60), (100, 100), views.rng(0), attempts=0) == (3, 4, 50, 60)


def test_a_box_that_admits_no_copy_is_its_own():
    """Too thin for an aspect of at least 1/2 at half its area."""
    assert jitter_box((0, 0, 1000, 1), (1000, 1), views.rng(0)) == (0, 0, 1000, 1)


def test_jitter_may_touch_the_borders_and_differs_from_the_box():
    copies = {jitter_box((0, 0, 20, 20), (20, 20), views.rng(seed)) for seed in range(300)}
    assert len(copies) > 50
    for edge in (lambda b: b[0] == 0, lambda b: b[1] == 0, lambda b: b[0] + b[2] == 20, lambda b: b[1] + b[3] == 20):
        assert any(edge(copy) for copy in copies)
