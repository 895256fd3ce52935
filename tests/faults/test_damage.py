"""Damaged files as inputs of every command that reads them: one sentence that names the file, and nothing written.

Or the undisturbed result, where the damage does not matter. What can be seen of it:

- HDF5 files, weights and checkpoints carry checksums of all that they hold; but for the RoI features, of which only
  structure, size and lengths are looked at, and weights that others made. Files made before there were checksums are
  checked for numbers that cannot be.
- manifest.csv is known by its hash to whatever was made from it. What reads nothing else takes a list that is shorter
  by whole lines, or names with other letters, for good.
- Tables, JSON, lists and photos hold no checksum (PNG does): another digit, or another pixel, is taken as it stands.
"""

import json
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from child import run
from commands import finals, line
from safetensors.numpy import load_file, save_file
from test_cli import EACH_INPUT

from orl import artifacts

FILES = [(command, flag) for command, flag in EACH_INPUT if not flag.startswith("--root")]
FILES += [("merge", "--shards"), ("pretrain --stage supervised", "--supervised")]
UNSEEN = ("--rois", "--supervised")  # damage among their numbers


SUBTLE = ("cut", "noise in the middle", "a byte flipped", "zeros from the middle on")  # may not matter
FEW = 3


def damaged(content, random):
    """What happens to a file -> what is left of it."""
    middle = len(content) // 2
    noise = random.bytes(min(64, middle))
    return {
        "emptied": b"",
        "halved": content[:middle],
        "cut": content[:-3],
        "begins with noise": noise + content[len(noise) :],
        "noise in the middle": content[:middle] + noise + content[middle + len(noise) :],
        "a byte flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        "zeros from the middle on": content[:middle] + bytes(len(content) - middle),
        "another kind": b"\xff\xd8\xff\xe0" + random.bytes(1000),
    }


def check(arguments, bad, folder, expected=None):
    """Run a command with a damaged input: it says so, or does as if nothing were. Returns whether it said so.

    `expected`: gives the files of an undisturbed run; None: others may come of it.
    """
    done = run(arguments)
    told = "\n".join(done.lines)
    assert done.status in (0, 2), (done.status, told)
    assert "Traceback" not in told
    if done.status == 2:
        assert done.lines[-1].startswith(f"orl {arguments[0]}: ")
        assert str(bad) in done.lines[-1]
        assert not finals(folder)
    elif expected:
        assert finals(folder) == expected(), told
    return done.status == 2


def seed(*words):
    return np.random.default_rng(zlib.crc32(" ".join(words).encode()))


@pytest.mark.parametrize(("command", "flag"), FILES)
def test_damaged(command, flag, settings, inputs, undisturbed, tmp_path, record_property):
    """Every kind of damage for one command that reads the file, and for the others a few, drawn by a seed."""
    given = inputs[{"--supervised": "--backbone"}.get(flag, flag)]
    given, *others = given if flag == "--shards" else [given]
    bad, folder, random = tmp_path / given.name, tmp_path / "new", seed(command, flag)
    kinds = damaged(given.read_bytes(), random)
    first = next(one for one, other in FILES if other == flag)
    for kind in kinds if command == first else random.choice(list(kinds), FEW, replace=False):
        bad.write_bytes(kinds[kind])
        arguments = line(command, settings, inputs, folder, **{flag: [bad, *others] if flag == "--shards" else bad})
        told = check(arguments, bad, folder, None if flag in UNSEEN else lambda: undisturbed(command)[1])
        assert told or kind in SUBTLE, kind
        shutil.rmtree(folder, ignore_errors=True)
        record_property("damaged files", 1)


@pytest.mark.parametrize(
    ("command", "flag"),
    [(command, flag) for command, flag in FILES if flag not in ("--supervised", "--rejected", "--list")],
)
def test_another_version(command, flag, settings, inputs, tmp_path, record_property):
    """A schema, or columns, that this version does not know."""
    given, *others = inputs[flag] if flag == "--shards" else [inputs[flag]]
    bad = tmp_path / given.name
    shutil.copy(given, bad)
    if given.suffix == ".h5":
        with h5py.File(bad, "r+") as file:
            stamp = artifacts.stamp("orl.things/9", {}, {})
            artifacts.note(file, stamp)
    elif given.suffix == ".safetensors":
        attributes = {**artifacts.attributes(given), **artifacts.stamp("orl.model/9", {}, {})}
        save_file(load_file(given), bad, {"orl": json.dumps(attributes)})
    elif given.suffix == ".csv":
        bad.write_text(given.read_text().replace("image_id", "photo").replace("epoch", "time"))
    else:
        bad.write_text('{"version": 9}')
    arguments = line(
        command, settings, inputs, tmp_path / "new", **{flag: [bad, *others] if flag == "--shards" else bad}
    )
    assert check(arguments, bad, tmp_path / "new")
    record_property("damaged files", 1)


# Numbers that cannot be, in files without checksums, as all were once

WRONG = {
    "--neighbors": [("index", 1, 10), ("index", 1, -1)],
    "--proposals": [("box_offsets", 3, 0), ("box_offsets", -1, 10**6), ("box", 0, -5), ("box", 2, 0), ("box", 2, 4000)],
    "--correspondences": [("neighbor", 0, 99), ("pair", 0, 60000), ("pair_offsets", 2, 10**9), ("pair_offsets", 0, 1)],
    "--embeddings": [("embedding", 0, np.nan), ("embedding", 5, 7.0)],
    "--rois": [("feature", 3, np.nan), ("feature", 0, 9.0)],
    "--features": [("train_5", 2, np.inf), ("test_5", 0, np.nan)],
    "--features of toy": [("train", 2, np.inf), ("val", 0, np.nan)],
}


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flag in EACH_INPUT if flag in WRONG])
def test_impossible_numbers(command, flag, settings, inputs, tmp_path, record_property):
    bad = tmp_path / inputs[flag].name
    for name, place, value in WRONG[flag]:
        shutil.copy(inputs[flag], bad)
        with h5py.File(bad, "r+") as file:
            content = file[name][...]
            content.reshape(-1)[place] = value
            file[name][...] = content
            file[name].attrs.pop("sha256", None)
        assert check(line(command, settings, inputs, tmp_path / "new", **{flag: bad}), bad, tmp_path / "new")
        record_property("damaged files", 1)


# The report, which reads the results of everything


RESULTS = ("voc07_svm", "lowshot", "knn", "linear", "semi", "detection", "segmentation", "lost", "localization")


@pytest.mark.parametrize(
    "name", [*(f"{name}.json" for name in (*RESULTS, "recall", "pairs")), "metrics.csv", "rejected.csv",
             "attention/attention.json", "attention/contact_sheet.png"]
)  # fmt: skip
def test_report_of_all_results(name, settings, inputs, photos, tmp_path, record_property):
    run_folder = inputs["--manifest"].parent
    bad = tmp_path / "inputs" / name
    bad.parent.mkdir(parents=True)

    def place(file):
        return tmp_path / "inputs" / file if name.startswith(file) else run_folder / file

    if name.startswith("attention"):
        shutil.copytree(run_folder / "attention", bad.parent, dirs_exist_ok=True)
    arguments = ["report", "--run-name", "run", "--root", photos, "--manifest", inputs["--manifest"]]
    arguments += [
        "--rejected",
        place("rejected.csv"),
        "--metrics",
        place("metrics.csv"),
        "--recalls",
        place("recall.json"),
    ]
    arguments += ["--scores", *(place(f"{one}.json") for one in RESULTS), "--pairs", place("pairs.json")]
    arguments += ["--attention", place("attention"), "--output", tmp_path / "new" / "out"]
    content = (run_folder / name).read_bytes()
    bad.write_bytes(content)
    assert run(arguments).status == 0
    expected = finals(tmp_path / "new")
    (tmp_path / "new" / "out").unlink()
    for what in damaged(content, seed(name)).values():
        bad.write_bytes(what)
        check(arguments, bad.parent if "attention" in name else bad, tmp_path / "new", lambda: expected)
        (tmp_path / "new" / "out").unlink(missing_ok=True)
        record_property("damaged files", 1)


@pytest.mark.parametrize("name", ["config.json", "downstream/stage1/voc07_svm.json"])
def test_damaged_runs_that_are_compared(name, settings, inputs, tmp_path, record_property):
    folders = [tmp_path / "results" / folder.name for folder in inputs["RUN"]]
    shutil.copytree(inputs["RUN"][0].parent, tmp_path / "results")
    arguments = line("compare", settings, inputs, tmp_path / "new", RUN=folders)
    bad = folders[1] / name
    for kind, content in damaged(bad.read_bytes(), seed("compare", name)).items():
        bad.write_bytes(content)
        told = check(arguments, folders[1], tmp_path / "new")
        assert told or kind in SUBTLE or not content, kind  # an empty config has all defaults
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        record_property("damaged files", 1)


# Photos and their labels

# But for those that look at names alone, or at one or two photos
OF_PHOTOS = [
    (command, flag)
    for command, flag in EACH_INPUT
    if flag.startswith("--root")
    and not command.startswith(
        ("subset", "evaluate voc07", "evaluate knn", "evaluate localization", "report", "attention")
    )
]


@pytest.mark.parametrize(("command", "flag"), OF_PHOTOS)
def test_damaged_photos(command, flag, settings, inputs, tmp_path, record_property):
    """A photo of the manifest, or of a labelled set. The manifest itself lists it as rejected."""
    root, folder = tmp_path / "photos", tmp_path / "new"
    shutil.copytree(inputs[flag], root)
    bad = max(root.rglob("*.jpg"), key=lambda path: path.name)
    for kind, content in damaged(bad.read_bytes(), seed(command, flag)).items():
        if kind in SUBTLE:
            continue
        bad.write_bytes(content)
        arguments = line(command, settings, inputs, folder, **{flag: root})
        if command == "manifest":
            assert run(arguments).status == 0
            assert bad.name in (folder / "rejected.csv").read_text()
            shutil.rmtree(folder)
        else:
            assert check(arguments, bad, folder), kind
        record_property("damaged files", 1)


@pytest.mark.parametrize(
    ("command", "flag", "file"),
    [
        ("features", "--root of labels", "ImageSets/Main/thing_trainval.txt"),
        ("features", "--root of labels", "ImageSets/Main/thing_test.txt"),
        ("evaluate segmentation --name stage1", "--root of masks", "annotations/instances_train2017.json"),
        ("evaluate detection --name stage1", "--root of masks", "annotations/instances_val2017.json"),
    ],
)
def test_damaged_labels(command, flag, file, settings, inputs, tmp_path, record_property):
    root = tmp_path / "root"
    shutil.copytree(inputs[flag], root)
    for what in damaged((root / file).read_bytes(), seed(file)).values():
        (root / file).write_bytes(what)
        check(line(command, settings, inputs, tmp_path / "new", **{flag: root}), root, tmp_path / "new")
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        record_property("damaged files", 1)


@pytest.mark.parametrize("command", ["evaluate proposals", "evaluate localization --name stage1"])
def test_damaged_xml(command, settings, inputs, tmp_path, record_property):
    folder = tmp_path / "xml"
    folder.mkdir()
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>31</xmax><ymax>42</ymax></bndbox>"
    good = f"<annotation><object><name>thing</name>{box}</object></annotation>"
    stems = [Path(path).stem for path in artifacts.read_manifest(inputs["--manifest"]).path.tolist()]
    for stem in stems:
        (folder / f"{stem}.xml").write_text(good)
    arguments = line(command, settings, inputs, tmp_path / "new", **{"--annotations": folder})
    assert run(arguments).status == 0
    expected = finals(tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    bad = folder / f"{stems[4]}.xml"
    for what in damaged(good.encode(), seed(command)).values():
        bad.write_bytes(what)
        assert check(arguments, bad, tmp_path / "new", lambda: expected)
        record_property("damaged files", 1)


# Settings and checkpoints


@pytest.mark.parametrize("name", ["settings.yaml", "settings.json"])
def test_damaged_settings(name, settings, tmp_path, record_property):
    bad = tmp_path / name
    text = settings if name.endswith("json") else yaml.safe_dump(json.loads(settings))
    arguments = ["pretrain", "--stage", "random", "--settings", bad, "--output", tmp_path / "new" / "out"]
    bad.write_text(text)
    assert run(arguments).status == 0
    expected = finals(tmp_path / "new")
    contents = [*damaged(text.encode(), seed(name)).values(), b"[" * 100_000, b"seed: !!int x", b"seed: 2020-13-40",
                b"? [1]\n: 2", b"seed: !!bool x", b"seed: !!binary x", b"\x00", b"&a [*a]"]  # fmt: skip
    for what in contents:
        bad.write_bytes(what)
        shutil.rmtree(tmp_path / "new")
        # An empty file is no settings, and all of them then have their defaults.
        check(arguments, bad, tmp_path / "new", (lambda: expected) if what else None)
        (tmp_path / "new").mkdir(exist_ok=True)
        record_property("damaged files", 1)


def test_damaged_checkpoints(settings, inputs, undisturbed, tmp_path, record_property):
    command = "pretrain --stage stage1"
    arguments = line(command, settings, inputs, tmp_path)
    assert run(arguments).status == 0
    (bad,) = tmp_path.rglob("checkpoint.pt")
    content = bad.read_bytes()
    for kind, what in damaged(content, seed(command)).items():
        bad.write_bytes(what)
        for path in (tmp_path / "out").glob("*.*"):
            path.unlink()
        assert check(arguments, bad, tmp_path), kind
        record_property("damaged files", 1)
    bad.unlink()  # what the sentence says
    assert not run(arguments).status
    assert finals(tmp_path) == undisturbed(command)[1]
