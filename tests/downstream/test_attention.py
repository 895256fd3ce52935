"""Attention maps: their numbers against loops, the place of what they show, the boxes, and the files."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from orl import InputError, artifacts, config
from orl.downstream import attention
from orl.networks import backbones

# Numbers


def test_energy_and_similarity_are_those_of_loops():
    features = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0)).relu()
    features[:, 0, 0] = 0
    inside = np.zeros((4, 5), bool)
    inside[1:3, 2:4] = inside[0, 0] = True
    values = features.double().numpy()
    mean = np.mean([values[:, y, x] for y in range(4) for x in range(5) if inside[y, x]], 0)
    power, cosine = np.zeros((4, 5)), np.zeros((4, 5))
    for y in range(4):
        for x in range(5):
            cell = values[:, y, x]
            power[y, x] = sum(value**2 for value in cell)
            if power[y, x]:
                cosine[y, x] = (cell * mean).sum() / np.sqrt(power[y, x] * (mean**2).sum())
    np.testing.assert_allclose(attention.energy(features), power, rtol=1e-5)
    np.testing.assert_allclose(attention.similarity(features, inside), cosine, rtol=1e-5)
    assert np.isfinite(attention.similarity(torch.zeros(7, 4, 5), inside)).all()


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_cells_see_around_their_centres(name):
    """The middle of what a cell's value depends on, of a network whose weights are all equal."""
    model = backbones.backbone(name).eval()
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.constant_(part.weight, 1 / part.weight[0].numel())
    image = torch.rand(1, 3, 353, 417, generator=torch.Generator().manual_seed(0)).requires_grad_()
    maps = model.stages(image)[-1]
    assert maps.shape[2:] == (12, 14)
    maps[0, :, 5, 7].sum().backward()
    weight = image.grad.sum((0, 1)).double()
    assert weight.min() >= 0
    for axis, count, cell in ((0, 12, 5), (1, 14, 7)):
        along = weight.sum(1 - axis)
        middle = (along * (torch.arange(len(along)) + 0.5)).sum() / along.sum()
        assert abs(middle - attention.centres(count)[cell]) < 3  # a cell is 32 wide


SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(SIZES, st.integers(32, 900))
def test_inputs_end_at_centres_and_are_bounded(size, side):
    found = attention.input_size(size, side)
    for whole in found:
        assert attention.centres(-(-whole // 32))[-1] == whole - 0.5  # that of the last cell: the last pixel
    assert max(found) <= 4 * side + 17
    if max(size) <= 4 * min(size):
        assert abs(min(found) - side) <= 17
        exact = side * max(size) / min(size)
        assert abs(max(found) - exact) <= 17


@given(
    st.floats(0.2, 5), st.floats(0.2, 5), st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.001, 1), st.floats(0.001, 1)),
)  # fmt: skip
def test_a_box_has_the_cells_whose_centres_it_holds(across, down, shape, shares):
    height, width = shape[0] * 32 / down, shape[1] * 32 / across  # of the photo
    x, y = shares[0] * width, shares[1] * height
    w, h = shares[2] * (width - x) + 1e-6, shares[3] * (height - y) + 1e-6
    found = attention.cells((x, y, w, h), (across, down), shape)
    assert found.shape == shape
    columns, rows = np.flatnonzero(found.any(0)), np.flatnonzero(found.any(1))
    assert len(rows)
    np.testing.assert_array_equal(found, np.outer(found.any(1), found.any(0)))
    for chosen, start, length, factor, count in ((columns, x, w, across, shape[1]), (rows, y, h, down, shape[0])):
        at = [(32 * number + 0.5) / factor for number in range(count)]
        held = [number for number in range(count) if start <= at[number] < start + length]
        if not held:
            (nearest,) = chosen
            middle = start + length / 2
            assert abs(at[nearest] - middle) <= min(abs(other - middle) for other in at) + 1e-9
        else:
            assert chosen.tolist() == held


def test_the_whole_photo_has_all_cells():
    assert attention.cells((0, 0, 640, 480), (641 / 640, 481 / 480), (16, 21)).all()


def test_maps_are_enlarged_bilinearly_between_centres():
    values = np.random.default_rng(0).random((4, 6))
    whole = attention.enlarge(values, (161, 97), (161, 97))
    options = {"size": (97, 161), "mode": "bilinear", "align_corners": True}
    expected = nn.functional.interpolate(torch.from_numpy(values)[None, None], **options)[0, 0]
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    small = attention.enlarge(values, (161, 97), (23, 97))  # 161 / 23 is odd: every seventh column
    np.testing.assert_allclose(small, whole[:, 3::7], atol=1e-12)


# The whole, on photos


@pytest.fixture
def settings(tiny):
    def make(**section):
        rest = tiny.model_dump(mode="json", exclude={"downstream"})
        return config.parse({**rest, "downstream": {"attention": {"photos": 2, "side": 64, **section}}})

    return make


@pytest.fixture(scope="module")
def correspondences_path(manifest, proposals_path, tmp_path_factory):
    """Pairs in which the last box of each photo is the most similar one, summed, though never alone."""
    path = tmp_path_factory.mktemp("pairs") / "correspondences.h5"
    counts, k = np.diff(artifacts.read_proposals(proposals_path).box_offsets), 2
    pairs, similarity = [], []
    for count in np.repeat(counts, k).tolist():
        pairs += [(0, 0), (count - 1, 0), (count - 1, 0)]
        similarity += [0.9, 0.5, 0.5]
    inputs = {"proposals": artifacts.fingerprint(proposals_path)}
    with artifacts.create(path, artifacts.CORRESPONDENCES, {}, inputs) as file:
        rows = np.arange(len(manifest), dtype=np.int32)
        file["neighbor"] = np.stack([(rows + 1) % len(rows), (rows + 2) % len(rows)], 1)
        file["pair"] = np.array(pairs, np.uint16)
        file["similarity"] = np.array(similarity, np.float16)
        file["pair_offsets"] = np.arange(0, len(pairs) + 1, 3, dtype=np.int64)
    return path


@pytest.fixture
def draw(photos, manifest_path, model_folder, settings, tmp_path):
    def run(*others, names=("random", "orl"), root=photos, manifest=manifest_path, **section):
        models = dict.fromkeys(names, model_folder / "backbone.safetensors")
        roi = section.pop("roi", None)
        attention.draw(settings(**section), root, manifest, models, tmp_path / "out", *others, roi)

    def drawn(*others, **options):
        others += (None,) * (2 - len(others))
        run(*others, **options)
        return json.loads((tmp_path / "out" / "attention.json").read_text())

    return drawn


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_those_of_the_photos_and_the_same_again(draw, manifest, tmp_path):
    found = draw(photos=3)
    first = files(tmp_path / "out")
    assert found["models"] == ["random", "orl"]
    rows = [manifest.image_id.tolist().index(one["image_id"]) for one in found["photos"]]
    assert len(set(rows)) == 3
    for number, (one, row) in enumerate(zip(found["photos"], rows, strict=True), 1):
        assert one["path"] == manifest.path[row]
        assert one["file"] == f"{number:02d}-{one['image_id'].replace('/', '_')}.png"
        width, height = manifest.width[row], manifest.height[row]
        assert (one["roi"], one["chosen"]) == ([width / 4, height / 4, width / 2, height / 2], "centre")
    assert set(first) == {"attention.json", "contact_sheet.png", *(one["file"] for one in found["photos"])}
    draw(photos=3)
    assert files(tmp_path / "out") == first
    fewer = draw(photos=2)  # another run's files go
    assert fewer["photos"] == found["photos"][:2]
    assert len(files(tmp_path / "out")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_boxes_come_from_pairs_else_proposals(draw, manifest, proposals_path, correspondences_path):
    proposals = artifacts.read_proposals(proposals_path)
    paired = draw(proposals_path, correspondences_path, photos=2)["photos"]
    largest = draw(proposals_path, photos=2)["photos"]
    assert [one["image_id"] for one in paired] == [one["image_id"] for one in largest]
    for one, other in zip(paired, largest, strict=True):
        row = manifest.image_id.tolist().index(one["image_id"])
        boxes = proposals.box[proposals.box_offsets[row] : proposals.box_offsets[row + 1]].tolist()
        assert (one["roi"], one["chosen"]) == (boxes[-1], "most paired by stage 2")
        assert other["chosen"] == "largest proposal"
        assert other["roi"] == max(boxes, key=lambda box: box[2] * box[3])


def test_a_box_by_hand(draw, manifest):
    one = str(manifest.image_id[4])
    (found,) = draw(ids=[one], roi=(10, 5, 20.5, 30))["photos"]
    assert (found["image_id"], found["roi"], found["chosen"]) == (one, [10, 5, 20.5, 30], "given")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A backbone that sees colours: each cell is the brightness of red, green and blue around its centre, again and
    again; what is darker than ImageNet's mean is 0."""
    model = backbones.backbone("resnet10")
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            outputs, inputs, *kernel = part.weight.shape
            nn.init.zeros_(part.weight)
            with torch.no_grad():
                part.weight[torch.arange(outputs), torch.arange(outputs) % inputs, kernel[0] // 2, kernel[1] // 2] = 1
    path = tmp_path_factory.mktemp("seeing") / "backbone.safetensors"
    backbones.save(path, "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    return path


@pytest.mark.parametrize("place", [(40, 40), (280, 40), (150, 150), (40, 250), (270, 260)])
def test_the_place_of_the_object_lights_up(place, seeing, settings, tmp_path):
    """A red square, and a darker blue one: energy and similarity to a box on the red are highest there."""
    (x, y), side = place, 96
    image = np.zeros((384, 416, 3), np.uint8)
    image[200:330, 150:260] = 0, 0, 170
    image[y : y + side, x : x + side] = 255, 0, 0
    Image.fromarray(image).save(tmp_path / "a.png")
    row = ("a", "a.png", 416, 384, (tmp_path / "a.png").stat().st_size, "")
    artifacts.write_csv(tmp_path / "manifest.csv", artifacts.MANIFEST_COLUMNS, [row, ("b", *row[1:])])
    small = (x + 30, y + 30, 40, 40)
    attention.draw(settings(ids=["a"], side=385), tmp_path, tmp_path / "manifest.csv", {"one": seeing},
                   tmp_path / "out", roi=small)  # fmt: skip
    figure = np.asarray(Image.open(tmp_path / "out" / "01-a.png").convert("RGB")).astype(float)
    wide, high = 340, 314  # of a panel
    red = figure[34 : 34 + high, 12 : 12 + wide, 0] - figure[34 : 34 + high, 12 : 12 + wide, 1]
    found = [np.argwhere(red > 200).mean(0)]
    for top in (34, 34 + high + 22):  # in the column to the right
        shown = figure[top : top + high, 380 : 380 + wide]
        yellow = shown[..., 0] - shown[..., 2]  # of cividis: from blue to yellow; the box's lines are grey
        assert yellow.max() > 150
        found.append(np.argwhere(yellow > 150).mean(0))
    expected = np.array([(y + side / 2) * high / 384, (x + side / 2) * wide / 416])
    assert abs(found[0] - expected).max() < 4
    assert abs(found[1:] - expected).max() < 14  # half a cell


@pytest.mark.parametrize(("count", "size"), [(1, (300, 200)), (6, (64, 640)), (6, (900, 60)), (3, (5, 300))])
def test_figures_fit_a_page(count, size, draw, tmp_path):
    root, rows = tmp_path / "photos", []
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    for number in range(12):
        Image.fromarray(pixels).save(root / f"{number}.png")
        rows.append((f"{number}", f"{number}.png", *size, (root / f"{number}.png").stat().st_size, ""))
    artifacts.write_csv(tmp_path / "manifest.csv", artifacts.MANIFEST_COLUMNS, rows)
    names = [f"model-{number}-with-a-long-name" for number in range(count)]
    found = draw(root=root, manifest=tmp_path / "manifest.csv", names=names, photos=2)
    assert len(found["photos"]) == 2
    for path in (tmp_path / "out").glob("*.png"):
        assert Image.open(path).width <= (1200 if path.name == "contact_sheet.png" else 1100)
        assert path.stat().st_size < 400_000


def test_names_of_files_are_safe_whatever_the_ids(draw, manifest_path, tmp_path):
    odd = ["../../a b", "$x_1$", "中\n文", "..", "a" * 300]
    with open(manifest_path, newline="") as file:
        header, *rows = csv.reader(file)
    for row, image_id in zip(rows, odd, strict=False):
        row[0] = image_id
    artifacts.write_csv(tmp_path / "manifest.csv", tuple(header), rows)
    found = draw(manifest=tmp_path / "manifest.csv", ids=odd, names=["$x^2$ % { <b>"])
    names = [one["file"] for one in found["photos"]]
    assert names == ["01-.._.._a_b.png", "02-_x_1_.png", "03-___.png", "04-...png", f"05-{'a' * 80}.png"]
    assert [one["image_id"] for one in found["photos"]] == odd
    assert set(names) < set(files(tmp_path / "out"))


# Bad input


def refused(sentence, draw, *others, **options):
    with pytest.raises(InputError, match=sentence) as caught:
        draw(*others, **options)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_sentence(draw, manifest, proposals_path, correspondences_path, tmp_path):
    one = str(manifest.image_id[4])
    near = re.escape(f"has no photo {one + '0'!r}; did you mean {one!r}?")
    refused(near, draw, ids=[one, one + "0"])
    refused("no model to draw maps of", draw, names=())
    refused("--roi: belongs to one photo, but ids names 0", draw, roi=(1, 1, 5, 5))
    refused("--roi: belongs to one photo, but ids names 2", draw, ids=[one, one], roi=(1, 1, 5, 5))
    width, height = int(manifest.width[4]), int(manifest.height[4])
    for roi in ((0, 0, width + 1, 5), (0, 0, 5, height + 1), (-1, 0, 5, 5), (0, 0, 0, 5), (float("nan"), 0, 5, 5)):
        refused(rf"^--roi: box .* not inside the photo, which is {width} x {height} pixels", draw, ids=[one], roi=roi)
    refused("correspondences.h5: numbers boxes of a proposals.h5", draw, None, correspondences_path)
    other = tmp_path / "correspondences.h5"
    found = artifacts.read_correspondences(correspondences_path)
    with artifacts.create(other, artifacts.CORRESPONDENCES, {}, {"proposals": "others"}) as file:
        file.update({name: np.array(getattr(found, name)) for name in artifacts.LAYOUT[artifacts.CORRESPONDENCES]})
    refused("correspondences.h5: was made from another proposals", draw, proposals_path, other)
    rows = zip(*(getattr(manifest, name).tolist() for name in artifacts.MANIFEST_COLUMNS), strict=True)
    artifacts.write_csv(tmp_path / "manifest.csv", artifacts.MANIFEST_COLUMNS, list(rows)[::-1])
    refused("proposals.h5: was made from another manifest", draw, proposals_path, manifest=tmp_path / "manifest.csv")
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_way_stays(draw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.png").write_text("mine")
    refused("holiday.png: is in the way", draw)
    assert files(tmp_path / "out") == {"holiday.png": b"mine"}
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("mine")
    refused("out: is in the way", draw)


def test_a_link_stays_one(draw, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    draw(photos=1)
    assert (tmp_path / "out").is_symlink()
    assert "attention.json" in files(tmp_path / "elsewhere")


def test_a_photo_that_fails_leaves_the_former_run(draw, photos, manifest, tmp_path):
    draw(ids=[str(manifest.image_id[0])])
    before = files(tmp_path / "out")
    root = shutil.copytree(photos, tmp_path / "copy")
    (root / str(manifest.path[3])).unlink()
    refused("photo is gone", draw, root=root, ids=[str(manifest.image_id[row]) for row in (0, 3)])
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out"]


def test_features_that_are_not_finite_are_refused(draw, model_folder, tmp_path, settings, photos, manifest_path):
    model = backbones.load(model_folder / "backbone.safetensors")
    nn.init.constant_(model.bn1.weight, float("inf"))
    path = tmp_path / "backbone.safetensors"
    backbones.save(path, "resnet10", model, artifacts.stamp(artifacts.MODEL, {}, {}))
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: its features of .* are not finite"):
        attention.draw(settings(), photos, manifest_path, {"bad": path}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
