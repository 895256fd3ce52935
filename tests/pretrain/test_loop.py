"""Training through its public function and command: files, resuming, faults."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from orl import InputError, NoRoomError
from orl.config import merge, parse
from orl.networks.ema import load_encoder
from orl.pretrain import loop
from orl.pretrain.samples import ImageViews
from orl.training import loop as training_loop
from orl.training.checkpoint import State

CONFIG = {
    "seed": 1,
    "stage1": {
        "network": {"backbone": "resnet10", "hidden": 16, "projection": 8},
        "views": {"size": 32, "blur_radius": [0.1, 0.5]},
        "optimizer": {"batch": 4, "epochs": 3, "lr": 8.0, "warmup_epochs": 1},
    },
    "stage3": {"patch": 24},
}


@pytest.fixture
def train(photos, manifest_path, tmp_path):
    def run(output="model", change=None, **options):
        config = parse(CONFIG if change is None else {**CONFIG, **change})
        loop.train(config, "stage1", str(photos), str(manifest_path), tmp_path / output, **options)
        return tmp_path / output

    return run


def assert_equal_models(a: Path, b: Path):
    for name in ("backbone.safetensors", "model.safetensors", "metrics.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_the_files_of_a_training(train, manifest, photos):
    torchvision = pytest.importorskip("torchvision")
    output = train()
    rows = list(csv.DictReader((output / "metrics.csv").open()))
    per_epoch = len(manifest) // 4
    assert [int(row["step"]) for row in rows] == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    assert all(0 < float(row["loss_global"]) < 8 for row in rows)
    assert all(0 < float(row["feature_std"]) < 1.5 for row in rows)
    assert rows[-1]["ema"] > rows[0]["ema"]
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    missing, extra = network.load_state_dict(load_file(output / "backbone.safetensors"), strict=False)
    assert (sorted(missing), extra) == (["fc.bias", "fc.weight"], [])
    model = load_file(output / "model.safetensors")
    for side in ("online", "target"):
        for key, value in load_file(output / "backbone.safetensors").items():
            assert model[f"{side}.backbone.{key}"].shape == value.shape
    assert torch.equal(
        model["online.backbone.conv1.weight"], load_file(output / "backbone.safetensors")["conv1.weight"]
    )
    assert not torch.equal(model["online.backbone.conv1.weight"], model["target.backbone.conv1.weight"])


def test_training_equals_a_plain_loop(train, photos, manifest):
    """Optimizer, schedule and EMA against the equations, with torch's own pieces put together by hand.

    The equations are written as torch rounds them: BatchNorm over four values magnifies the last bit to per cents.
    """
    from orl.training.augment import augment
    from orl.training.batches import Batches, Loader

    settings = parse(CONFIG).stage1
    torch.set_num_threads(1)
    model = loop.initial(settings, 1).to(memory_format=torch.channels_last).train()  # else it rounds otherwise
    before = {name: value.clone() for name, value in model.state_dict().items()}
    online = [p for n, p in model.named_parameters() if not n.startswith("target")]
    buffers = [torch.zeros_like(p) for p in online]
    per_epoch = len(manifest) // 4
    dataset = ImageViews(str(photos), manifest, "ignore", settings, 1)
    with Loader(dataset, Batches(len(manifest), 4, 3, 1), 0, False) as found:
        batches = list(found)
    for step, (views, parameters) in enumerate(batches):
        x = [augment(view.permute(0, 3, 1, 2), parameters[:, i]) for i, view in enumerate(views)]
        model.zero_grad()
        model(*x)[0]["global"].backward()
        lr = 8.0 * 4 / 512 * (1 + np.cos(np.pi * (step // per_epoch) / 3)) / 2
        if step < per_epoch:
            lr *= 1 - (1 - step / per_epoch) * (1 - 1e-4)
        m = 1 - 0.01 * (np.cos(np.pi * step / (3 * per_epoch)) + 1) / 2
        with torch.no_grad():
            for p, v in zip(online, buffers, strict=True):
                v.mul_(0.9).add_(p.grad.add(p, alpha=1e-4))
                p.add_(v, alpha=-lr)
            for t, o in zip(model.target.parameters(), model.online.parameters(), strict=True):
                t.lerp_(o, 1 - m)  # m t + (1 - m) o
    trained = load_file(train() / "model.safetensors")
    for name, value in model.named_parameters():
        moved = (value - before[name]).norm()
        if not name.endswith(("projector.0.bias", "predictor.0.bias")):  # a BatchNorm undoes these
            assert moved > 1e-5, name
            assert (value - trained[name]).norm() < 0.01 * moved, name


def test_random_has_the_networks_before_the_first_step(tmp_path):
    config = parse(CONFIG)
    loop.random(config, tmp_path / "random")
    expected = loop.initial(config.stage1, 1).online.backbone.state_dict()
    found = load_file(tmp_path / "random" / "backbone.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def crash_at(monkeypatch, step):
    original = loop._Run.train_step

    def train_step(self, *batch):
        if self.step == step:
            raise KeyboardInterrupt
        original(self, *batch)

    monkeypatch.setattr(loop._Run, "train_step", train_step)


@pytest.mark.parametrize(("step", "minutes"), [(1, 0), (3, 0), (3, 15), (5, 15)])
def test_an_interrupted_training_ends_bit_equal(train, monkeypatch, step, minutes):
    undisturbed = train("undisturbed")
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train("broken", checkpoint_minutes=minutes)
    assert not list((undisturbed.parent / "broken").glob("*.safetensors"))
    assert_equal_models(train("broken", log_every=1), undisturbed)


def test_a_finished_training_is_not_done_again(train, monkeypatch):
    output = train()
    before = {path.name: path.read_bytes() for path in output.glob("*.*")}
    for path in output.glob("*.*"):
        path.unlink()
    crash_at(monkeypatch, 0)
    train()
    assert {path.name: path.read_bytes() for path in output.glob("*.*")} == before


def test_changed_settings_start_anew_and_lose_nothing(train, capsys):
    output = train()
    first = (output / "model.safetensors").read_bytes()
    train(change={"seed": 2})
    assert "a new run" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() != first
    assert len(list(output.glob("state/*/checkpoint.pt"))) == 2
    train()
    assert (output / "model.safetensors").read_bytes() == first


def command(photos, manifest_path, output, *extra):
    return [sys.executable, "-m", "orl", "pretrain", "--stage", "stage1", "--settings", json.dumps(CONFIG),
            "--root", str(photos), "--manifest", str(manifest_path), "--output", str(output),
            "--threads", "2", *extra]  # fmt: skip


def wait_for(path: Path, process):
    deadline = time.monotonic() + 120
    while not path.exists() or not list(path.glob("*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_told_to_end_saves_and_resumes_bit_equal(train, photos, manifest_path, tmp_path):
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(photos, manifest_path, broken, "--checkpoint-minutes", "0"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(broken / "state", process)
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster does: the loader's workers get it too
    _, err = process.communicate(timeout=120)
    finished = process.returncode == 0  # the training may have won the race; then there is nothing to resume
    if not finished:
        assert process.returncode == 143
        assert not (broken / "backbone.safetensors").exists()
        assert re.search(r"stopped at step \d+", err)
    again = subprocess.run(command(photos, manifest_path, broken), check=True, capture_output=True, text=True)
    assert "going on from step" in again.stderr
    assert_equal_models(broken, train("whole", threads=2))
    assert not list(broken.rglob("*.tmp"))


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_every_method_trains_and_resumes_bit_equal(train, monkeypatch, method):
    stage1 = merge(CONFIG["stage1"], {"method": method, "queue": 16, "shuffled_batch": 2})
    undisturbed = train("undisturbed", {"stage1": stage1})
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train("broken", {"stage1": stage1}, checkpoint_minutes=0)
    assert_equal_models(train("broken", {"stage1": stage1}), undisturbed)
    (row, *_) = csv.DictReader((undisturbed / "metrics.csv").open())
    assert float(row["loss_contrast"]) > 0
    assert ("ema" in row) == (method == "moco")
    assert load_encoder(undisturbed / "model.safetensors").head == method
    assert (undisturbed / "backbone.safetensors").read_bytes() != (train("byol") / "backbone.safetensors").read_bytes()


def evaluation_mode(monkeypatch):
    """BatchNorm by its running statistics: else its statistics are of a part, and on the CPU of a process."""
    original = loop.initial
    monkeypatch.setattr(loop, "initial", lambda *args: frozen(original(*args)))


def frozen(model):
    def train(mode=True):
        torch.nn.Module.train(model, mode)
        for part in model.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.eval()
        return model

    model.train = train
    return model


def assert_near_models(a, b):
    start = loop.initial(parse(CONFIG).stage1, 1).state_dict()
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert max(float((first[name] - value).float().norm()) for name, value in start.items()) > 0.01
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_accumulation_changes_statistics_only(train, monkeypatch):
    evaluation_mode(monkeypatch)
    stage1 = merge(CONFIG["stage1"], {"optimizer": {"lr": 1.0, "accumulation": 1}})
    halves = merge(stage1, {"optimizer": {"accumulation": 2}})
    assert_near_models(train("whole", {"stage1": stage1}), train("halves", {"stage1": halves}))


def test_simclr_refuses_accumulation(train):
    stage1 = merge(CONFIG["stage1"], {"method": "simclr", "optimizer": {"accumulation": 2}})
    with pytest.raises(InputError, match=r"stage1\.optimizer\.accumulation: simclr compares all photos"):
        train(change={"stage1": stage1})


TWO = """
import sys
from pathlib import Path
import pytest, torch
sys.path.insert(0, {tests!r})
import test_loop
from orl.config import parse
config = parse(test_loop.merge(test_loop.CONFIG, {{"stage1": {{"optimizer": {{"lr": 1.0}}}}}}))
with pytest.MonkeyPatch.context() as patch:
    test_loop.evaluation_mode(patch)
    test_loop.loop.train(config, "stage1", {photos!r}, {manifest!r}, Path({output!r}), threads=2, log_every=2)
"""


def test_two_processes_train_as_one(train, monkeypatch, photos, manifest_path, tmp_path):
    script, output = tmp_path / "two.py", tmp_path / "two"
    script.write_text(
        TWO.format(
            tests=str(Path(__file__).parent), photos=str(photos), manifest=str(manifest_path), output=str(output)
        )
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stage1: done: ") == 1  # the first process speaks for both
    evaluation_mode(monkeypatch)
    one = train("one", {"stage1": merge(CONFIG["stage1"], {"optimizer": {"lr": 1.0}})})
    assert_near_models(one, output)
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (one, output)]
    for a, b in zip(*rows, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_shared_batch_statistics_train_as_one(photos, manifest_path, tmp_path):
    for number in ("1", "2"):
        arguments = command(photos, manifest_path, tmp_path / number, "--gpus", number, "--deterministic", "1")
        arguments[arguments.index("--settings") + 1] = json.dumps({**CONFIG, "precision": "float32"})
        subprocess.run(arguments, check=True, capture_output=True)
    assert_near_models(tmp_path / "1", tmp_path / "2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_deterministic_training_resumes_bit_equal(photos, manifest_path, tmp_path):
    def run(output, *extra):
        arguments = command(photos, manifest_path, output, "--gpus", "1", "--deterministic", "1", *extra)
        return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)

    assert run(tmp_path / "whole").wait() == 0
    process = run(tmp_path / "broken", "--checkpoint-minutes", "0")
    wait_for(tmp_path / "broken" / "state", process)
    process.kill()
    process.communicate()
    assert run(tmp_path / "broken").wait() == 0
    assert_equal_models(tmp_path / "broken", tmp_path / "whole")


def test_the_photo_at_which_a_worker_dies_is_named(train, monkeypatch, photos, manifest):
    original, victim = ImageViews.photo, 3

    def photo(self, row, *args):
        found = original(self, row, *args)
        if row == victim and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)  # as when the system wants memory
        return found

    monkeypatch.setattr(ImageViews, "photo", photo)
    with pytest.raises(InputError, match=re.escape(str(photos / str(manifest.path[victim])))):
        train(threads=2)


def test_too_little_shared_memory_is_said_before_the_workers_die(train, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"/dev/shm: 0 MB are free, but the batches of 1 workers take"):
        train(threads=2)


def test_a_disk_that_is_full_keeps_the_old_checkpoint(photos, manifest_path, tmp_path):
    """A real limit of the system on the size of files stands for the full disk."""
    output = tmp_path / "model"
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000)); "
    limited += "from orl.cli import main; main(sys.argv[1:])"
    arguments = command(photos, manifest_path, output)
    done = subprocess.run([sys.executable, "-c", limited, *arguments[3:]], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "checkpoint.pt: no room for it on the disk; free some" in done.stderr.splitlines()[-1]
    assert not list(output.rglob("*.pt")) + list(output.rglob("*.tmp"))


def test_a_checkpoint_of_another_model_is_named(train):
    output = train()
    (path,) = output.glob("state/*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    del saved["model"]["predictor.0.weight"]
    torch.save(saved, path)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: is of another model"):
        train()


def test_curves_are_written_for_tensorboard(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train(log_every=1)
    (folder,) = output.glob("state/*/tensorboard")
    events = EventAccumulator(str(folder)).Reload()
    assert {"stage1/loss", "stage1/feature_std", "stage1/photos_per_second"} <= set(events.Tags()["scalars"])
    rows = list(csv.DictReader((output / "metrics.csv").open()))
    scalars = {event.step: event.value for event in events.Scalars("stage1/loss")}
    for row in rows:
        assert scalars[int(row["step"])] == pytest.approx(float(row["loss"]), rel=1e-5)


def test_the_log_tells_speed_waiting_and_totals(train, capsys):
    train(log_every=2)
    lines = capsys.readouterr().err.splitlines()
    number = r"[\d.]+"
    assert re.fullmatch(
        rf"stage1: step 2/6, epoch 1\.0, loss {number}, feature std {number}, \d+ photos/s, data wait \d+%, "
        rf"{number} min left",
        lines[0],
    )
    assert re.fullmatch(
        rf"stage1: done: 24 photos in \d+ s \(\d+ photos/s, data wait \d+%\), peak memory {number} GB", lines[-1]
    )


def test_slow_steps_are_told_before_there_are_many_of_them(train, monkeypatch, capsys):
    """Which changes nothing else: no checkpoint more, and the same model."""
    undisturbed = train("undisturbed")
    capsys.readouterr()
    monkeypatch.setattr(training_loop, "LOG_SECONDS", 0.0)
    found = train("slow", log_every=100)
    steps = re.findall(r"step (\d)/6", capsys.readouterr().err)
    assert steps == list("123456")
    assert_equal_models(found, undisturbed)


def test_float16_trains_to_nearly_the_same(train):
    """Its first steps only find the scale of the gradients."""
    full, half = train("full"), train("half", change={"precision": "float16"})
    rows = [next(csv.DictReader((folder / "metrics.csv").open())) for folder in (full, half)]
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[1]["loss"]), rel=0.2)
    found = load_file(half / "backbone.safetensors")["conv1.weight"]
    assert found.isfinite().all()
    assert not torch.equal(found, load_file(full / "backbone.safetensors")["conv1.weight"])


def test_two_trainings_on_one_folder_are_refused(train, tmp_path):
    held = State(tmp_path / "model" / "state", "0" * 64)
    with pytest.raises(InputError, match="another training runs there"):
        train()
    held.lock.close()
    train()


def test_a_damaged_checkpoint_is_named(train):
    output = train()
    (path,) = output.glob("state/*/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=re.escape(str(path))):
        train()


def test_a_checkpoint_that_runs_code_is_refused(train):
    output = train()
    (path,) = output.glob("state/*/checkpoint.pt")

    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(output / "owned"),)

    torch.save({"model": Evil()}, path)
    with pytest.raises(InputError, match="damaged checkpoint"):
        train()
    assert not (output / "owned").exists()


def test_a_loss_that_is_not_finite_stops_naming_the_step(train, monkeypatch):
    original = loop._Run.train_step

    def train_step(self, parts):
        if self.step == 4:
            with torch.no_grad():
                self.model.online.backbone.conv1.weight.fill_(float("nan"))
        original(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "train_step", train_step)
        with pytest.raises(InputError, match="loss of step 4 is not finite"):
            train("broken")
    assert_equal_models(train("broken"), train("undisturbed"))


def test_weights_spoilt_by_the_last_step_are_not_saved(train, monkeypatch):
    """The loss of a step is taken before its update, and says nothing of the weights after it."""
    original = loop._Run.train_step

    def train_step(self, parts):
        original(self, parts)
        if self.step == self.total_steps:
            with torch.no_grad():
                self.model.online.backbone.conv1.weight[0] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "train_step", train_step)
        with pytest.raises(InputError, match="not finite"):
            train("broken")
    assert not (train("undisturbed").parent / "broken" / "backbone.safetensors").exists()
    assert_equal_models(train("broken"), train("undisturbed"))


@pytest.mark.parametrize("minutes", [0, 15])
def test_a_failing_save_keeps_the_old_checkpoint(train, monkeypatch, minutes):
    real, saves = torch.save, []

    def full_disk(state, file):
        if len(saves) == 1:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        saves.append(file)
        real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(NoRoomError, match="no room for it on the disk"):
            train("broken", checkpoint_minutes=minutes)
    assert_equal_models(train("broken"), train("undisturbed"))


def test_bad_inputs(train, photos, manifest_path, tmp_path):
    with pytest.raises(InputError, match=r"stage1\.optimizer\.batch is 999, but .* lists only \d+ photos"):
        train(change={"stage1": {"optimizer": {"batch": 999}}})
    config = parse(CONFIG)
    with pytest.raises(InputError, match="gone"):
        loop.train(config, "stage1", str(tmp_path), str(manifest_path), tmp_path / "x")
    with pytest.raises(InputError, match="stage3 needs --proposals"):
        loop.train(config, "stage3", str(photos), str(manifest_path), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "model").exists()


def test_a_photo_that_changed_is_named_by_the_command(photos, manifest, manifest_path, tmp_path):
    import shutil

    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    spoiled = copy / str(manifest.path[len(manifest) - 1])
    spoiled.write_bytes(spoiled.read_bytes()[:-100])
    done = subprocess.run(command(copy, manifest_path, tmp_path / "model"), capture_output=True, text=True)
    assert done.returncode == 2
    assert str(spoiled) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model" / "backbone.safetensors").exists()


def test_bfloat16_trains_to_nearly_the_same(train):
    full = load_file(train("full") / "backbone.safetensors")
    half = load_file(train("half", change={"precision": "bfloat16"}) / "backbone.safetensors")
    assert half["conv1.weight"].dtype == torch.float32
    difference = (full["conv1.weight"] - half["conv1.weight"]).norm()
    assert 0 < difference < 0.5 * full["conv1.weight"].norm()
