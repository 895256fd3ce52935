import csv
import json
import os
import stat

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orl import InputError, artifacts

RNG = np.random.default_rng(0)
INDEX, SIMILARITY = np.array([[1, 2], [0, 2], [1, 0]], np.int32), RNG.random((3, 2)).astype(np.float32)
# Reader, schema, datasets.
KINDS = {
    "embeddings": (artifacts.read_embeddings, artifacts.EMBEDDINGS, {"embedding": SIMILARITY}),
    "neighbors": (artifacts.read_neighbors, artifacts.NEIGHBORS, {"index": INDEX, "similarity": SIMILARITY}),
    "proposals": (
        artifacts.read_proposals,
        artifacts.PROPOSALS,
        {"box": RNG.integers(0, 99, (5, 4)).astype(np.int16), "box_offsets": np.array([0, 1, 3, 5])},
    ),
    "rois": (artifacts.read_rois, artifacts.ROIS, {"feature": RNG.random((5, 8)).astype(np.float16)}),
    "correspondences": (
        artifacts.read_correspondences,
        artifacts.CORRESPONDENCES,
        {
            "neighbor": INDEX,
            "pair": np.array([[0, 1]] * 6, np.uint16),
            "similarity": RNG.random(6).astype(np.float16),
            "pair_offsets": np.arange(7),
        },
    ),
}
SETTINGS, INPUTS = {"version": 1, "k": 2}, {"manifest": "abc"}


def write(path, kind, settings=SETTINGS, inputs=INPUTS, **change):
    _, schema, datasets = KINDS[kind]
    with artifacts.create(path, schema, settings, inputs) as file:
        for name, value in {**datasets, **change}.items():
            if value is not None:
                file[name] = value
    return path


def refusal(path, read):
    """The one sentence with which a reader refuses a file."""
    with pytest.raises(InputError) as caught:
        read(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# Writing


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_new_file_has_the_modes_that_the_umask_gives(tmp_path, umask, mode):
    path = tmp_path / "new" / "a.txt"
    previous = os.umask(umask)
    try:
        with artifacts.atomic(path) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == mode  # from the first byte on
            temporary.write_text("é\n", encoding="utf-8")
        artifacts.write_weights(tmp_path / "new" / "a.safetensors", {"a": torch.ones(2)}, {})
        write(tmp_path / "new" / "a.h5", "rois")
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {mode}
    for one in ("a.safetensors", "a.h5"):
        (path.parent / one).unlink()
    assert path.read_bytes() == "é\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half():
        with artifacts.atomic(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def failing_writes(path):
    def hdf5():
        with artifacts.create(path, "orl.x/1", {}, {}) as file:
            file["a"] = [1]
            raise OSError("disk full")

    yield pytest.raises(OSError, match="full"), hdf5
    yield pytest.raises(ValueError, match="JSON"), lambda: artifacts.write_json(path, {"mAP": float("nan")})
    yield pytest.raises(csv.Error), lambda: artifacts.write_csv(path, ("a",), [("1",), None])
    yield pytest.raises(TypeError), lambda: artifacts.write_weights(path, {"a": torch.ones(1)}, {"a": {1}})


def test_no_writer_leaves_half_a_file(tmp_path):
    for raises, write_half in failing_writes(tmp_path / "a.h5"):
        with raises:
            write_half()
        assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_file(tmp_path, kind, monkeypatch):
    path = write(tmp_path / "a.h5", kind)
    old = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, kind, settings={"other": 1})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_equal_runs_make_equal_files(tmp_path, kind):
    first = write(tmp_path / "a.h5", kind).read_bytes()
    backwards = dict(reversed(SETTINGS.items()))
    assert write(tmp_path / "elsewhere" / "b.h5", kind, settings=backwards).read_bytes() == first


def test_equal_weights_make_equal_files(tmp_path):
    for name in ("a", "b"):
        weights = {"w": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(3)}  # T: not contiguous
        artifacts.write_weights(tmp_path / f"{name}.safetensors", weights, artifacts.stamp(artifacts.MODEL, {}, {}))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_fingerprint_is_of_schema_settings_and_inputs(tmp_path, kind):
    schema = KINDS[kind][1]
    stamp = artifacts.stamp(schema, SETTINGS, INPUTS)
    path = write(tmp_path / "a.h5", kind)
    assert artifacts.attributes(path) == stamp
    assert artifacts.fingerprint(path) == stamp["fingerprint"]
    assert json.loads(stamp["settings"]) == SETTINGS
    assert json.loads(stamp["inputs"]) == INPUTS
    others = [
        artifacts.stamp("orl.x/1", SETTINGS, INPUTS),
        artifacts.stamp(schema, {**SETTINGS, "k": 3}, INPUTS),
        artifacts.stamp(schema, SETTINGS, {"manifest": "abd"}),
    ]
    assert len({stamp["fingerprint"], *(other["fingerprint"] for other in others)}) == 4


def test_the_fingerprint_of_other_files_is_of_their_bytes(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_bytes(b"abc")
    assert artifacts.fingerprint(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    refusal(tmp_path / "missing.csv", artifacts.fingerprint)


# Reading HDF5


def test_round_trip_through_a_memory_map(tmp_path, kind):
    read, _, datasets = KINDS[kind]
    found = read(write(tmp_path / "a.h5", kind))
    for name, expected in datasets.items():
        array = getattr(found, name)
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)


def test_empty_datasets(tmp_path, kind):
    read, _, datasets = KINDS[kind]
    empty = {name: value[: int(name.endswith("offsets"))] for name, value in datasets.items()}
    found = read(write(tmp_path / "a.h5", kind, **empty))
    for name, expected in empty.items():
        assert (getattr(found, name).dtype, getattr(found, name).shape) == (expected.dtype, expected.shape)


def test_missing_files(tmp_path, kind):
    assert "no such file" in refusal(tmp_path / "missing.h5", KINDS[kind][0])
    assert "no such file" in refusal(tmp_path / "missing.h5", artifacts.attributes)
    refusal(tmp_path, KINDS[kind][0])  # a folder


@pytest.mark.parametrize("share", [0, 0.002, 0.01, 0.1, 0.3, 0.6, 0.9, 1])
def test_truncated_files(tmp_path, kind, share):
    path = write(tmp_path / "a.h5", kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(share * len(whole)), len(whole) - 1)])
    refusal(path, KINDS[kind][0])
    refusal(path, artifacts.attributes)
    refusal(path, artifacts.fingerprint)


@pytest.mark.parametrize("schema", ["orl.{}/0", "orl.{}/2", "orl.other/1"])
def test_other_schemas(tmp_path, kind, schema):
    path = tmp_path / "a.h5"
    with artifacts.create(path, schema.format(kind), {}, {}) as file:
        file.update(KINDS[kind][2])
    assert repr(KINDS[kind][1]) in refusal(path, KINDS[kind][0])


def test_files_of_others(tmp_path, kind):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.update(KINDS[kind][2])
    assert "no schema" in refusal(path, KINDS[kind][0])
    path.write_text("image_id,path\n")
    refusal(path, KINDS[kind][0])


def test_datasets_that_are_missing_or_not_as_written(tmp_path, kind):
    read, _, datasets = KINDS[kind]
    for name, value in datasets.items():
        assert name in refusal(write(tmp_path / "missing.h5", kind, **{name: None}), read)
        for odd in ("chunked", "group"):
            path = write(tmp_path / f"{odd}.h5", kind, **{name: None})
            with h5py.File(path, "r+") as file:
                if odd == "group":
                    file.create_group(name)
                else:
                    file.create_dataset(name, data=value, chunks=value.shape, compression="gzip")
            refusal(path, read)


@pytest.mark.parametrize("form", ["external link", "soft link", "virtual", "external storage", "pointers", "records"])
def test_no_file_leads_to_another_or_holds_anything_but_numbers(tmp_path, kind, form):
    """What is in other files is not read, whoever may have written the one that names them."""
    read, _, datasets = KINDS[kind]
    secret, path = tmp_path / "secret.h5", tmp_path / "a.h5"
    with h5py.File(secret, "w") as file:
        file.update(datasets)
    name, value = next(iter(datasets.items()))
    write(path, kind, **{name: None})
    with h5py.File(path, "r+") as file:
        if form == "external link":
            file[name] = h5py.ExternalLink(secret, name)
        elif form == "soft link":
            file["real"], file[name] = value, h5py.SoftLink("/real")
        elif form == "virtual":
            layout = h5py.VirtualLayout(value.shape, value.dtype)
            layout[:] = h5py.VirtualSource(secret, name, value.shape)
            file.create_virtual_dataset(name, layout)
        elif form == "external storage":
            file.create_dataset(name, value.shape, value.dtype, external=[(secret, 0, h5py.h5f.UNLIMITED)])
        elif form == "pointers":
            file.create_dataset(name, value.shape, h5py.string_dtype())
        else:
            file.create_dataset(name, value.shape, [("a", "i4"), ("b", "S4")])
    assert name in refusal(path, read)


# Checks between files


def test_check_rows():
    artifacts.check_rows("a.h5", 3, 3, "manifest.csv")
    with pytest.raises(InputError, match=r"^a.h5: has 2 rows, but manifest.csv has 3; .*\.$"):
        artifacts.check_rows("a.h5", 2, 3, "manifest.csv")


def test_check_input(tmp_path):
    path = write(tmp_path / "a.h5", "rois", inputs={"proposals": "abc"})
    artifacts.check_input(path, "proposals", "abc")
    for name, needed in (("proposals", "abd"), ("manifest", "abc")):
        with pytest.raises(InputError, match=f"a.h5: was made from another {name} than the one given"):
            artifacts.check_input(path, name, needed)


# Manifest

HEADER = ",".join(artifacts.MANIFEST_COLUMNS) + "\n"


def test_manifest_round_trip(tmp_path):
    rows = [
        ("000000000139", "train/000000000139.jpg", 640, 426, 161811, "train2017"),
        ("007", 'a, "b"\nc.jpg', 5, 6, 7, ""),
        ("é", "é.jpg", 70000, 1, 2**40, "x"),
    ]
    path = tmp_path / "manifest.csv"
    artifacts.write_csv(path, artifacts.MANIFEST_COLUMNS, rows)
    found = artifacts.read_manifest(path)
    assert len(found) == 3
    assert found.image_id.tolist() == ["000000000139", "007", "é"]
    columns = [getattr(found, name).tolist() for name in artifacts.MANIFEST_COLUMNS]
    assert list(zip(*columns, strict=True)) == rows
    assert found.width.dtype == found.height.dtype == found.bytes.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "its columns are []"),
        ("image_id,path\n1,a.jpg\n", "its columns are"),
        (HEADER, "lists 0 photos"),
        (HEADER + "1,a.jpg,4,4,4,x\n", "lists 1 photos"),
        (HEADER + "1,a.jpg,4,4,4,x\n2,b.jpg,4,4\n", "damaged"),  # a row cut short
        (HEADER + "1,a.jpg,4,4,4,x\n2,b.jpg,4,4,4,x,y\n", "damaged"),
        (HEADER + "1,a.jpg,4,4,4,x\n2,b.jpg,4.5,4,4,x\n", "damaged"),
        (HEADER + "1,a.jpg,4,4,4,x\n2,b.jpg,,4,4,x\n", "damaged"),
        (HEADER + "1,a.jpg,4,4,4,x\n2,b.jpg,99999999999999999999,4,4,x\n", "damaged"),
        (HEADER + '1,a.jpg,4,4,4,x\n2,"b.jpg' + "4,4,4,x\n" * 20_000, "damaged"),  # a quote that is never closed
        (b"\x89HDF\r\n\x1a\n\xff\xfe", "damaged"),
    ],
)
def test_bad_manifests(tmp_path, content, reason):
    path = tmp_path / "manifest.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in refusal(path, artifacts.read_manifest)


def test_missing_manifest(tmp_path):
    assert "orl manifest" in refusal(tmp_path / "manifest.csv", artifacts.read_manifest)
    refusal(tmp_path, artifacts.read_manifest)


# Weights


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    artifacts.write_weights(
        path, {"w": torch.arange(6.0), "n": torch.tensor(3)}, artifacts.stamp(artifacts.MODEL, {}, {})
    )
    return path


def test_weights_round_trip(weights):
    found = artifacts.read_weights(weights)
    assert found["w"].tolist() == list(range(6))
    assert (found["n"].item(), found["n"].dtype) == (3, torch.int64)
    assert artifacts.fingerprint(weights) == artifacts.stamp(artifacts.MODEL, {}, {})["fingerprint"]


@pytest.mark.parametrize("length", [0, 4, 8, 60, -9, -1])
def test_truncated_weights(weights, length):
    weights.write_bytes(weights.read_bytes()[:length])
    for read in (artifacts.read_weights, artifacts.attributes, artifacts.fingerprint):
        refusal(weights, read)


def test_weights_of_others(tmp_path):
    path = tmp_path / "a.safetensors"
    refusal(path, artifacts.read_weights)  # missing
    save_file({"w": torch.ones(2)}, path)
    assert "no schema" in refusal(path, artifacts.read_weights)
    artifacts.write_weights(path, {"w": torch.ones(2)}, artifacts.stamp("orl.model/0", {}, {}))
    assert artifacts.MODEL in refusal(path, artifacts.read_weights)
    path.write_text("text")
    refusal(path, artifacts.read_weights)
    torch.save({"w": torch.ones(2)}, path)  # a pickle is never loaded
    refusal(path, artifacts.read_weights)


# Results

RESULT = {"task": "voc07_svm", "model": "stage1", "metrics": {"mAP": 1.5}, "settings": {}, "data": {}}


def test_results_round_trip(tmp_path):
    artifacts.write_json(tmp_path / "a.json", RESULT)
    assert artifacts.read_results(tmp_path / "a.json") == RESULT


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"{}", json.dumps({**RESULT, "extra": 1})[:-20].encode(), b"\xff", None]
    + [json.dumps({key: value for key, value in RESULT.items() if key != missing}).encode() for missing in RESULT],
)
def test_bad_results(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert "evaluate again" in refusal(path, artifacts.read_results)
