"""Decoding and resizing photos: the only place that decodes an image.

What a photo looks like is what torchvision's default loader makes of it, `Image.open(path).convert("RGB")`, except
for 16-bit grayscale, which that clips to white, and for damage that it lets pass. Ordinary JPEGs take a shorter way
to the same pixels (benchmarks/README.md).
"""

import io
import os
import warnings
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from orl import InputError

Photo = NDArray[np.uint8]
Exif = Literal["ignore", "apply"]

PNG_END = b"IEND\xaeB`\x82"
ORIENTATION = 0x0112  # EXIF tag
# ImageOps.exif_transpose turns alike, but also writes the EXIF block anew and fails where another tag is odd.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableError(InputError):
    """A file that is missing, cannot be read or holds no whole photo; `reason` says why in a few words."""

    def __init__(self, reason: str, path: str | os.PathLike | None = None) -> None:
        super().__init__(reason if path is None else f"{os.fspath(path)}: {reason}; repair or remove the file.")
        self.reason = reason


def decode(path_or_bytes: str | os.PathLike | bytes, exif: Exif = "ignore", reduce: int = 1) -> Photo:
    """Decode a JPEG (MPO too), PNG or WebP, given as a path or as the file's bytes, to uint8 [H, W, 3], RGB.

    - Grayscale is repeated; 16 bits become 8 by dropping the lower byte, in grayscale and in colour.
    - Palettes are looked up. Transparency of any kind is dropped: what lies under it shows.
    - CMYK goes by Pillow's plain formula, no colour profile; JPEGs are taken as inverted, as Adobe's are.
    - Of an animation or a multi-picture file, the first picture.
    - `exif="apply"` turns the photo as its EXIF (or XMP) orientation says; unreadable EXIF says nothing.
    - `reduce` 2, 4 or 8: an ordinary JPEG at that fraction of its size, rounded up, for less time; others whole.

    Raises UndecodableError: missing, unreadable, empty, another format, truncated, damaged, or more than twice
    Image.MAX_IMAGE_PIXELS. A JPEG or WebP has no checksum: damage inside that still parses is not noticed, nor is
    a truncated JPEG to which some tool has put an end marker.
    """
    if exif not in ("ignore", "apply"):
        raise ValueError(f"exif must be 'ignore' or 'apply', not {exif!r}")
    if isinstance(path_or_bytes, bytes):
        return _decode(path_or_bytes, exif, reduce)
    try:
        return _decode(_read(path_or_bytes), exif, reduce)
    except UndecodableError as error:
        raise UndecodableError(error.reason, path_or_bytes) from None


def _format(data: bytes) -> str | None:
    """Pillow's name of the format, by the first 12 bytes."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _read(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(12)
            # Nothing else is read to its end: it may be a film of many gigabytes.
            return head + file.read() if _format(head) else head
    except FileNotFoundError:
        raise UndecodableError("no such file") from None
    except PermissionError:
        raise UndecodableError("no permission to read it") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UndecodableError(f"cannot be read ({reason})") from None


def _decode(data: bytes, exif: Exif, reduce: int) -> Photo:
    if not data:
        raise UndecodableError("empty file")
    kind = _format(data)
    if kind is None:
        raise UndecodableError("not a JPEG, PNG or WebP image")
    if _is_cut(data, kind):
        raise UndecodableError("truncated")
    try:
        # Metadata, transparency and sizes that Pillow only warns about do not matter here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            photo = _ordinary_jpeg(data, reduce) if kind == "JPEG" else None
            if photo is not None and exif == "ignore":
                return photo
            image = Image.open(io.BytesIO(data), formats=(kind,))
            if photo is None:
                image.load()
            if kind == "PNG":  # loading does not look at checksums
                Image.open(io.BytesIO(data), formats=(kind,)).verify()
            turn = TURNS.get(_orientation(image)) if exif == "apply" else None
            rgb = as_rgb(image) if photo is None else Image.fromarray(photo)
            return np.array(rgb if turn is None else rgb.transpose(turn))  # a copy: np.asarray's is read-only
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UndecodableError(f"too many pixels (more than {limit})") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow lets nearly every exception through
        raise UndecodableError(_reason(error)) from None


def _ordinary_jpeg(data: bytes, reduce: int) -> Photo | None:
    """The pixels of a JPEG straight from libjpeg-turbo; None where Pillow must judge: odd colours, size or damage."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        return simplejpeg.decode_jpeg(
            data, min_height=-(-height // reduce), min_width=-(-width // reduce), min_factor=reduce
        )
    except ValueError:
        return None


def _is_cut(data: bytes, kind: str) -> bool:
    """Whether the end is missing where that shows without decoding; Pillow loads a PNG without its last bytes."""
    if kind == "PNG":
        return data.rfind(PNG_END) < 0
    return kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # as above; viewers show such a photo unturned
        return 1
    return orientation if isinstance(orientation, int) else 1


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, as `decode` makes it."""
    if image.mode.startswith("I"):  # 16 bits in I;16 (older Pillow: I), of which convert() would clip all above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy


def _reason(error: Exception) -> str:
    detail = " ".join(str(error).split())
    if "truncated" in detail.lower():
        return "truncated"
    if isinstance(error, UnidentifiedImageError):  # its message names an address in memory
        return "damaged (header)"
    return f"damaged ({detail or type(error).__name__})"


def resize_crop(image: Photo, box: tuple[int, int, int, int], size: tuple[int, int]) -> Photo:
    """Cut `box` (x, y, w, h, whole pixels) out of uint8 [H, W, 3] and resize it to `size` (width, height).

    The filter (antialiased bilinear) sees nothing outside the box, as torchvision's `resized_crop`; at most 2 of 255
    from what that makes of PIL images. Returns uint8 [height, width, 3]. Raises ValueError for a box that is empty or
    not inside the image.
    """
    x, y, w, h = (int(value) for value in box)
    if not (0 <= x < x + w <= image.shape[1] and 0 <= y < y + h <= image.shape[0]):
        raise ValueError(f"box {(x, y, w, h)} (x, y, w, h) must lie inside the image {image.shape[1::-1]} (w, h)")
    return _resize(image[y : y + h, x : x + w], size)


def short_side(image: Photo, side: int) -> Photo:
    """Resize uint8 [H, W, 3] so that its shorter side is `side` pixels and the longer int(side · long / short).

    As torchvision's `Resize(side)` of PIL images (bilinear, antialiased), at most 2 of 255 from it.
    """
    height, width = image.shape[:2]
    if width <= height:
        return _resize(image, (side, int(side * height / width)))
    return _resize(image, (int(side * width / height), side))


def center_crop(image: Photo, side: int) -> Photo:
    """The square of `side` pixels in the middle of uint8 [H, W, 3], placed as torchvision's `CenterCrop` does.

    Raises ValueError for an image smaller than that (torchvision would pad it with black).
    """
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise ValueError(f"an image of {width} x {height} pixels is too small for a centre crop of {side}")
    top, left = round((height - side) / 2), round((width - side) / 2)  # Python's rounding: halves to even
    return image[top : top + side, left : left + side].copy()


def _resize(image: Photo, size: tuple[int, int]) -> Photo:
    """Torch's antialiased bilinear filter on bytes: faster than Pillow's, and at most 2 (of 255) from it."""
    import torch  # here: most commands decode but never resize, and torch takes seconds to load

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, size[::-1], mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
