import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl import InputError, artifacts, config
from orl.discovery.correspondences import correspond, top_pairs


def expected_pairs(query, key, ratio):
    """Every entry of the cosine matrix, sorted by (similarity, flat index)."""
    entries = [
        (-math.fsum(np.float64(one) * np.float64(other)), i * len(key) + j)
        for i, one in enumerate(query)
        for j, other in enumerate(key)
    ]
    best = sorted(entries)[: max(1, int(ratio * len(query)))]
    return [flat // len(key) for _, flat in best], [flat % len(key) for _, flat in best], [-value for value, _ in best]


@given(st.data())
@settings(max_examples=150)
def test_ties_go_to_the_lower_flat_index(data):
    """Unit rows with entries 0 and 1/2, of which the products are exact: many ties."""
    counts, dims = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30))), data.draw(st.integers(4, 6))
    ratio = data.draw(st.sampled_from([0.001, 0.1, 0.29, 0.5, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rows = np.zeros((sum(counts), dims), data.draw(st.sampled_from([np.float16, np.float32])))
    for row in rows:
        row[rng.choice(dims, 4, replace=False)] = rng.choice([-0.5, 0.5], 4, p=[0.2, 0.8])
    query, key = rows[: counts[0]], rows[counts[0] :]
    found = top_pairs(query, key, ratio)
    assert tuple(part.tolist() for part in found) == expected_pairs(query, key, ratio)
    assert found[2].dtype == np.float32


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=60)
def test_as_a_full_sort(queries, keys, seed):
    rng = np.random.default_rng(seed)
    query, key = (rng.standard_normal((count, 32)) for count in (queries, keys))
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    here, there, similarity = top_pairs(query.astype(np.float32), key.astype(np.float32))
    expected = expected_pairs(query, key, 0.1)
    assert (here.tolist(), there.tolist()) == expected[:2]
    np.testing.assert_allclose(similarity, expected[2], atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=60)
def test_equal_rows_tie(queries, keys, seed):
    """As those of two copies of a photo do, however a matrix product rounds."""
    rng = np.random.default_rng(seed)
    rows = np.abs(rng.standard_normal((5, 64)))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    query, key = rows[rng.integers(0, 5, queries)], rows[rng.integers(0, 5, keys)]
    here, there, _ = top_pairs(query, key, 0.5)
    assert (here.tolist(), there.tolist()) == expected_pairs(query, key, 0.5)[:2]


@pytest.mark.parametrize(
    ("count", "ratio", "pairs"),
    [(1, 0.1, 1), (9, 0.1, 1), (10, 0.1, 1), (19, 0.1, 1), (20, 0.1, 2), (100, 0.1, 10), (3, 1.0, 3), (100, 0.29, 28)],
)
def test_the_number_of_pairs_is_a_share_of_the_querys_rois(count, ratio, pairs):
    """int(0.29 * 100) is 28."""
    rng = np.random.default_rng(0)
    for keys in (1, 7):
        assert [len(part) for part in top_pairs(rng.random((count, 4)), rng.random((keys, 4)), ratio)] == [pairs] * 3


# The file

COUNTS = [1, 27, 10, 40]  # RoIs of each photo
NEIGHBOR = np.array([[1, 3], [0, 2], [3, 1], [2, 0]], np.int32)


@pytest.fixture
def files(tmp_path):
    """Paths of a manifest, neighbours, proposals and RoI features that belong together."""
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / name) for name in ("manifest.csv", "neighbors.h5", "proposals.h5", "rois.h5")]
    rows = [(str(number), f"{number}.jpg", 200, 100, 5, "") for number in range(4)]
    artifacts.write_csv(paths[0], artifacts.MANIFEST_COLUMNS, rows)
    origin = {"manifest": artifacts.fingerprint(paths[0])}
    with artifacts.create(paths[1], artifacts.NEIGHBORS, {}, origin) as file:
        file["index"], file["similarity"] = NEIGHBOR, np.ones((4, 2), np.float32)
    with artifacts.create(paths[2], artifacts.PROPOSALS, {}, origin) as file:
        file["box"] = np.array([[0, 0, 9, 9]] * sum(COUNTS), np.int16)
        file["box_offsets"] = np.cumsum([0, *COUNTS])
    feature = rng.standard_normal((sum(COUNTS), 16))
    feature /= np.linalg.norm(feature, axis=1, keepdims=True)
    with artifacts.create(paths[3], artifacts.ROIS, {}, {"proposals": artifacts.fingerprint(paths[2])}) as file:
        file["feature"] = feature.astype(np.float16)
    return paths


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_the_file_holds_the_pairs_of_each_photo_and_neighbour(files, tmp_path, ratio):
    output = tmp_path / "correspondences.h5"
    correspond(config.parse({"correspondences": {"ratio": ratio}}), *files[:3], files[3:], str(output))
    found, feature = artifacts.read_correspondences(output), artifacts.read_rois(files[3]).feature
    dtypes = [found.neighbor.dtype, found.pair.dtype, found.similarity.dtype, found.pair_offsets.dtype]
    assert dtypes == [np.int32, np.uint16, np.float16, np.int64]
    np.testing.assert_array_equal(found.neighbor, NEIGHBOR)
    assert (found.pair_offsets.shape, found.pair_offsets[0], found.pair_offsets[-1]) == ((9,), 0, len(found.pair))
    own = np.split(feature, np.cumsum(COUNTS)[:-1])
    for row, others in enumerate(NEIGHBOR):
        for slot, other in enumerate(others):
            here = slice(*found.pair_offsets[2 * row + slot : 2 * row + slot + 2])
            query, key, similarity = expected_pairs(own[row], own[other], ratio)
            assert found.pair[here].tolist() == [list(pair) for pair in zip(query, key, strict=True)]
            np.testing.assert_allclose(found.similarity[here], similarity, atol=1e-3)
    for name, path in zip(("neighbors", "proposals", "rois"), files[1:], strict=True):
        artifacts.check_input(output, name, artifacts.fingerprint(path))


def test_equal_inputs_make_equal_files(files, tmp_path):
    for name in "ab":
        correspond(config.parse({}), *files[:3], files[3:], str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def refused(files, tmp_path, match):
    with pytest.raises(InputError, match=match):
        correspond(config.parse({}), *files[:3], files[3:], str(tmp_path / "new.h5"))
    assert not (tmp_path / "new.h5").exists()


def test_rois_of_other_proposals_are_refused(files, tmp_path):
    """As many boxes, other settings."""
    old = artifacts.read_proposals(files[2])
    origin = {"manifest": artifacts.fingerprint(files[0])}
    with artifacts.create(tmp_path / "p.h5", artifacts.PROPOSALS, {"top_n": 3}, origin) as file:
        file["box"], file["box_offsets"] = old.box, old.box_offsets
    refused([*files[:2], str(tmp_path / "p.h5"), files[3]], tmp_path, "rois.h5: was made from another proposals")


def test_proposals_of_another_manifest_are_refused(files, tmp_path):
    lines = (tmp_path / "manifest.csv").read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text("".join([lines[0], *reversed(lines[1:])]))
    refused([str(tmp_path / "other.csv"), *files[1:]], tmp_path, "another manifest")


def test_files_of_another_number_of_photos_are_refused(files, tmp_path):
    lines = (tmp_path / "manifest.csv").read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text("".join(lines[:-1]))
    origin = {"manifest": artifacts.fingerprint(tmp_path / "other.csv")}
    with artifacts.create(tmp_path / "p.h5", artifacts.PROPOSALS, {}, origin) as file:
        file["box"], file["box_offsets"] = np.ones((3, 4), np.int16), np.arange(4)
    others = [str(tmp_path / "other.csv"), files[1], str(tmp_path / "p.h5"), files[3]]
    refused(others, tmp_path, "neighbors.h5: was made from another manifest")
    with artifacts.create(files[1], artifacts.NEIGHBORS, {}, origin) as file:
        file["index"], file["similarity"] = NEIGHBOR, np.ones((4, 2), np.float32)
    refused(others, tmp_path, "neighbors.h5: has 4 rows, but .*p.h5 has 3")


def test_rois_of_another_number_of_boxes_are_refused(files, tmp_path):
    with artifacts.create(files[3], artifacts.ROIS, {}, {"proposals": artifacts.fingerprint(files[2])}) as file:
        file["feature"] = np.ones((3, 16), np.float16)
    refused(files, tmp_path, "rois.h5: has 3 rows, but .*proposals.h5 has 78")


# Random pairs


def random_pairs(files, path, ratio=0.1, seed=0, **options):
    settings = config.parse({"seed": seed, "correspondences": {"method": "random", "ratio": ratio}})
    correspond(settings, *files[:3], files[3:], str(path), **options)
    return artifacts.read_correspondences(path)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.29, 1.0])
def test_random_pairs_are_as_many_different_ones_with_their_similarities(files, tmp_path, ratio):
    correspond(config.parse({"correspondences": {"ratio": ratio}}), *files[:3], files[3:], str(tmp_path / "similar.h5"))
    similar = artifacts.read_correspondences(tmp_path / "similar.h5")
    found = random_pairs(files, tmp_path / "random.h5", ratio)
    np.testing.assert_array_equal(found.neighbor, NEIGHBOR)
    np.testing.assert_array_equal(found.pair_offsets, similar.pair_offsets)
    for name in artifacts.LAYOUT[artifacts.CORRESPONDENCES]:
        assert getattr(found, name).dtype == getattr(similar, name).dtype
    own = np.split(artifacts.read_rois(files[3]).feature.astype(np.float64), np.cumsum(COUNTS)[:-1])
    for slot, other in enumerate(NEIGHBOR.ravel()):
        query, key = own[slot // 2], own[other]
        here = slice(*found.pair_offsets[slot : slot + 2])
        flat = found.pair[here].astype(int) @ [len(key), 1]
        assert len(set(flat.tolist())) == len(flat)
        assert (found.pair[here] < [len(query), len(key)]).all()
        np.testing.assert_allclose(found.similarity[here], (query @ key.T).ravel()[flat], atol=1e-3)
        assert (np.diff(found.similarity[here]) <= 0).all()
    assert found.similarity.mean() < similar.similarity.mean() - 0.1


def test_all_pairs_are_taken_where_there_are_no_more(files, tmp_path):
    """Of photo 1's 27 RoIs with the one of photo 0."""
    found = random_pairs(files, tmp_path / "r.h5", 1.0)
    here = slice(*found.pair_offsets[2:4])
    assert sorted(found.pair[here].tolist()) == [[number, 0] for number in range(27)]


def test_random_pairs_depend_on_the_seed(files, tmp_path):
    for name, seed in (("a.h5", 3), ("b.h5", 3), ("c.h5", 4)):
        random_pairs(files, tmp_path / name, 0.5, seed)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    one, other = (artifacts.read_correspondences(tmp_path / name).pair for name in ("a.h5", "c.h5"))
    assert (one != other).any(1).mean() > 0.8


def test_every_pair_is_equally_likely_a_random_one(files, tmp_path):
    """Chi-squared over many seeds, as a share of what is expected."""
    counts = [np.zeros((COUNTS[slot // 2], COUNTS[other])) for slot, other in enumerate(NEIGHBOR.ravel())]
    for seed in range(100):
        found = random_pairs(files, tmp_path / "r.h5", 0.5, seed)
        for slot, count in enumerate(counts):
            here, there = found.pair[found.pair_offsets[slot] : found.pair_offsets[slot + 1]].T
            count[here, there] += 1
    for count in counts:
        chance = max(1, count.shape[0] // 2) / count.size
        squares = (count - 100 * chance) ** 2 / (100 * chance * (1 - chance))
        assert abs(squares.mean() - 1) < 5 * np.sqrt(2 / count.size)
