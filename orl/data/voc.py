"""Objects of a folder of VOC XML files."""

import os
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

import numpy as np

from orl import InputError
from orl.data.coco import Objects

# Files may be anybody's. Expat (2.4.1 on) refuses entities that grow a hundredfold and reads none from elsewhere (both
# tested); a limit of the file's size bounds the rest. VOC's own files have a few kB.
MOST = 4_000_000  # bytes of a file
SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_objects(folder: str | os.PathLike) -> Objects:
    """The boxes of the XML files in a folder, VOC's Annotations; each file's stem names its photo.

    VOC counts pixels from 1 and its boxes hold their last one: xmin 1, xmax 10 becomes x 0, w 10. Objects marked
    `difficult` stay, as in LOST's evaluation; there are no crowds. Categories are numbered by the sorted names of the
    classes (`classes`). Raises InputError: no such file, a broken one, or an object without name or whole bndbox.
    """
    paths = sorted(Path(folder).glob("*.xml"))
    if not paths:
        raise InputError(f"{folder}: has no XML file; name a folder of VOC annotations (Annotations).")
    sizes, photos, boxes, names = [], [], [], []
    for number, path in enumerate(paths):
        root = _root(path)
        sizes.append([int(_number(path, root, f"size/{side}", "0")) for side in ("width", "height")])
        for one in root.findall("object"):
            left, top, right, bottom = (_number(path, one, f"bndbox/{side}") for side in SIDES)
            photos.append(number)
            boxes.append((left - 1, top - 1, right - left + 1, bottom - top + 1))
            names.append((one.findtext("name") or "").strip() or _refuse(path, "an object without name"))
    classes, category = np.unique(np.array(names, str), return_inverse=True)
    return Objects(
        [path.name for path in paths],
        np.array(sizes, np.int64),
        np.array(photos, np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.zeros(len(boxes), bool),
        category.astype(np.int64),
        tuple(classes.tolist()),
    )


def _root(path: Path) -> ElementTree.Element:
    try:
        if path.stat().st_size > MOST:
            raise InputError(f"{path}: is larger than {MOST} bytes; name a folder of VOC annotations.")
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct its permissions.") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the others: an encoding nobody knows
        raise InputError(f"{path}: is no XML ({error}); correct the file.") from None
    if root.tag != "annotation":
        _refuse(path, f"<{root.tag}> where <annotation> is needed")
    return root


def _number(path: Path, element: ElementTree.Element, name: str, default: str = "") -> float:
    text = element.findtext(name, default)
    try:
        value = float(text)
        if not abs(value) < 2**31:  # nor is nan
            raise ValueError
        return value
    except ValueError:
        _refuse(path, f"no number in <{name}>" if text else f"an <{element.tag}> without <{name}>")


def _refuse(path: Path, what: str) -> NoReturn:
    raise InputError(f"{path}: is no VOC annotation (it has {what}); correct the file.")
