import contextlib
import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from orl import InputError
from orl.data import decode as module
from orl.data.decode import UndecodableError, center_crop, decode, resize_crop, short_side

COCO = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini"


def photo(height=41, width=60, seed=0):
    """Smooth gradients with some noise: compresses like a photo and has no symmetry."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 200 // width, y * 200 // height, (x + 2 * y) % 180], -1)
    return (base + np.random.default_rng(seed).integers(0, 40, base.shape)).astype(np.uint8)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def default_loader(data):
    """What torchvision's ImageFolder makes of a file."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


RGB = photo()
IMAGE = Image.fromarray(RGB)
GRAY16 = np.arange(0, 65536, 27, dtype=np.uint16)[:2400].reshape(40, 60)
TURNED = ImageOps.flip(IMAGE)
PALETTE = IMAGE.quantize(64)

WHOLE = {
    "jpeg": encode(IMAGE, "JPEG"),
    "jpeg progressive": encode(IMAGE, "JPEG", progressive=True),
    "jpeg 4:4:4": encode(IMAGE, "JPEG", subsampling=0, quality=98),
    "jpeg gray": encode(IMAGE.convert("L"), "JPEG"),
    "jpeg cmyk": encode(IMAGE.convert("CMYK"), "JPEG"),
    "mpo": encode(IMAGE, "MPO", save_all=True, append_images=[TURNED]),
    "png": encode(IMAGE, "PNG"),
    "png 1 bit": encode(IMAGE.convert("1"), "PNG"),
    "png gray": encode(IMAGE.convert("L"), "PNG"),
    "png la": encode(IMAGE.convert("LA"), "PNG"),
    "png palette": encode(PALETTE, "PNG"),
    "png palette alphas": encode(PALETTE, "PNG", transparency=bytes(range(64))),
    "png palette transparent": encode(PALETTE, "PNG", transparency=3),
    "png rgb transparent": encode(IMAGE, "PNG", transparency=(1, 2, 3)),
    "apng": encode(IMAGE, "PNG", save_all=True, append_images=[TURNED]),
    "webp": encode(IMAGE, "WEBP"),
    "webp lossless": encode(IMAGE, "WEBP", lossless=True),
    "webp animated": encode(IMAGE, "WEBP", save_all=True, append_images=[TURNED], lossless=True),
}


def rejected(data, exif="ignore"):
    with pytest.raises(UndecodableError) as caught:
        decode(data, exif)
    return caught.value.reason


# Kinds


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_every_kind_is_what_the_default_loader_sees(kind, exif, tmp_path, capfd):
    path = tmp_path / "photo.bin"  # the content decides, not the name
    path.write_bytes(WHOLE[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = default_loader(WHOLE[kind])
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        image = decode(path, exif)
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(image, decode(str(path), exif))
    np.testing.assert_array_equal(image, decode(WHOLE[kind], exif))
    assert image.dtype == np.uint8
    assert image.shape == (41, 60, 3)
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert not leaked
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["png", "png rgb transparent", "apng", "webp lossless", "webp animated"])
def test_lossless_kinds_and_first_frames_are_exact(kind):
    np.testing.assert_array_equal(decode(WHOLE[kind]), RGB)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "jpeg 4:4:4", "jpeg cmyk", "mpo", "webp"])
def test_lossy_kinds_and_adobe_inverted_cmyk_are_near(kind):
    assert np.abs(decode(WHOLE[kind]).astype(int) - RGB).mean() < 15


def test_16_bit_gray_keeps_the_high_byte():
    image = decode(encode(GRAY16, "PNG"))
    assert default_loader(encode(GRAY16, "PNG")).max() == 255  # Pillow alone clips almost all of it to white
    np.testing.assert_array_equal(image, np.repeat((GRAY16 >> 8).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (6, 4), (4, 2)], ids=["rgb", "rgba", "la"])
def test_16_bit_colour_keeps_the_high_byte(color_type, channels):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, color_type, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    high = (values >> 8).astype(np.uint8)
    expected = high[..., :3] if channels > 2 else np.repeat(high[..., :1], 3, -1)
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_dropped_not_blended(kind):
    rgba = np.dstack([RGB, np.random.default_rng(1).integers(0, 256, RGB.shape[:2], dtype=np.uint8)])
    options = {} if kind == "PNG" else {"lossless": True, "exact": True}
    np.testing.assert_array_equal(decode(encode(rgba, kind, **options)), RGB)


# EXIF


def with_orientation(kind, value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(IMAGE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(10))
def test_orientation_is_ignored_or_applied(kind, value):
    data = with_orientation(kind, value)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(data, "ignore"), default_loader(data))
    np.testing.assert_array_equal(decode(data, "apply"), upright)
    assert decode(data, "apply").shape == ((60, 41, 3) if value in (5, 6, 7, 8) else (41, 60, 3))


def test_orientation_of_xmp_is_applied():
    data = encode(IMAGE, "WEBP", lossless=True, xmp=b'<x tiff:Orientation="6"/>')
    np.testing.assert_array_equal(decode(data, "apply"), np.rot90(RGB, -1))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(6, 25), st.integers(0, 255)), max_size=3))
def test_odd_exif_never_costs_the_photo(changes):
    data = bytearray(with_orientation("JPEG", 6))
    start = data.index(b"Exif\0\0")
    for position, value in changes:
        data[start + position] = value
    image = decode(bytes(data), "apply")
    assert sorted(image.shape) == [3, 41, 60]


def test_exif_is_one_of_two_words():
    with pytest.raises(ValueError, match="'rotate'"):
        decode(WHOLE["png"], "rotate")


# Damage


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
def test_truncated_files_are_rejected(kind, share, tmp_path):
    size = len(WHOLE[kind]) // 2 if kind == "mpo" else len(WHOLE[kind])  # of an MPO only the first picture counts
    path = tmp_path / "cut.jpg"
    path.write_bytes(WHOLE[kind][: int(size * share)])
    with pytest.raises(InputError, match=r"cut\.jpg: truncated; repair or remove"):
        decode(path)


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "mpo"])
@pytest.mark.parametrize("missing", [1, 2, 3, 9, 13, 20])
def test_a_missing_end_is_noticed(kind, missing):
    assert rejected(WHOLE[kind][:-missing]) == "truncated"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
def test_no_cut_gives_other_pixels(kind, share):
    cut = WHOLE[kind][: int(len(WHOLE[kind]) * share)]
    if kind == "mpo" and len(cut) > len(WHOLE[kind]) * 0.49:
        with contextlib.suppress(UndecodableError):
            np.testing.assert_array_equal(decode(cut), decode(WHOLE[kind]))
    else:
        reason = rejected(cut)
        assert reason.startswith(("empty", "not a JPEG", "truncated", "damaged"))
        assert "0x" not in reason  # reasons are the same in every run


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_damage_gives_an_image_or_the_one_error(kind, changes):
    data = bytearray(WHOLE[kind])
    for share, value in changes:
        data[int(share * len(data) * (0.2 if value % 2 else 1))] = value  # half of it in the headers
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, contextlib.suppress(UndecodableError):
        warnings.simplefilter("error")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # else a damaged size may ask for a gigabyte
        assert decode(bytes(data), "apply").dtype == np.uint8


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBP"]))
def test_arbitrary_bytes_are_rejected(data, start):
    assert rejected(start + data)


def test_every_bit_of_a_png_counts():
    data = WHOLE["png"]
    for position in np.random.default_rng(0).integers(8, len(data), 60):
        flipped = bytearray(data)
        flipped[position] ^= 4
        with contextlib.suppress(UndecodableError):
            np.testing.assert_array_equal(decode(bytes(flipped)), RGB)


def test_trailing_bytes_do_no_harm():
    for kind, data in WHOLE.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(decode(data + bytes(40)), default_loader(data), kind)


def test_jpeg_padded_with_zeros_is_truncated():
    for options in ({}, {"progressive": True}):
        data = encode(photo(200, 300), "JPEG", **options)
        half = len(data) // 2  # as a download leaves it that had reserved its space
        assert rejected(data[:half] + bytes(len(data) - half)) == "truncated"


def test_what_is_no_photo_is_rejected(tmp_path):
    cases = {
        "text.jpg": (b"<html>404 Not Found</html>", "not a JPEG, PNG or WebP image"),
        "gif.jpg": (encode(IMAGE, "GIF"), "not a JPEG, PNG or WebP image"),
        "tiff.png": (encode(IMAGE, "TIFF"), "not a JPEG, PNG or WebP image"),
        "wave.webp": (b"RIFF\x24\0\0\0WAVEfmt ", "not a JPEG, PNG or WebP image"),
        "empty.jpg": (b"", "empty file"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UndecodableError, match=name) as caught:
            decode(tmp_path / name)
        assert caught.value.reason == reason
        assert rejected(content) == reason


def test_unreadable_files_are_rejected(tmp_path, monkeypatch):
    assert rejected(tmp_path / "missing.jpg") == "no such file"
    assert rejected(tmp_path) == "cannot be read (Is a directory)"
    assert rejected("nul\0.jpg").startswith("cannot be read")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open", refuse, raising=False)  # root reads everything
    assert rejected(tmp_path / "secret.jpg") == "no permission to read it"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_too_many_pixels(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 41 * 60 // 2 + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(WHOLE[kind]).shape == (41, 60, 3)  # between the limit and its double Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 41 * 60 // 2 - 1)
    assert rejected(WHOLE[kind]) == f"too many pixels (more than {2 * (41 * 60 // 2 - 1)})"


def test_exploding_text_is_damage():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 3_000_000, zip=True)
    assert rejected(encode(IMAGE, "PNG", pnginfo=info)).startswith("damaged (")


def test_lack_of_memory_is_not_the_photos_fault(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(WHOLE["png"])


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(UndecodableError("truncated", "a.jpg")))
    assert (str(error), error.reason) == ("a.jpg: truncated; repair or remove the file.", "truncated")
    assert type(error)("as torch's loader raises it again").args == ("as torch's loader raises it again",)


# Resizing


@pytest.fixture(scope="module")
def transforms():
    return pytest.importorskip("torchvision.transforms", reason="torchvision is the reference")


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_reduced_decoding_is_a_smaller_photo_or_the_whole(reduce, exif):
    smooth = np.array(Image.fromarray(photo(6, 8)).resize((187, 130), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    found = decode(buffer.getvalue(), exif, reduce)
    assert found.shape == (-(-130 // reduce), -(-187 // reduce), 3)
    expected = np.array(Image.fromarray(smooth).resize(found.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(found - expected).mean() < 4
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "PNG")
    np.testing.assert_array_equal(decode(buffer.getvalue(), exif, reduce), smooth)


def assert_near(found, expected):
    """Torch rounds some bytes the other way than Pillow, in each of two passes."""
    assert np.abs(found.astype(int) - expected).max() <= 2


SIZES = [(41, 60), (60, 41), (50, 50), (33, 200), (1, 7), (7, 1), (64, 97), (65, 96)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 24, 33, 50, 77])
def test_short_side_is_near_torchvision(transforms, size, side):
    image = photo(*size)
    expected = np.array(transforms.Resize(side)(Image.fromarray(image)))
    assert_near(short_side(image, side), expected)


@pytest.mark.parametrize("size", [(41, 60), (60, 41), (50, 50), (64, 97), (65, 96), (33, 33), (34, 35)])
@pytest.mark.parametrize("side", [1, 24, 32, 33])
def test_center_crop_equals_torchvision(transforms, size, side):
    image = photo(*size)
    expected = np.array(transforms.CenterCrop(side)(Image.fromarray(image)))
    np.testing.assert_array_equal(center_crop(image, side), expected)


def test_center_crop_does_not_pad():
    with pytest.raises(ValueError, match="60 x 41 pixels is too small for a centre crop of 42"):
        center_crop(RGB, 42)


@settings(deadline=None)
@given(st.data())
def test_resize_crop_is_near_torchvision(transforms, data):
    height, width = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    x, y = data.draw(st.tuples(st.integers(0, width - 1), st.integers(0, height - 1)))
    w, h = data.draw(st.tuples(st.integers(1, width - x), st.integers(1, height - y)))
    size = data.draw(st.tuples(st.integers(1, 64), st.integers(1, 64)))
    image = photo(height, width)
    expected = transforms.functional.resized_crop(Image.fromarray(image), y, x, h, w, size[::-1])
    result = resize_crop(image, (x, y, w, h), size)
    assert_near(result, np.array(expected))
    assert result.shape == (size[1], size[0], 3)
    assert result.flags.writeable


def test_resize_crop_takes_numpy_boxes_and_views(transforms):
    box = np.array([3, 4, 20, 30], dtype=np.int16)
    np.testing.assert_array_equal(resize_crop(RGB, box, (9, 8)), resize_crop(RGB.copy(), (3, 4, 20, 30), (9, 8)))
    flipped = RGB[:, ::-1]
    np.testing.assert_array_equal(resize_crop(flipped, box, (9, 8)), resize_crop(flipped.copy(), box, (9, 8)))


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 61, 5), (0, 40, 5, 2), (60, 0, 1, 1), (0, 0, 5, -1)]
)
def test_resize_crop_refuses_boxes_outside(box):
    with pytest.raises(ValueError, match="must lie inside the image"):
        resize_crop(RGB, box, (8, 8))


# Real photos


@pytest.mark.skipif(not COCO.is_dir(), reason=f"real photos are not at {COCO}")
def test_real_photos_decode_as_torchvision_and_resize_near_it(transforms):
    paths = sorted((COCO / "val2017").glob("*.jpg"))[:12]
    pipeline = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for path in paths:
        reference = Image.open(path).convert("RGB")
        image = decode(path)
        np.testing.assert_array_equal(image, np.array(reference))
        found, expected = center_crop(short_side(image, 256), 224), np.array(pipeline(reference))
        assert_near(found, expected)
        assert np.mean(found != expected) < 0.1
        with pytest.raises(UndecodableError, match="truncated"):
            decode(path.read_bytes()[: path.stat().st_size // 2])
