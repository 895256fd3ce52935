from pathlib import Path

import numpy as np
import pytest

from orl import InputError, artifacts
from orl.data import voc
from orl.downstream.proposals import objects_of

VOC_MINI = Path(__file__).parents[2].parent / "shared" / "data" / "voc-mini" / "VOCdevkit" / "VOC2007"


def thing(name="cat", box=(1, 1, 10, 20), more=""):
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(voc.SIDES, box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def write(folder, stem, *objects, size=(100, 80)):
    folder.mkdir(exist_ok=True)
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<annotation><filename>{stem}.jpg</filename>{sides}{''.join(objects)}</annotation>"
    (folder / f"{stem}.xml").write_text(text)


@pytest.fixture
def folder(tmp_path):
    """Two photos with objects and one without; a part has a box of its own, and a difficult object stays."""
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    write(tmp_path / "xml", "b.1", thing("dog", (45.5, 70, 100, 80)), thing("cat", more="<difficult>1</difficult>"))
    write(tmp_path / "xml", "a", thing("person", (3, 4, 3, 4), part), size=(50, 60))
    write(tmp_path / "xml", "c")
    (tmp_path / "xml" / "notes.txt").write_text("no annotation")
    return tmp_path / "xml"


def manifest(*rows):
    names, width, height = zip(*rows, strict=True)
    text, numbers = np.array(names), [np.array(values, np.int64) for values in (width, height, width)]
    return artifacts.Manifest(text, np.array([f"x/{name}.jpg" for name in names]), *numbers, text)


def test_boxes_count_from_0_and_classes_by_name(folder):
    found = voc.read_objects(folder)
    assert found.name == ["a.xml", "b.1.xml", "c.xml"]
    assert found.size.tolist() == [[50, 60], [100, 80], [100, 80]]
    assert found.photo.tolist() == [0, 1, 1]
    assert found.box.tolist() == [[2, 3, 1, 1], [44.5, 69, 55.5, 11], [0, 0, 10, 20]]
    assert found.classes == ("cat", "dog", "person")
    assert found.category.tolist() == [2, 1, 0]
    assert not found.crowd.any()


def test_they_are_those_of_the_photos_of_a_manifest(folder):
    """The stem names the photo, dots and all; one of another size is left out."""
    row, box, category, left_out = objects_of(manifest(("other", 9, 9), ("b.1", 100, 80), ("a", 50, 61)), [folder])
    assert row.tolist() == [1, 1]
    assert box.tolist() == [[44.5, 69, 55.5, 11], [0, 0, 10, 20]]
    assert category.tolist() == [1, 0]
    assert left_out == {"crowds": 0, "without_area": 0, "photos_of_other_size": 1}


def test_several_folders_must_number_the_same_classes(folder, tmp_path):
    write(tmp_path / "more", "d", *(thing(name) for name in ("person", "dog", "cat")))
    photos = manifest(("a", 50, 60), ("d", 100, 80))
    assert objects_of(photos, [folder, tmp_path / "more"])[2].tolist() == [2, 2, 1, 0]
    write(tmp_path / "more", "e", thing("bird"))
    with pytest.raises(InputError, match=r"more: its classes are not those of .*xml"):
        objects_of(photos, [folder, tmp_path / "more"])


def test_real_annotations():
    if not VOC_MINI.is_dir():
        pytest.skip(f"{VOC_MINI} is not there")
    found = voc.read_objects(VOC_MINI / "Annotations")
    assert len(found.name) == 500
    assert set(found.classes) > {"person", "cat", "chair"}
    last = found.box[:, :2] + found.box[:, 2:]
    assert (found.box[:, :2] >= 0).all()
    assert (found.box[:, 2:] > 0).all()
    assert (last <= found.size[found.photo]).all()


def test_the_fingerprint_is_of_names_and_bytes(folder):
    first = artifacts.fingerprint(folder)
    (folder / "deeper").mkdir()
    assert artifacts.fingerprint(folder) == first
    write(folder, "c", thing())
    second = artifacts.fingerprint(folder)
    (folder / "c.xml").rename(folder / "d.xml")
    assert len({first, second, artifacts.fingerprint(folder)}) == 3


BOMB = '<!DOCTYPE a [<!ENTITY e0 "ha">{}]><annotation><object><name>&e30;</name></object></annotation>'.format(
    "".join(f'<!ENTITY e{i} "&e{i - 1};&e{i - 1};">' for i in range(1, 31))
)
OUTSIDE = (
    '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation><size><width>&e;</width></size></annotation>'
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "one.xml: is no XML"),
        ("<annotation><object>", "one.xml: is no XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "one.xml: is no XML"),
        (BOMB, "one.xml: is no XML .*amplification"),
        (OUTSIDE, "one.xml: is no XML .*undefined entity"),
        (f"<annotation>{' ' * voc.MOST}</annotation>", "one.xml: is larger than"),
        ("<html/>", "no VOC annotation .it has <html> where <annotation>"),
        ("<annotation><object><name>cat</name></object></annotation>", "an <object> without <bndbox/xmin>"),
        (f"<annotation>{thing(box=(1, 2, 'x', 4))}</annotation>", "no number in <bndbox/xmax>"),
        (f"<annotation>{thing(box=(1, 2, 'nan', 4))}</annotation>", "no number in <bndbox/xmax>"),
        (f"<annotation>{thing(box=(1, 2, 3, 'inf'))}</annotation>", "no number in <bndbox/ymax>"),
        (f"<annotation>{thing(box=(1, 2, 3, '1e300'))}</annotation>", "no number in <bndbox/ymax>"),
        ("<annotation><size><width>1e300</width></size></annotation>", "no number in <size/width>"),
        (f"<annotation>{thing(name=' ')}</annotation>", "an object without name"),
        ("<annotation><size><width>wide</width></size></annotation>", "no number in <size/width>"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, sentence):
    (tmp_path / "one.xml").write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        voc.read_objects(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no XML file"):
        voc.read_objects(tmp_path)
