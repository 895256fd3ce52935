"""The stages in shards: any number of them makes the files of a single run, and odd sets of them are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orl import InputError, artifacts
from orl.config import merge, parse
from orl.discovery import encode
from orl.discovery.correspondences import correspond
from orl.discovery.embed import embed
from orl.discovery.proposals import propose
from orl.discovery.rois import rois

COUNTS = [1, 2, 3, 7, 13]  # of ten photos: the last leaves some shards empty


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    """Batches that reach across photos and shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH", 4)
        yield


@pytest.fixture(scope="module")
def neighbors_path(manifest_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("neighbors") / "neighbors.h5"
    index = (np.arange(10)[:, None] + [1, 4, 7]) % 10
    with artifacts.create(path, artifacts.NEIGHBORS, {}, {"manifest": artifacts.fingerprint(manifest_path)}) as file:
        file["index"], file["similarity"] = index.astype(np.int32), np.ones((10, 3), np.float32)
    return path


@pytest.fixture(scope="module")
def stages(photos, tiny, manifest_path, model_folder, proposals_path, neighbors_path, tmp_path_factory):
    """Stage -> what makes its file, or a shard of it, at a path; and the folder of the whole files."""
    folder = tmp_path_factory.mktemp("whole")
    root, manifest, proposals = str(photos), str(manifest_path), str(proposals_path)
    model, backbone = (str(model_folder / f"{name}.safetensors") for name in ("model", "backbone"))
    known = (manifest, str(neighbors_path), proposals)
    found = {
        "embeddings": lambda path, shard: embed(tiny, root, manifest, model, path, shard=shard),
        "proposals": lambda path, shard: propose(tiny, root, manifest, path, shard=shard),
        "rois": lambda path, shard: rois(tiny, root, manifest, proposals, backbone, path, shard=shard),
        "correspondences": lambda path, shard: correspond(tiny, *known, [str(folder / "rois.h5")], path, shard=shard),
    }
    for name, make in found.items():
        make(str(folder / f"{name}.h5"), None)
    return found, folder


def shards(make, count, folder):
    paths = [str(folder / f"{number}.h5") for number in range(1, count + 1)]
    for number, path in enumerate(paths, 1):
        make(path, (number, count))
    return paths


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("stage", ["embeddings", "proposals", "rois", "correspondences"])
def test_merged_shards_are_the_file_of_a_single_run(stages, stage, count, tmp_path):
    made, folder = stages
    paths = shards(made[stage], count, tmp_path)
    artifacts.merge(paths[::-1], tmp_path / "merged.h5")
    assert (tmp_path / "merged.h5").read_bytes() == (folder / f"{stage}.h5").read_bytes()


@pytest.mark.parametrize("count", COUNTS)
def test_pairs_of_shards_of_rois_are_those_of_the_whole(stages, tiny, count, tmp_path, manifest_path, neighbors_path,
                                                        proposals_path):  # fmt: skip
    made, folder = stages
    paths = shards(made["rois"], count, tmp_path)
    known = map(str, (manifest_path, neighbors_path, proposals_path))
    correspond(tiny, *known, paths[::-1], str(tmp_path / "pairs.h5"), workers=2)
    assert (tmp_path / "pairs.h5").read_bytes() == (folder / "correspondences.h5").read_bytes()


@pytest.mark.parametrize("memory", [1, 40_000])
def test_pairs_do_not_depend_on_the_memory_for_features(stages, memory, tmp_path, monkeypatch):
    made, folder = stages
    monkeypatch.setattr("orl.discovery.correspondences.MEMORY", memory)
    made["correspondences"](str(tmp_path / "pairs.h5"), None)
    assert (tmp_path / "pairs.h5").read_bytes() == (folder / "correspondences.h5").read_bytes()


@pytest.mark.parametrize("count", COUNTS)
def test_random_pairs_do_not_depend_on_shards_and_processes(stages, tiny, count, tmp_path, monkeypatch, manifest_path,
                                                            neighbors_path, proposals_path):  # fmt: skip
    made, folder = stages
    section = {"correspondences": {"method": "random", "ratio": 0.4}}
    random = parse(merge(tiny.model_dump(mode="json"), section))
    known = [*map(str, (manifest_path, neighbors_path, proposals_path))]
    correspond(random, *known, [str(folder / "rois.h5")], str(tmp_path / "whole.h5"))
    (tmp_path / "rois").mkdir()
    features = shards(made["rois"], count, tmp_path / "rois")
    monkeypatch.setattr("orl.discovery.correspondences.MEMORY", 40_000)
    paths = shards(lambda path, shard: correspond(random, *known, features, path, 1, shard), count, tmp_path)
    artifacts.merge(paths, tmp_path / "merged.h5")
    correspond(random, *known, features, str(tmp_path / "processes.h5"), workers=2)
    for name in ("merged", "processes"):
        assert (tmp_path / f"{name}.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_boxes_too_large_for_16_bits_in_one_shard_widen_the_merged_file(tmp_path):
    for number, side in ((1, 9), (2, 40_000)):
        part = artifacts.part(2, (number, 2))
        with artifacts.create(tmp_path / f"{number}.h5", artifacts.PROPOSALS, {}, {}, part) as file:
            file["box"] = np.array([[0, 0, side, 9]], np.int16 if side < 2**15 else np.int32)
            file["box_offsets"] = np.array([0, 1])
    artifacts.merge([tmp_path / "1.h5", tmp_path / "2.h5"], tmp_path / "merged.h5")
    found = artifacts.read_proposals(tmp_path / "merged.h5")
    assert found.box.tolist() == [[0, 0, 9, 9], [0, 0, 40_000, 9]]
    assert (found.box.dtype, found.box_offsets.tolist()) == (np.int32, [0, 1, 2])


# Odd sets


@pytest.fixture(scope="module")
def three(stages, tmp_path_factory):
    return shards(stages[0]["proposals"], 3, tmp_path_factory.mktemp("three"))


def refused(paths, tmp_path, match):
    with pytest.raises(InputError, match=match):
        artifacts.merge(paths, tmp_path / "merged.h5")
    assert list(tmp_path.glob("*merged*")) == []


def test_missing_shards(three, tmp_path):
    refused(three[:2], tmp_path, r"2.h5: rows 6 to 10 after it are missing; name every shard")
    refused(three[1:], tmp_path, r"2.h5: rows 0 to 3 before it are missing")
    refused(three[::2], tmp_path, r"3.h5: rows 3 to 6 before it are missing")


def test_a_shard_named_twice(three, tmp_path):
    refused([*three, three[1]], tmp_path, r"2.h5: rows 3 to 6 before it are there twice; name each shard once")


def test_shards_of_different_numbers(three, stages, tmp_path):
    (tmp_path / "two").mkdir()
    refused([*three[:2], shards(stages[0]["proposals"], 2, tmp_path / "two")[1]], tmp_path, "there twice")


def test_a_shard_of_other_settings(three, photos, tiny, manifest_path, tmp_path):
    other = parse(merge(tiny.model_dump(mode="json"), {"proposals": {"top_n": 3}}))
    path = str(tmp_path / "other.h5")
    propose(other, str(photos), str(manifest_path), path, shard=(2, 3))
    refused([three[0], path, three[2]], tmp_path, "other.h5: is of another run or other settings than .*1.h5")


def test_a_whole_file_among_shards(three, stages, tmp_path):
    refused([three[0], str(stages[1] / "proposals.h5")], tmp_path, "proposals.h5: is no shard")


def test_a_file_of_another_kind(model_folder, manifest_path, tmp_path):
    refused([str(model_folder / "model.safetensors")], tmp_path, "holds 'orl.model/1', of which there are no shards")
    refused([str(manifest_path)], tmp_path, "manifest.csv")


def test_a_damaged_shard(three, tmp_path):
    path = tmp_path / "2.h5"
    path.write_bytes(Path(three[1]).read_bytes()[:-20])
    refused([three[0], str(path), three[2]], tmp_path, f"{path}: damaged")


def test_a_shard_is_not_taken_for_the_whole(three):
    with pytest.raises(InputError, match=r"2.h5: is one shard; `orl merge` all of them"):
        artifacts.read_proposals(three[1])


def test_rois_of_which_a_shard_is_missing(stages, tiny, manifest_path, neighbors_path, proposals_path, tmp_path):
    paths = shards(stages[0]["rois"], 3, tmp_path)
    known = map(str, (manifest_path, neighbors_path, proposals_path))
    with pytest.raises(InputError, match=r"2.h5: rows 6 to 10 after it are missing"):
        correspond(tiny, *known, paths[:2], str(tmp_path / "pairs.h5"))


# What can go wrong in one of them


def test_a_photo_that_changed_stops_its_shard_alone(stages, photos, manifest, tiny, manifest_path, tmp_path):
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / str(manifest.path[5])).unlink()
    known = tiny, str(tmp_path / "photos"), str(manifest_path)
    propose(*known, str(tmp_path / "1.h5"), shard=(1, 3))
    propose(*known, str(tmp_path / "3.h5"), shard=(3, 3))
    with pytest.raises(InputError, match=f"{manifest.path[5]}: photo is gone"):
        propose(*known, str(tmp_path / "2.h5"), shard=(2, 3))
    assert not (tmp_path / "2.h5").exists()


class Small(torch.nn.Module):
    """A network for which more than `most` pictures at a time are too many, as a GPU says it."""

    def __init__(self, most):
        super().__init__()
        self.most, self.asked = most, []

    def forward(self, x):
        self.asked.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return x.mean((2, 3)) + 3


@pytest.mark.parametrize(("most", "asked"), [(64, [64, 20]), (20, [64, 32, 16, 16, 16, 16, 16, 4])])
def test_a_batch_too_large_for_the_gpu_is_halved(most, asked, capsys):
    network = Small(most)
    encoder = encode.Encoder(network, "w", "float32")
    encoder.most = 64
    pictures = torch.randint(0, 256, (84, 8, 8, 3), dtype=torch.uint8)
    names = [""] * 64
    rows = np.concatenate([encoder(pictures[:64], names), encoder(pictures[64:], names)])
    assert network.asked == asked
    from orl.networks.backbones import normalize

    means = normalize(pictures.permute(0, 3, 1, 2)).mean((2, 3)).numpy() + 3
    np.testing.assert_allclose(rows, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-5)
    said = capsys.readouterr().err
    assert ("going on with 16 pictures at a time" in said) == (most == 20)


def test_one_picture_too_large_for_the_gpu_is_one_sentence():
    with pytest.raises(InputError, match="too little memory for a single picture"):
        encode.Encoder(Small(0), "w", "float32")(torch.zeros((3, 8, 8, 3), dtype=torch.uint8), [""] * 3)


@pytest.mark.parametrize(("value", "what"), [(0.0, "nothing but zeros"), (float("nan"), "features that are not finite"),
                                             (float("inf"), "features that are not finite")])  # fmt: skip
def test_a_picture_of_which_nothing_comes_is_named(value, what):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0], [value, value * 0], [0, 2]])

    with pytest.raises(InputError, match=f"w: gives {what} for b;"):
        encode.Encoder(Odd(), "w", "float32")(torch.zeros((3, 8, 8, 3), dtype=torch.uint8), list("abc"))


def test_precision_is_what_the_network_computes_in():
    kinds = {}

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Conv2d(3, 4, 1)

        def forward(self, x):
            kinds[self.inner(x).dtype] = True
            return self.inner(x).mean((2, 3))

    pictures = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    for precision in ("auto", "float32", "bfloat16"):
        found = encode.Encoder(Watched(), "w", precision)(pictures, list("abc"))
        assert found.dtype == np.float32
    assert set(kinds) == {torch.float32, torch.bfloat16}
