import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from PIL import Image

from orl import InputError, __version__, artifacts, cli, config

SEMI_RUN = "evaluate semi_run --name stage1 --set toy --share 0.5 --lr 0.1 --head 1"
# Each command, and the flags that name a file or folder it reads.
READS = {
    "scenes": [],
    "manifest": ["--root"],
    "pretrain --stage random": [],
    "pretrain --stage stage1": ["--root", "--manifest"],
    "pretrain --stage stage3": ["--root", "--manifest", "--proposals", "--correspondences"],
    "embed": ["--root", "--manifest", "--model"],
    "propose": ["--root", "--manifest"],
    "neighbors": ["--manifest", "--embeddings"],
    "rois": ["--root", "--manifest", "--proposals", "--backbone"],
    "correspond": ["--manifest", "--neighbors", "--proposals", "--rois"],
    "features": ["--backbone", "--root of labels"],
    "features --set toy": ["--backbone", "--root of toy"],
    "subset --set toy --share 0.5": ["--root of toy"],
    "evaluate voc07_svm --name stage1": ["--features", "--root of labels"],
    "evaluate voc07_lowshot --name stage1": ["--features", "--root of labels"],
    "evaluate knn --name stage1 --set toy": ["--features of toy", "--root of toy"],
    "evaluate linear --name stage1 --set toy": ["--backbone", "--root of toy"],
    "evaluate semi_run --name stage1 --set toy --share 0.5 --lr 0.1 --head 1": [
        "--backbone",
        "--root of toy",
        "--list",
    ],
    "evaluate semi --name stage1": ["--runs"],
    "evaluate proposals": ["--manifest", "--proposals", "--annotations"],
    "evaluate pairs": ["--manifest", "--proposals", "--correspondences", "--annotations"],
    "evaluate detection --name stage1": ["--backbone", "--root of masks"],
    "evaluate segmentation --name stage1": ["--backbone", "--root of masks"],
    "evaluate localization --name stage1": ["--root", "--manifest", "--backbone", "--annotations"],
    "evaluate localization --name pairs": ["--manifest", "--proposals", "--correspondences", "--annotations"],
    "attention": ["--root", "--manifest", "--proposals", "--correspondences"],
    "export --format timm": ["--backbone"],
    "card --run-name run --name stage1": ["--backbone of stage1", "--metrics", "--manifest", "--scores"],
    "report --run-name run": [
        "--root",
        "--manifest",
        "--rejected",
        "--neighbors",
        "--proposals",
        "--correspondences",
        "--metrics",
        "--scores",
        "--recalls",
    ],
}
# What --help explains: the words before the first option.
NAMES = list(dict.fromkeys(command.partition(" --")[0] for command in READS))
EACH_INPUT = [(command, flag) for command, flags in READS.items() for flag in flags]


def run(*argv, capsys) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr."""
    status = 0
    try:
        cli.main([str(part) for part in argv])
    except SystemExit as end:
        status = end.code
        if end.__context__:  # a failed loader lives on in the error's frames; its processes end here
            traceback.clear_frames(end.__context__.__traceback__)
    return status, capsys.readouterr().err.splitlines()


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def settings(tiny):
    change = {
        "data": {"layout": "folder", "scenes": {"train": 2, "val": 1, "objects_train": 1, "objects_val": 1}},
        "downstream": {
            "voc07_svm": {"resize": 40, "size": 32, "stages": [5], "costs": [0.1], "folds": 2},
            "voc07_lowshot": {"shots": [1], "samples": 1, "costs": [0.1]},
            "sets": {"toy": {}},
            "linear": {"epochs": 1, "milestones": [], "batch": 2, "resize": 40, "size": 32},
            "semi": {
                "shares": [0.5],
                "weight_decay": [0],
                "epochs": 1,
                "milestones": [],
                "batch": 2,
                "resize": 40,
                "size": 32,
            },
            "knn": {"k": [1], "resize": 40, "size": 32},
            "detection": {
                "iterations": 1,
                "milestones": [],
                "batch": 2,
                "warmup": 0,
                "short_sides": [64],
                "test_side": 64,
                "channels": 8,
                "rois": 8,
                "precise_bn": 1,
            },
            "segmentation": {"epochs": 1, "milestones": [], "batch": 2, "resize": 40, "size": 32},
            "localization": {"side": 64},
            "attention": {"photos": 1, "side": 64},
        },
    }
    return json.dumps({**tiny.model_dump(mode="json"), **change})


@pytest.fixture(scope="session")
def labels(photos, tmp_path_factory):
    """The photos as a VOC tree with one class."""
    folder = tmp_path_factory.mktemp("voc")
    sets = folder / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    names = []
    for path in sorted(photos.rglob("*.jpg")):
        shutil.copy(path, folder / "JPEGImages")
        names.append(path.stem)
    for split, own in (("trainval", names[:6]), ("test", names[6:])):
        (sets / f"{split}.txt").write_text("".join(f"{name}\n" for name in own))
        (sets / f"thing_{split}.txt").write_text("".join(f"{name} {(-1, 1)[i % 2]:2}\n" for i, name in enumerate(own)))
    return folder


@pytest.fixture(scope="session")
def toy(photos, tmp_path_factory):
    """The photos as a labelled set of two classes."""
    folder = tmp_path_factory.mktemp("toy")
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))):
        own = folder / ("train" if number < 6 else "val") / "ab"[number % 2]
        own.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, own)
    return folder


@pytest.fixture(scope="session")
def masks(photos, tmp_path_factory):
    """The photos in COCO layout, each with one object."""
    folder = tmp_path_factory.mktemp("coco")
    paths = sorted(photos.rglob("*.jpg"))
    for split, own in (("train2017", paths[:6]), ("val2017", paths[6:])):
        (folder / split).mkdir()
        images, objects = [], []
        for number, path in enumerate(own, 1):
            shutil.copy(path, folder / split)
            width, height = Image.open(path).size
            images.append({"id": number, "file_name": path.name, "width": width, "height": height})
            objects.append({"id": number, "image_id": number, "category_id": 3, "bbox": [10, 10, 30, 30], "iscrowd": 0,
                            "area": 900, "segmentation": [[10, 10, 40, 10, 40, 40, 10, 40]]})  # fmt: skip
        content = {"images": images, "annotations": objects, "categories": [{"id": 3, "name": "thing"}]}
        artifacts.write_json(folder / "annotations" / f"instances_{split}.json", content)
    return folder


@pytest.fixture(scope="session")
def inputs(photos, labels, toy, masks, settings, model_folder, tmp_path_factory):
    """Flag -> what to give for it; the files are made by the commands themselves, one after the other."""
    folder = tmp_path_factory.mktemp("run")
    names = {
        name: folder / f"{name}.h5" for name in ("proposals", "embeddings", "neighbors", "rois", "correspondences")
    }
    given = {
        "--root": photos,
        "--root of labels": labels,
        "--root of toy": toy,
        "--root of masks": masks,
        "--features": folder / "features.h5",
        "--features of toy": folder / "toy.features.h5",
        "--list": folder / "half.txt",
        "--runs": folder / "run.json",
        "--manifest": folder / "manifest.csv",
        "--rejected": folder / "rejected.csv",
        "--model": model_folder / "model.safetensors",
        "--backbone": model_folder / "backbone.safetensors",
        "--backbone of stage1": folder / "stage1" / "backbone.safetensors",
        "--metrics": folder / "metrics.csv",
        "--scores": folder / "voc07_svm.json",
        "--annotations": folder / "instances.json",
        "--recalls": folder / "recall.json",
        **{f"--{name}": path for name, path in names.items()},
    }
    images = [{"id": number, "file_name": path.name} for number, path in enumerate(sorted(photos.rglob("*.jpg")))]
    annotations = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 40], "iscrowd": 0}]
    artifacts.write_json(given["--annotations"], {"images": images, "annotations": annotations})
    artifacts.write_csv(given["--metrics"], ("epoch", "loss", "feature_std", "lr"), [(1, 3.0, 0.9, 0.1)])

    def make(command, output, *more):
        options = [str(part) for flag in READS[command] for part in (flag.partition(" of ")[0], given[flag])]
        more += tuple(map(str, extra(command, given, output)))
        cli.main([*command.split(), "--settings", settings, *options, *more, "--output", str(output), "--threads", "1"])

    make("manifest", given["--manifest"])
    make("propose", given["--proposals"])
    make("pretrain --stage stage1", folder / "stage1")
    make("embed", given["--embeddings"])
    make("neighbors", given["--neighbors"])
    make("rois", given["--rois"])
    make("correspond", given["--correspondences"])
    make("features", given["--features"])
    make("features --set toy", given["--features of toy"])
    make("subset --set toy --share 0.5", given["--list"])
    make("evaluate voc07_svm --name stage1", given["--scores"])
    make("evaluate voc07_lowshot --name stage1", folder / "lowshot.json")
    make("evaluate knn --name stage1 --set toy", folder / "knn.json")
    make("evaluate linear --name stage1 --set toy", folder / "linear.json")
    make(SEMI_RUN, given["--runs"])
    make("evaluate semi --name stage1", folder / "semi.json")
    make("evaluate proposals", given["--recalls"])
    make("evaluate pairs", folder / "pairs.json")
    make("evaluate detection --name stage1", folder / "detection.json")
    make("evaluate segmentation --name stage1", folder / "segmentation.json")
    make("evaluate localization --name stage1", folder / "lost.json")
    make("evaluate localization --name pairs", folder / "localization.json")
    make("attention", folder / "attention")
    make("export --format timm", folder / "timm.safetensors")
    make("card --run-name run --name stage1", folder / "README.md")
    make("report --run-name run", folder / "index.html")
    make("scenes", folder / "scenes")
    make("pretrain --stage random", folder / "random")
    return given


def extra(command, inputs, output):
    """Options of a command that are none of READS: what else it writes, and files in another form."""
    if command == "manifest":
        return "--rejected", output.parent / "rejected.csv"
    if command.startswith("evaluate detection"):
        return "--predictions", output.parent / "predictions.json"
    if command == "attention":
        return "--backbones", f"stage1={inputs.get('--backbone', 'nowhere')}"
    return ()


def argv(command, settings, inputs, output, **change):
    """A whole command line; `change` replaces what is given for a flag."""
    options = [part for flag in READS[command] for part in (flag.partition(" of ")[0], change.get(flag, inputs[flag]))]
    options += extra(command, inputs, output)
    output = output.with_suffix(".safetensors") if command.startswith("export") else output
    return [*command.split(), "--settings", settings, *options, "--output", output, "--threads", "1"]


# Good input


def test_the_commands_make_their_files(inputs):
    folder = inputs["--manifest"].parent
    assert {path.name for path in folder.iterdir()} == {
        *(path.name for path in inputs.values() if path.parent == folder),
        "manifest.csv.state",
        "index.html",
        "pairs.json",
        "lowshot.json",
        "knn.json",
        "linear.json",
        "semi.json",
        "detection.json",
        "predictions.json",
        "segmentation.json",
        "lost.json",
        "localization.json",
        "attention",
        "timm.safetensors",
        "README.md",
        "stage1",
        "random",
        "scenes",
    }
    assert len(artifacts.read_manifest(inputs["--manifest"])) == 10
    assert artifacts.read_neighbors(inputs["--neighbors"]).index.shape == (10, 3)
    assert artifacts.read_results(inputs["--scores"])["model"] == "stage1"
    assert sorted(path.name for path in (folder / "random").iterdir()) == ["backbone.safetensors", "model.safetensors"]
    # Through files and command, the same as by the functions (tests/discovery) with the same settings.
    weights = artifacts.read_weights(folder / "random" / "backbone.safetensors")
    expected = artifacts.read_weights(inputs["--backbone"])
    assert all((weights[name] == value).all() for name, value in expected.items())


# Bad settings


@pytest.mark.parametrize("command", READS)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("missing.yaml", "missing.yaml: cannot read the settings"),
        ("broken.yaml", "broken.yaml: is neither YAML nor JSON"),
        ('{"stage1": {"optimizer": {"epohcs": 1}}}', "--settings: unknown key 'stage1.optimizer.epohcs'; did you mean"),
        ('{"seed": "3"}', "--settings: seed: "),
    ],
)
def test_bad_settings_stop_every_command_before_any_work(command, text, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("seed: [")
    missing = dict.fromkeys(READS[command], "nowhere")  # not looked at yet
    status, lines = run(*argv(command, text, missing, tmp_path / "new" / "out"), capsys=capsys)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"orl {command.split()[0]}: {sentence}")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


# Bad files


@pytest.mark.parametrize(("command", "flag"), EACH_INPUT)
def test_a_missing_file_is_one_sentence(command, flag, settings, inputs, tmp_path, capsys):
    before = files_below(tmp_path), files_below(inputs["--manifest"].parent)
    missing = tmp_path / f"missing{inputs[flag].suffix}"
    status, lines = run(*argv(command, settings, inputs, tmp_path / "new" / "out", **{flag: missing}), capsys=capsys)
    assert status == 2
    assert lines[-1].startswith(f"orl {command.split()[0]}: {missing}")
    assert len(lines) == 1 or (command, flag) == ("rois", "--root")  # which has said how much it will write
    assert (files_below(tmp_path), files_below(inputs["--manifest"].parent)) == before


WRONG = {
    "--manifest": "--rejected",
    "--rejected": "--manifest",
    "--metrics": "--manifest",
    "--model": "--backbone",
    "--backbone": "--model",
    "--backbone of stage1": "--backbone",
    "--embeddings": "--neighbors",
    "--neighbors": "--embeddings",
    "--proposals": "--rois",
    "--rois": "--proposals",
    "--correspondences": "--neighbors",
    "--scores": "--metrics",
    "--features": "--features of toy",
    "--features of toy": "--features",
    "--list": "--metrics",
    "--runs": "--scores",
    "--annotations": "--recalls",
    "--recalls": "--scores",
}


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flag in EACH_INPUT if flag in WRONG])
def test_a_file_of_another_kind_is_one_sentence(command, flag, settings, inputs, tmp_path, capsys):
    wrong = inputs[WRONG[flag]]
    status, lines = run(*argv(command, settings, inputs, tmp_path / "new" / "out", **{flag: wrong}), capsys=capsys)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"orl {command.split()[0]}: {wrong}: ")
    assert files_below(tmp_path) == []


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


FOREIGN = [
    *((command, flag) for command, flag in EACH_INPUT if flag in WRONG),
    ("attention", "--backbones"),
    (f"{SEMI_RUN} --best", ""),
    ("pretrain --stage stage1", "stage1.weights"),
    ("pretrain --stage supervised", "supervised"),
]


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
@pytest.mark.parametrize(("command", "flag"), FOREIGN)
def test_no_command_runs_what_a_pickle_would(command, flag, write, settings, inputs, tmp_path, capsys):
    trace, path, output = tmp_path / "ran", tmp_path / f"evil{inputs.get(flag, Path('a.pth')).suffix}", tmp_path / "out"
    with open(path, "wb") as file:
        write({"state_dict": Runs(trace)}, file)
    if flag in ("stage1.weights", "supervised"):
        changed = config.merge(json.loads(settings), {"stage1": {"weights": str(path)}, "supervised": str(path)})
        line = [*command.split(), "--settings", json.dumps(changed), "--output", output]
    elif flag == "--backbones":
        line = argv(command, settings, inputs, output)
        line[line.index("--backbones") + 1] = f"a={path}"
    elif "--best" in command:
        line = argv(SEMI_RUN, settings, inputs, output)
        line = [*line, "--best", path]
    else:
        line = argv(command, settings, inputs, output, **{flag: path})
    status, lines = run(*line, capsys=capsys)
    assert status == 2
    assert len(lines) == 1
    assert f"{path}: " in lines[0] or (command, flag) == ("correspond", "--manifest")  # of which it reads no row
    assert files_below(tmp_path) == [path]
    assert not trace.exists()
    pickle.loads(pickle.dumps(Runs(trace)))  # it would have
    assert trace.exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("pretrain --stage stage1", "--root"),
        ("pretrain --stage stage1 --root {root}", "--manifest"),
        ("pretrain --stage stage3 --root {root} --manifest {manifest}", "--proposals"),
        ("evaluate voc07_svm --name x --features {features}", "downstream.voc07_svm.root"),
        ("evaluate knn --name x --set toy --features {features}", "downstream.sets.toy.root"),
        ("evaluate linear --name x --set other --backbone {backbone}", "downstream.sets: has no set 'other'"),
        (
            "evaluate semi_run --name x --set toy --backbone {backbone} --list {list} --share 0.5",
            "needs --lr and --head",
        ),
        ("evaluate segmentation --name x --backbone {backbone}", "downstream.detection.root: is not set"),
        (
            "evaluate localization --name x --manifest {manifest} --annotations {annotations}",
            "needs either --backbone, or --proposals and --correspondences",
        ),
        (
            "attention --root {root} --manifest {manifest} --backbones a={backbone} a={backbone}",
            "--backbones: one name stands for several files",
        ),
        (
            "evaluate localization --name x --manifest {manifest} --annotations {annotations} --backbone {backbone}",
            "needs --root",
        ),
    ],
)
def test_options_that_only_some_runs_need(line, sentence, settings, inputs, tmp_path, capsys):
    words = [
        word.format(**{flag[2:]: path for flag, path in inputs.items() if " " not in flag}) for word in line.split()
    ]
    status, lines = run(*words, "--settings", settings, "--output", tmp_path / "new" / "out", capsys=capsys)
    assert status == 2
    assert len(lines) == 1
    assert sentence in lines[0]
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("command", ["embed", "rois", "propose", "pretrain --stage stage1"])
@pytest.mark.parametrize("change", ["shorter", "gone", "damaged"])
def test_an_error_in_a_worker_process_is_one_sentence(
    command, change, settings, inputs, photos, manifest, tmp_path, capsys
):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    path = root / str(manifest.path[7])
    size = path.stat().st_size
    path.unlink()
    reason = "photo is gone"
    if change != "gone":
        path.write_bytes(bytes(size - (change == "shorter")))
        reason = "photo changed since" if change == "shorter" else "not a JPEG, PNG or WebP image"
    line = argv(command, settings, inputs, tmp_path / "new", **{"--root": root})
    status, lines = run(*line[:-1], 2, capsys=capsys)
    assert status == 2
    assert lines[-1].startswith(f"orl {command.split()[0]}: {path}: {reason}")
    assert not [entry for entry in files_below(tmp_path) if root not in entry.parents and "state" not in entry.parts]


# Other endings


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("a.h5: is bad; make it again."), 2, "a.h5: is bad; make it again."),
        (OSError(13, "Permission denied", "a.h5"), 1, "[Errno 13] Permission denied: 'a.h5'"),
        (OSError(28, "No space left on device", "a.h5"), 1, "a.h5: no room on the disk; free some and run again."),
        (OSError(), 1, ""),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_exit_statuses(error, status, sentence, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_neighbors", fail)
    found, lines = run("neighbors", "--manifest", "m", "--embeddings", "e", "--output", "n", capsys=capsys)
    assert found == status
    assert len(lines) == (sentence is not None)
    assert sentence is None or lines[0].startswith(f"orl neighbors: {sentence}")


@pytest.mark.parametrize("threads", ["0", "-1", "1.5", "two", ""])
def test_threads_are_counted_from_one(threads, capsys):
    status, lines = run(
        "neighbors", "--manifest", "m", "--embeddings", "e", "--output", "n", "--threads", threads, capsys=capsys
    )
    assert status == 2
    assert "is not a whole number of at least 1" in lines[-1] or "expected one argument" in lines[-1]


# Help


@pytest.mark.parametrize("name", NAMES)
def test_help_names_settings_and_output(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    found = capsys.readouterr().out
    assert f"orl {name}" in found
    assert "--settings CONFIG" in found
    assert "--output" in found


def test_the_guide_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    named = set(re.findall(r"^  (\w+)(?: RUN)*  +\S", capsys.readouterr().out, re.MULTILINE))
    (commands,) = [action for action in cli.parser()._actions if action.dest == "command"]
    assert named - {"orl", "snakemake"} == set(commands.choices)


def test_what_is_said_to_follow_a_command_exists(capsys):
    told = re.findall(r"orl (evaluate \w+|\w+)", "; ".join(cli.NEXT.values()))
    for line in {*told, *(key.partition(" --")[0] for key in cli.NEXT if key != "--shard")}:
        with pytest.raises(SystemExit) as end:
            cli.main([*line.split(), "--help"])
        assert end.value.code == 0, line


def test_on_a_terminal_a_command_says_where_its_output_is_and_what_follows(settings, inputs, tmp_path, capsys):
    shown = {
        "scenes": "orl manifest",
        "manifest": "orl pretrain --stage stage1",
        "pretrain --stage random": "orl features, then orl evaluate",
        "features": "orl evaluate voc07_svm",
        "features --set toy": "orl evaluate knn",
        "propose": "orl rois",
        "propose --shard 1/2": "orl merge, once all shards are there",
        "evaluate proposals": None,
    }
    for number, (command, follows) in enumerate(shown.items()):
        output = tmp_path / f"{number}"
        plain = command.partition(" --shard")[0]
        line = [*argv(plain, settings, inputs, output), *command.removeprefix(plain).split()]
        assert run(*line, capsys=capsys)[0] == 0
        assert not [one for one in run(*line, capsys=capsys)[1] if "wrote" in one]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(sys.stderr), "isatty", lambda _: True)
            status, lines = run(*line, capsys=capsys)
        name = command.partition(" --")[0]
        assert status == 0
        assert lines[-1] == f"orl {name}: wrote {output}" + (f"; next: {follows}" if follows else "")


def test_help_and_bad_settings_load_nothing_heavy():
    """Else each takes seconds."""
    heavy = {"torch", "torchvision", "faiss", "cv2", "snakemake", "sklearn", "pycocotools", "matplotlib", "scipy"}
    lines = [*([*name.split(), "--help"] for name in [*NAMES, "evaluate", "compare"]), ["--help"], ["--version"]]
    lines.append(["scenes", "--settings", "{", "--output", "x"])
    code = f"""
import sys
from orl.cli import main
for line in {lines}:
    try:
        main(line)
    except SystemExit:
        pass
print(sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"orl {__version__}" in done.stdout


def test_as_module_and_as_script(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "orl")
    for start in ([sys.executable, "-m", "orl"], [script]):
        if not os.path.exists(start[0]):
            pytest.skip("the package is not installed as a script here")
        line = [*start, "neighbors", "--manifest", "missing.csv", "--embeddings", "e.h5", "--output", "n.h5"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.splitlines() == ["orl neighbors: missing.csv: no such file; make it with `orl manifest`."]
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_none_is_named_before_anything_is_fetched(tmp_path, capsys):
    status, lines = run("fetch", "coco", "--output", tmp_path / "coco", "--parts", "train2014", capsys=capsys)
    assert status == 2
    assert lines == [
        "orl fetch: coco: has no part 'train2014'; name some of train2017, val2017, annotations, unlabeled2017, "
        "image_info_unlabeled."
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_given_list_is_taken_for_its_share(settings, inputs, toy, tmp_path, capsys):
    chosen = sorted(path.name for path in (toy / "train").rglob("*.jpg"))[:4]
    (tmp_path / "given.txt").write_text("".join(f"{name}\n" for name in chosen))
    own = json.loads(settings)
    own["downstream"]["sets"]["toy"] = {"lists": {"0.5": str(tmp_path / "given.txt")}}
    status, _ = run("subset", "--set", "toy", "--share", 0.5, "--root", toy, "--settings", json.dumps(own),
                    "--output", tmp_path / "list.txt", capsys=capsys)  # fmt: skip
    assert status == 0
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert sorted(line.split()[0].rpartition("/")[2] for line in lines) == chosen
    assert inputs["--list"].read_text().splitlines() != lines
