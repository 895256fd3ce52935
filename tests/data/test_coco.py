import json

import numpy as np
import pytest

from orl import InputError
from orl.data.coco import read_objects


def read(tmp_path, *annotations):
    path = tmp_path / "instances.json"
    images = [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}, {"id": 3, "file_name": "b.jpg"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return read_objects(path)


def test_objects_are_read_as_they_stand_in_the_file(tmp_path):
    found = read(
        tmp_path,
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2.5, 3, 4], "iscrowd": 0, "area": 12},
        {"id": 2, "image_id": 7, "category_id": 0, "bbox": [0, 0, 9, 9], "iscrowd": 1, "segmentation": {"counts": [1]}},
    )
    assert (found.name, found.size.tolist()) == (["a.jpg", "b.jpg"], [[40, 30], [0, 0]])
    assert (found.photo.tolist(), found.crowd.tolist()) == ([1, 0], [False, True])
    assert found.box.tolist() == [[1, 2.5, 3, 4], [0, 0, 9, 9]]
    assert (found.category.tolist(), found.category.dtype) == ([90, 0], np.int64)


@pytest.mark.parametrize("category", [None, "cat", "3", 3.0, True, -2, 2**63, [1], {"id": 1}])
def test_a_category_that_is_no_number_is_as_a_missing_one(tmp_path, category):
    one = {"image_id": 7, "bbox": [0, 0, 9, 9]}
    found = read(tmp_path, {**one, "category_id": category}, one, {**one, "category_id": 2**63 - 1})
    assert found.category.tolist() == [-1, -1, 2**63 - 1]


def test_numbers_without_bounds(tmp_path):
    """A size is then not given; a box is none."""
    path = tmp_path / "instances.json"
    image = {"id": 7, "file_name": "a.jpg", "width": 10**30, "height": 30}
    path.write_text(json.dumps({"images": [image]}))
    assert read_objects(path).size.tolist() == [[0, 0]]
    with pytest.raises(InputError, match="has a bbox that is not x, y, w, h"):
        read(tmp_path, {"image_id": 7, "bbox": [0, 0, 10**400, 9]})


def test_a_file_that_only_lists_photos_has_no_object(tmp_path):
    found = read(tmp_path)
    assert [len(part) for part in (found.name, found.photo, found.box, found.crowd, found.category)] == [2, 0, 0, 0, 0]
