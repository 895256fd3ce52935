import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl import InputError, artifacts, config
from orl.discovery.neighbors import SPARE, neighbors, search


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def expected_search(embedding, k):
    """Every similarity in float64, sorted by (similarity, lower index)."""
    similarity = embedding.astype(np.float64) @ embedding.astype(np.float64).T
    index = [
        sorted((j for j in range(len(embedding)) if j != i), key=lambda j: (-similarity[i, j], j))[:k]
        for i in range(len(embedding))
    ]
    return np.array(index), np.take_along_axis(similarity, np.array(index), 1)


@pytest.fixture(autouse=True)
def _one_thread():
    faiss.omp_set_num_threads(1)


@given(st.data())
@settings(max_examples=60)
def test_ties_go_to_the_lower_index(data):
    """Rows with entries 0 and 1/2, of which the products are exact: many duplicates and ties."""
    count, dims = data.draw(st.integers(2, 60)), data.draw(st.integers(4, 7))
    k = data.draw(st.integers(1, count - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    embedding = np.zeros((count, dims), np.float32)
    for row in embedding:
        row[rng.choice(dims, 4, replace=False)] = rng.choice([-0.5, 0.5], 4, p=[0.2, 0.8])
    index, similarity = search(embedding, k)
    expected_index, expected = expected_search(embedding, k)
    assert (index.dtype, similarity.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(similarity, expected)


@given(st.data())
@settings(max_examples=60)
def test_as_brute_force(data):
    count, dims = data.draw(st.integers(2, 80)), data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, count - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    embedding = unit(rng.standard_normal((count, dims)))
    if data.draw(st.booleans()):  # each row several times
        embedding = embedding[rng.integers(0, max(1, count // 4), count)]
    index, similarity = search(embedding, k)
    _, expected = expected_search(embedding, k)
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    products = embedding.astype(np.float64) @ embedding.T.astype(np.float64)
    np.testing.assert_allclose(np.take_along_axis(products, index.astype(int), 1), similarity, atol=1e-6)
    for row, (own, values) in enumerate(zip(index, similarity, strict=True)):
        assert row not in own
        assert len(set(own.tolist())) == k
        assert (np.diff(values) <= 0).all()
        assert (np.diff(own)[np.diff(values) == 0] > 0).all()


@pytest.mark.parametrize("copies", [SPARE + 1, SPARE + 2, 60, 150])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_many_exact_duplicates(copies, k):
    """More copies than FAISS is first asked for: the lowest indices must still be found."""
    rng = np.random.default_rng(0)
    embedding = unit(rng.standard_normal((200, 32)))
    places = np.sort(rng.choice(200, copies, replace=False))
    embedding[places] = embedding[places[0]]
    index, similarity = search(embedding, k)
    for place in places:
        copies_first = [other for other in places if other != place][:k]
        assert index[place, : len(copies_first)].tolist() == copies_first
        np.testing.assert_allclose(similarity[place, : len(copies_first)], 1, atol=1e-6)


def test_zero_vectors_are_similar_to_nothing():
    embedding = unit(np.random.default_rng(0).random((30, 8)))  # all similar to each other
    embedding[[3, 7]] = 0
    index, similarity = search(embedding, 4)
    assert index[3].tolist() == [0, 1, 2, 4]
    assert similarity[3].tolist() == [0] * 4
    others = np.delete(index, [3, 7], 0)
    assert not np.isin(others, [3, 7]).any()


def test_batches_do_not_matter(monkeypatch):
    embedding = unit(np.random.default_rng(0).standard_normal((50, 16)))
    expected = search(embedding, 7)
    monkeypatch.setattr("orl.discovery.neighbors.BATCH", 3)
    for found, one in zip(search(embedding, 7), expected, strict=True):
        np.testing.assert_array_equal(found, one)


# The file


def write(path, embedding):
    with artifacts.create(path, artifacts.EMBEDDINGS, {}, {}) as file:
        file["embedding"] = embedding
    return str(path)


def test_the_file(tmp_path):
    embedding = unit(np.random.default_rng(0).standard_normal((40, 16)))
    source = write(tmp_path / "embeddings.h5", embedding)
    for threads in (1, 2):
        neighbors(config.parse({}), source, str(tmp_path / f"{threads}.h5"), threads)
    found = artifacts.read_neighbors(tmp_path / "1.h5")
    index, similarity = search(embedding, 10)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.similarity, similarity)
    assert (found.index.dtype, found.similarity.dtype) == (np.int32, np.float32)
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()
    artifacts.check_input(tmp_path / "1.h5", "embeddings", artifacts.fingerprint(source))


@pytest.mark.parametrize(("count", "k"), [(2, 1), (10, 9), (11, 10)])
def test_k_is_clipped_with_a_warning(tmp_path, capsys, count, k):
    source = write(tmp_path / "embeddings.h5", unit(np.random.default_rng(0).standard_normal((count, 4))))
    neighbors(config.parse({}), source, str(tmp_path / "neighbors.h5"))
    assert artifacts.read_neighbors(tmp_path / "neighbors.h5").index.shape == (count, k)
    warning = f"warning: neighbors.k is 10, but there are {count} photos; using {k} neighbours each\n"
    assert capsys.readouterr().err == (warning if k < 10 else "")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(tmp_path, bad):
    embedding = unit(np.random.default_rng(0).standard_normal((20, 4)))
    embedding[13, 2] = bad
    source = write(tmp_path / "embeddings.h5", embedding)
    with pytest.raises(InputError, match=r"embeddings.h5: holds values that are not finite"):
        neighbors(config.parse({}), source, str(tmp_path / "neighbors.h5"))
    assert not (tmp_path / "neighbors.h5").exists()
