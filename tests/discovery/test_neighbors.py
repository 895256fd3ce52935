import re

import numpy as np
import pytest

from orl import InputError, artifacts, config
from orl.discovery.neighbors import neighbors
from orl.discovery.search import search


def unit(count, dims=16, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dims))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write(folder, embedding, parts=None):
    """Paths of a manifest of photos that do not exist, and of their embeddings."""
    rows = [(row, f"{row}.jpg", 64, 64, 1, parts[row] if parts else "a") for row in range(len(embedding))]
    artifacts.write_csv(folder / "manifest.csv", artifacts.MANIFEST_COLUMNS, rows)
    made_from = {"manifest": artifacts.fingerprint(folder / "manifest.csv")}
    with artifacts.create(folder / "embeddings.h5", artifacts.EMBEDDINGS, {}, made_from) as file:
        file["embedding"] = embedding
    return str(folder / "manifest.csv"), str(folder / "embeddings.h5")


def run(folder, sources, threads=1, name="neighbors.h5", seed=0, **settings):
    neighbors(config.parse({"seed": seed, "neighbors": settings}), *sources, str(folder / name), threads)
    return artifacts.read_neighbors(folder / name)


@pytest.mark.parametrize(
    "settings",
    [{}, {"index": "IVF8,Flat", "parameters": "nprobe=3"}, {"index": "HNSW8"}, {"index": "IVF4_HNSW4,Flat"}],
)
def test_the_file(tmp_path, monkeypatch, settings):
    monkeypatch.setattr("orl.discovery.search.BATCH", 50)  # several, side by side
    sources = write(tmp_path, unit(400))
    run(tmp_path, sources, 1, "1.h5", **settings)
    found = run(tmp_path, sources, 2, "2.h5", **settings)
    index, similarity = search(unit(400), 10, settings.get("index", "Flat"), settings.get("parameters"))
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.similarity, similarity)
    assert (found.index.dtype, found.similarity.dtype) == (np.int32, np.float32)
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()
    for name, source in zip(("manifest", "embeddings"), sources, strict=True):
        artifacts.check_input(tmp_path / "1.h5", name, artifacts.fingerprint(source))


@pytest.mark.parametrize(("count", "k"), [(2, 1), (10, 9), (11, 10)])
def test_k_is_clipped_with_a_warning(tmp_path, capsys, count, k):
    assert run(tmp_path, write(tmp_path, unit(count))).index.shape == (count, k)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    warning = f"warning: neighbors.k is 10, but there are {count} photos; using {k} neighbours each"
    assert said == ([warning] if k < 10 else [])


# Scope

PARTS = ["a"] * 40 + ["b"] * 30 + ["c"] * 20  # in the order of the listing
MIXED = list(np.random.default_rng(0).permutation(PARTS))


@pytest.mark.parametrize("parts", [PARTS, MIXED])
@pytest.mark.parametrize("scope", ["all", "within", "across"])
@pytest.mark.parametrize("index", [{}, {"index": "IVF4,Flat", "parameters": "nprobe=4"}])
def test_neighbours_are_of_the_scope(tmp_path, parts, scope, index):
    embedding = unit(90)
    found = run(tmp_path, write(tmp_path, embedding, parts), scope=scope, k=7, **index)
    similarity = embedding.astype(np.float64) @ embedding.T.astype(np.float64)
    same = np.array(parts)[:, None] == np.array(parts)
    similarity[{"all": np.zeros((90, 90), bool), "within": ~same, "across": same}[scope]] = -2
    np.fill_diagonal(similarity, -2)
    np.testing.assert_array_equal(found.index, np.argsort(-similarity, 1)[:, :7])
    np.testing.assert_allclose(found.similarity, -np.sort(-similarity, 1)[:, :7], atol=1e-6)


@pytest.mark.parametrize(
    ("scope", "k", "why"),
    [("within", 1, "part 'b' has 2 photos"), ("across", 2, "2 photos are outside part 'a'")],
)
def test_k_is_that_of_the_smallest_part(tmp_path, capsys, scope, k, why):
    found = run(tmp_path, write(tmp_path, unit(8), ["a"] * 6 + ["b"] * 2), scope=scope)
    assert found.index.shape == (8, k)
    assert f"warning: neighbors.k is 10, but {why}; using {k} neighbours each\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scope", "parts", "why"),
    [("within", "aaab", "part 'b' has 1 photo"), ("across", "aaaa", "no photos are outside part 'a'")],
)
def test_a_photo_without_any_other_is_refused(tmp_path, scope, parts, why):
    with pytest.raises(InputError, match=f"^neighbors.scope: is '{scope}', but {why}; "):
        run(tmp_path, write(tmp_path, unit(4), list(parts)), scope=scope)


# Random neighbours


def allowed(parts, scope):
    """bool [photo, other]: whether one may be a neighbour of the other."""
    same = np.array(parts)[:, None] == np.array(parts)
    return {"all": np.full(same.shape, True), "within": same, "across": ~same}[scope] & ~np.eye(len(parts), dtype=bool)


@pytest.mark.parametrize("parts", [PARTS, MIXED])
@pytest.mark.parametrize("scope", ["all", "within", "across"])
def test_random_neighbours_are_different_ones_of_the_scope_with_their_similarities(tmp_path, parts, scope):
    embedding = unit(90)
    found = run(tmp_path, write(tmp_path, embedding, parts), scope=scope, k=7, method="random")
    assert (found.index.shape, found.index.dtype, found.similarity.dtype) == ((90, 7), np.int32, np.float32)
    similarity = embedding.astype(np.float64) @ embedding.T.astype(np.float64)
    for row, (others, values) in enumerate(zip(found.index, found.similarity, strict=True)):
        assert len(set(others.tolist())) == 7
        assert allowed(parts, scope)[row, others].all()
        np.testing.assert_allclose(values, similarity[row, others], atol=1e-6)
        assert (np.diff(values) <= 0).all()
    nearest = np.argsort(-np.where(allowed(parts, scope), similarity, -2), 1)[:, :7]
    assert np.mean([len(np.intersect1d(*pair)) / 7 for pair in zip(found.index, nearest, strict=True)]) < 0.6


def test_equally_similar_random_neighbours_come_in_their_order(tmp_path):
    embedding = np.repeat(unit(1, 4), 30, 0)
    found = run(tmp_path, write(tmp_path, embedding), k=5, method="random")
    assert (np.diff(found.index) > 0).all()


def test_random_neighbours_depend_on_the_seed_and_not_on_the_threads(tmp_path):
    sources = write(tmp_path, unit(50))
    for name, threads, seed in (("a.h5", 1, 3), ("b.h5", 2, 3), ("c.h5", 1, 4)):
        run(tmp_path, sources, threads, name, seed, method="random")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    one, other = (artifacts.read_neighbors(tmp_path / name).index for name in ("a.h5", "c.h5"))
    assert np.mean([len(np.intersect1d(*pair)) for pair in zip(one, other, strict=True)]) < 4  # of 10; 2 by chance
    assert "recall" not in artifacts.attributes(tmp_path / "a.h5")


@pytest.mark.parametrize("scope", ["all", "within", "across"])
def test_every_other_photo_is_equally_likely_a_random_neighbour(tmp_path, scope):
    """Chi-squared over many seeds, as a share of what is expected: 1, give or take 0.09 at most."""
    parts = ["a"] * 14 + ["b", "a"] * 8
    sources, counts = write(tmp_path, unit(30), parts), np.zeros((30, 30))
    for seed in range(100):
        for row, others in enumerate(run(tmp_path, sources, seed=seed, scope=scope, k=3, method="random").index):
            counts[row, others] += 1
    may = allowed(parts, scope)
    assert counts[~may].sum() == 0
    chance = (3 / may.sum(1))[:, None]
    squares = (counts - 100 * chance) ** 2 / (100 * chance * (1 - chance))
    assert 0.7 < squares[may].mean() < 1.3


def test_all_others_are_random_neighbours_where_there_are_no_more(tmp_path, capsys):
    found = run(tmp_path, write(tmp_path, unit(4)), method="random")
    assert [sorted(row) for row in found.index.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert "using 3 neighbours each" in capsys.readouterr().err


def test_random_neighbours_of_embeddings_that_are_no_directions_are_refused(tmp_path):
    with pytest.raises(InputError, match="instead of 1"):
        run(tmp_path, write(tmp_path, unit(20) * np.float32(2)), method="random")


# Recall


def recall(folder):
    return artifacts.attributes(folder / "neighbors.h5").get("recall")


@pytest.mark.parametrize("scope", ["all", "within", "across"])
def test_recall_is_the_share_of_the_true_neighbours(tmp_path, capsys, scope):
    sources = write(tmp_path, unit(300), ["a", "b"] * 150)
    exact = run(tmp_path, sources, scope=scope)
    assert recall(tmp_path) is None
    found = run(tmp_path, sources, scope=scope, index="IVF8,Flat")
    share = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(found.index, exact.index, strict=True)])
    assert share < 1
    assert recall(tmp_path) == f"{share:.4f}"
    said = f"recall of IVF8,Flat: {share:.4f} of the 10 nearest, measured on 300 photos\n"
    assert said in capsys.readouterr().err
    run(tmp_path, sources, scope=scope, index="IVF8,Flat", parameters="nprobe=8")
    assert recall(tmp_path) == "1.0000"


def test_recall_of_many_photos_is_that_of_some(tmp_path, capsys):
    sources = write(tmp_path, unit(1200))
    exact = run(tmp_path, sources).index
    found = run(tmp_path, sources, index="IVF8,Flat").index
    assert "nearest, measured on 1000 photos\n" in capsys.readouterr().err
    share = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(found, exact, strict=True)])
    assert abs(float(recall(tmp_path)) - share) < 0.03


# Bad input


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (np.nan, "is not finite"),
        (np.inf, "is not finite"),
        (-np.inf, "is not finite"),
        (1e30, "is not finite"),  # its square
        (0, "has length 0 instead of 1"),
        ([0.6, 0.803, 0, 0], "has length 1.002 instead of 1"),
    ],
)
def test_embeddings_that_are_no_directions_are_refused(tmp_path, bad, said, monkeypatch):
    monkeypatch.setattr("orl.discovery.neighbors.BATCH", 6)
    embedding = unit(20, 4)
    embedding[[13, 17]] = bad
    path = re.escape(str(tmp_path / "embeddings.h5"))
    with pytest.raises(InputError, match=f"^{path}: the embedding of '13.jpg' {said}; make it again"):
        run(tmp_path, write(tmp_path, embedding))
    assert not (tmp_path / "neighbors.h5").exists()


def test_float32_rounding_of_unit_rows_is_no_fault(tmp_path):
    run(tmp_path, write(tmp_path, unit(20) * np.float32(1.0009)))


def test_embeddings_of_other_photos_are_refused(tmp_path):
    manifest, embeddings = write(tmp_path, unit(12))
    with open(manifest, "a") as file:
        file.write("12,12.jpg,64,64,1,a\n")
    with pytest.raises(InputError, match=r"embeddings.h5: has 12 rows, but .*manifest.csv has 13"):
        run(tmp_path, (manifest, embeddings))
    (tmp_path / "other").mkdir()
    other, _ = write(tmp_path / "other", unit(12), ["b"] * 12)
    with pytest.raises(InputError, match=r"embeddings.h5: was made from another manifest"):
        run(tmp_path, (other, embeddings))


def test_an_index_for_more_photos_than_the_smallest_part_has_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("orl.discovery.neighbors.search", None)
    sources = write(tmp_path, unit(60), ["a"] * 50 + ["b"] * 10)
    with pytest.raises(InputError, match=r"'IVF16,Flat' needs at least 16 photos to search among, .* there are 10;"):
        run(tmp_path, sources, index="IVF16,Flat", scope="within", k=3)
