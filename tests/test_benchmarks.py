"""Each benchmark runs as its README says, at a size where its figures mean nothing."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from orl.networks.backbones import backbone

pytest.importorskip("torchvision")

PROJECT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def output_of(name, *options, folder=PROJECT):
    """What a benchmark prints, all its figures being numbers."""
    command = [sys.executable, str(PROJECT / "benchmarks" / f"{name}.py"), *map(str, options)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\b(nan|inf)\b", done.stdout)
    return done.stdout


def figure(text, pattern):
    """The number that `pattern` finds, which must be there; times are not judged: one may be printed as 0.0 s."""
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in\n{text}"
    return float(found[1])


def test_data(photos):
    text = output_of("data", "--photos", photos, "--count", 3, "--batch", 4, "--size", 32, "--repeats", 1)
    for way in ("Pillow", "orl.data.decode"):
        figure(text, rf"decode, {re.escape(way)}: ([\d.]+) ms per photo and core")
    assert figure(text, r"decode, orl.data.decode: .*largest difference (\d+)") == 0
    figure(text, r"two crops to 32 px: ours is ([\d.]+) x Pillow; largest")
    figure(text, r"ours, decode \+ crop: ([\d.]+) samples per second and core, [\d.]+ x \(target 3\)")
    figure(text, r"end to end, one process, augmented on the \w+: ([\d.]+) samples")
    for way in ("Pillow", "ours", "torchvision v2"):
        figure(text, rf"augment 4 views of 32 px, {way}.*: ([\d.]+) ms per view")
    for operation in ("brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize"):
        assert figure(text, rf"{operation}, ours: .*largest difference ([\d.e-]+)") <= 1  # 0 on the CPU
        assert figure(text, rf"{operation}, torchvision v2: .*largest difference ([\d.e-]+)") >= 0
    for name in ("OpenCV", "TorchCodec"):
        assert re.search(rf"decode, {name}: ([\d.]+ ms|not installed)", text)


def test_svm():
    text = output_of("svm", "--train", 120, "--test", 80, "--width", 40, "--classes", 2, "--shots", 1, "--workers", 1)
    figure(text, r"SVM, 2 classes: (\d+) s in 1 processes; mAP [\d.]+")
    assert figure(text, r"AP differs by ([\d.]+) at most; 0 of 116 fits") < 1
    figure(text, r"low-shot SVM: (\d+) s for 190 fits")


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_train(stage, photos):
    small = ("--backbone", "resnet10", "--batch", 4, "--size", 32, "--steps", 1, "--threads", 2, "--count", 4)
    text = output_of("train", "--stage", stage, "--photos", photos, "--precision", "float32", *small)
    for way in ("reference", "our step, ready views", "our step"):
        figure(text, rf"\n{way}: ([\d.]+) images/s")
        figure(text, rf"\n{way}: .* ([\d.]+) x reference")
    figure(text, r"\nour loop: .*, ([\d.]+)% of our step")
    assert 0 <= figure(text, r"the device waits ([\d.]+)% of the time") <= 100
    figure(text, r"whole epoch of 4 steps, .*: ([\d.]+) images/s")
    figure(text, r"peak memory .*?([\d.]+) GB")


def test_cost_of_an_image_is_known_for_resnet50_alone():
    cases = [("resnet50", "stage1", 224), ("resnet50", "stage3", 224), ("resnet50", "stage1", 112), ("resnet18",) * 3]
    code = "import train; from argparse import Namespace as N\n"
    code += f"for b, stage, s in {cases}: print(train.flops(N(backbone=b, stage=stage, size=s), 1000.0))"
    folder = PROJECT / "benchmarks"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, third, half, unknown = done.stdout.split("\n")[:4]
    assert figure(first, r", ([\d.]+) TFLOP/s") == pytest.approx(65.6)
    assert figure(third, r", ([\d.]+) TFLOP/s") == pytest.approx(65.6 * 1.37, abs=0.01)
    assert figure(half, r", ([\d.]+) TFLOP/s") == pytest.approx(65.6 / 4)
    assert unknown == ""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from Linux's /proc")
def test_memory():
    text = output_of("memory", "--count", 300, "--samples", 5)
    for count in (30, 300):
        assert figure(text, rf"\n{count} photos: correspondences.h5 ([\d.]+) MB") < 150
        figure(text, rf"\n{count} photos: correspondences.h5 .* opened in ([\d.]+) ms")
        assert math.isfinite(figure(text, rf"\n{count} photos: anonymous memory ([+-][\d.]+) MB"))
    assert figure(text, r"\n300 photos: as JSON about (\d+) MB") >= 0
    assert math.isfinite(figure(text, r"ten times the photos: anonymous memory ([+-][\d.]+) MB"))


def test_stage2(photos):
    small = ("--backbone", "resnet10", "--size", 32, "--count", 4, "--queries", 2, "--neighbors", 2, "--threads", 2)
    text = output_of("stage2", "--photos", photos, *small, "--searched", 3, "--long-side", 40, "--shared", 2)
    assert figure(text, r"reference \d+, ([\d.]+) x \(target 10\)") > 1
    figure(text, r"\nours: ([\d.]+) s")
    figure(text, r"\nreference: ([\d.]+) s, .*, by the \d+ of 2 queries")
    figure(text, r"\nours is ([\d.]+) x faster \(target 8\)")
    assert figure(text, r"within 0.001 of the cut, (\d+) are not: as wanted") == 0
    for size in ("full size", "40 px"):
        figure(text, rf"\nproposals of 3 photos, {size}: ([\d.]+) s")
    assert "so not measured" in text
    figure(text, r"\nreduced: ([\d.]+) x faster \(target 6\)")
    figure(text, r"([\d.]+)% of 2 x \(target 90\)")


on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")


@on_linux
def test_scale(tmp_path):
    small = ("--count", 400, "--width", 8, "--shards", 2, "--many", 400, "--index", "IVF4,Flat", "--threads", 2)
    text = output_of(
        "scale", "--parts", "stage2", "neighbors", *small, "--parameters", "nprobe=4", "--folder", tmp_path
    )
    for count in (40, 400):
        for name in ("neighbors", "correspond in 2 shards", "merge"):
            assert figure(text, rf"\n{count} photos, {name}: .* at most ([\d.]+) MB resident") > 10
            assert figure(text, rf"\n{count} photos, {name}: .* and ([\d.]+) MB anonymous") > 5
        assert figure(text, rf"\n{count} photos, files: .*, 2 shards of rois.h5 ([\d.]+) MB") >= 0
    for name in ("neighbors", "correspond", "merge"):
        figure(text, rf"\nten times the photos, {name}: .* ([\d.]+) x the resident memory")
    assert figure(text, r"\n400 embeddings, IVF4,Flat with nprobe=4: .*; recall ([\d.]+)") == 1
    assert figure(text, r"\n400 embeddings, exact: ([\d.]+) s for 400 of them") >= 0
    assert not list(tmp_path.iterdir())


@on_linux
def test_plan(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("{name: plan, data: {layout: folder}}")
    options = ("--parts", "plan", "--count", 10, "--config", config, "--repeats", 1, "--folder", tmp_path)
    figure(output_of("scale", *options), r"\nsnakemake -n, 10 photos, \d+ files, .*: ([\d.]+) s")


@on_linux
def test_no_room_is_one_sentence(tmp_path):
    command = [
        sys.executable,
        str(PROJECT / "benchmarks" / "scale.py"),
        "--width",
        "1000000",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "are free" in done.stderr
    assert "Traceback" not in done.stderr


def test_photos_are_drawn_where_there_are_none(tmp_path):
    code = f"import common; common.PHOTOS = common.Path('none'); print(*common.photos(None, 2, {str(tmp_path)!r}))"
    folder = PROJECT / "benchmarks"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=folder, check=True, capture_output=True)
    assert b"2 generated JPEGs" in done.stdout
    assert all(path.stat().st_size > 50_000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["data", "train", "memory"])
def test_importing_a_benchmark_needs_no_other_stage(name):
    needless = "{'snakemake', 'faiss', 'cv2', 'sklearn', 'kornia', 'torchcodec'}"
    code = f"import sys, {name}; found = {needless} & set(sys.modules); assert not found, found"
    folder = PROJECT / "benchmarks"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_photos_is_one_sentence(tmp_path):
    command = [sys.executable, str(PROJECT / "benchmarks" / "data.py"), "--photos", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no JPEGs in it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["scenes-evidence", "coco-small"])
def test_cost_and_that_stage_1_alone_costs_as_much_as_both_stages(name):
    config = PROJECT / "config" / f"{name}.yaml"
    text = output_of("cost", config)
    long = yaml.safe_load(config.read_text())["variants"]["long"]["stage1"]["optimizer"]["epochs"]
    assert abs(figure(text, r"stages 1 and 3: ([\d.]+)") - long) < 1
    spent = {model: figure(text, rf"\| {model} \| \d+ \| [\d.]+ \| ([\d.]+) \|") for model in ("orl", "stage1-long")}
    assert spent["stage1-long"] == pytest.approx(1 + spent["orl"], rel=0.02)


def test_the_flops_of_a_training(tmp_path):
    network = {"backbone": "resnet18", "hidden": 64, "projection": 32}
    raw = {"name": "one", "stage1": {"network": network, "views": {"size": 64}}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(raw))
    with FlopCounterMode(display=False) as counter:
        backbone("resnet18").eval()(torch.randn(1, 3, 64, 64))
    projector, predictor = 2 * (512 * 64 + 64 * 32), 2 * (32 * 64 + 64 * 32)
    # Both views: forward of online and target, backward to weights and to inputs; but for the photo, which needs none.
    first = 2 * 64 * 3 * 7 * 7 * 32 * 32
    passes = 8 * (counter.get_total_flops() + projector) + 6 * predictor - 2 * first
    assert figure(output_of("cost", tmp_path / "one.yaml"), r"stage1 \| 800 \| ([\d.]+)") == round(passes / 1e9, 2)


def test_controls_of_the_evidence(tmp_path, tiny, model_folder):
    from orl.config import Scenes
    from orl.data.scenes import generate

    raw = tiny.model_dump(mode="json")
    raw.update(name="one", data={"layout": "scenes", "scenes": {"train": 40, "val": 40}})
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(raw))
    results = tmp_path / "results" / "one"
    generate(results / "scenes", Scenes(train=40, val=40))
    shutil.copytree(model_folder, results / "models" / "stage1")
    data = {"root": str(results / "scenes/VOCdevkit/VOC2007"), "layout": "voc"}
    result = {
        "data": {**data, "train_split": "trainval", "test_split": "test"},
        "settings": {"downstream": {"voc07_svm": {"resize": 36, "size": 32}}},
    }
    (results / "downstream" / "stage1").mkdir(parents=True)
    (results / "downstream" / "stage1" / "voc07_svm.json").write_text(json.dumps(result))
    text = output_of("controls", tmp_path / "one.yaml", "--steps", 1, folder=tmp_path)
    assert 0 < figure(text, r"\| stage1 \| [\d.]+ \| ([\d.]+) \|") < 100
    for kind in ("itself", "class", "random"):
        assert 0 < figure(text, rf"\| {kind} \| 1 \| ([\d.]+) \| [\d.]+ \|") < 8
