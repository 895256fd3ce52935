import re

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orl import InputError
from orl.discovery.search import BATCH, SPARE, empty, search

# Indexes that find everything, and such as do not.
COMPLETE = [("Flat", None), ("IVF4,Flat", "nprobe=4"), ("HNSW8", "efSearch=500"), ("IVF2,SQ8", "nprobe=2")]
PARTIAL = [("IVF4,Flat", None), ("HNSW2", None), ("IVF4_HNSW4,PQ4x4", "nprobe=2"), ("PCA8,PQ4x4", None)]


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def random_unit(count, dims, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((count, dims)))


def halves(count, dims, seed=0):
    """Rows with entries 0 and 1/2, of which the products are exact: many duplicates and ties."""
    rng = np.random.default_rng(seed)
    embedding = np.zeros((count, dims), np.float32)
    for row in embedding:
        row[rng.choice(dims, 4, replace=False)] = rng.choice([-0.5, 0.5], 4, p=[0.2, 0.8])
    return embedding


def expected_search(embedding, k, rows=None, pool=None):
    """Every similarity in float64, sorted by (similarity, lower index)."""
    similarity = embedding.astype(np.float64) @ embedding.astype(np.float64).T
    everything = range(len(embedding))
    rows, pool = (everything if given is None else given for given in (rows, pool))
    index = np.array([sorted((j for j in pool if j != i), key=lambda j: (-similarity[i, j], j))[:k] for i in rows])
    return index, similarity[np.array(rows)[:, None], index]


@pytest.fixture
def small(monkeypatch):
    """Batches and pieces so small that a few rows need several."""
    for name, value in (("BATCH", 7), ("PIECE", 4 * 16 * 11), ("GATHER", 500), ("TOGETHER", 3)):
        monkeypatch.setattr(f"orl.discovery.search.{name}", value)


# Exact search


@given(st.data())
@settings(max_examples=60)
def test_ties_go_to_the_lower_index(data):
    count, dims = data.draw(st.integers(2, 60)), data.draw(st.integers(4, 7))
    k = data.draw(st.integers(1, count - 1))
    embedding = halves(count, dims, data.draw(st.integers(0, 1000)))
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


@pytest.mark.parametrize(("kind", "parameters"), COMPLETE)
@pytest.mark.parametrize("copies", [SPARE + 1, SPARE + 2, 60, 150])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_many_exact_duplicates(copies, k, kind, parameters):
    """More copies than FAISS is asked for: the lowest indices must still be found."""
    embedding = random_unit(200, 32)
    places = np.sort(np.random.default_rng(0).choice(200, copies, replace=False))
    embedding[places] = embedding[places[0]]
    index, similarity = search(embedding, k, kind, parameters)
    for place in places:
        copies_first = [other for other in places if other != place][:k]
        assert index[place, : len(copies_first)].tolist() == copies_first
        np.testing.assert_allclose(similarity[place, : len(copies_first)], 1, atol=1e-6)


def test_rows_that_are_all_equal():
    index, _ = search(np.repeat(random_unit(1, 16), 300, 0), 5)
    assert index[0].tolist() == [1, 2, 3, 4, 5]
    assert index[3].tolist() == [0, 1, 2, 4, 5]
    assert (index[5:] == range(5)).all()


@pytest.mark.parametrize("spread", [1e-3, 1e-4, 1e-7])
def test_similarities_closer_than_float32_products_can_tell(spread):
    """Rows about one direction: which of them are nearest, products as FAISS computes them cannot tell."""
    rng = np.random.default_rng(0)
    embedding = unit(rng.standard_normal((1, 64)) + spread * rng.standard_normal((400, 64)))
    _, expected = expected_search(embedding, 5)
    _, similarity = search(embedding, 5)
    np.testing.assert_allclose(similarity, expected, atol=1e-7)  # one step of float32


def test_zero_vectors_are_similar_to_nothing():
    embedding = unit(np.random.default_rng(0).random((30, 8)))  # all similar to each other
    embedding[[3, 7]] = 0
    index, similarity = search(embedding, 4)
    assert index[3].tolist() == [0, 1, 2, 4]
    assert similarity[3].tolist() == [0] * 4
    others = np.delete(index, [3, 7], 0)
    assert not np.isin(others, [3, 7]).any()


def test_the_embedding_is_neither_copied_nor_changed(tmp_path, monkeypatch):
    np.save(tmp_path / "rows.npy", random_unit(300, 16))
    embedding = np.load(tmp_path / "rows.npy", mmap_mode="r")
    given, knn = [], faiss.knn
    monkeypatch.setattr(
        faiss, "knn", lambda queries, keys, *rest, **more: given.append(keys) or knn(queries, keys, *rest, **more)
    )
    search(embedding, 3)
    search(embedding, 3, rows=np.arange(100, 200), pool=np.arange(100, 200))
    assert len(given) == 2
    assert all(np.shares_memory(embedding, keys) for keys in given)


# Approximate search


@given(st.data())
@settings(max_examples=40)
def test_an_index_that_looks_everywhere_finds_what_exact_search_finds(data):
    kind, parameters = data.draw(st.sampled_from(COMPLETE))
    count, dims = data.draw(st.integers(4, 80)), data.draw(st.integers(4, 12))
    k = data.draw(st.integers(1, count - 1))
    seed = data.draw(st.integers(0, 1000))
    ties = data.draw(st.booleans()) and kind in ("Flat", "IVF4,Flat")
    embedding = halves(count, dims, seed) if ties else random_unit(count, dims, seed)
    for found, expected in zip(search(embedding, k, kind, parameters), search(embedding, k), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("kind", "parameters"), PARTIAL)
@pytest.mark.parametrize("k", [3, 60])
def test_what_an_approximate_index_finds_are_neighbours(kind, parameters, k):
    embedding = random_unit(400, 16)
    index, similarity = search(embedding, k, kind, parameters)
    products = embedding.astype(np.float64) @ embedding.T.astype(np.float64)
    np.testing.assert_allclose(np.take_along_axis(products, index.astype(int), 1), similarity, atol=1e-6)
    assert (np.diff(similarity, axis=1) <= 0).all()
    assert all(row not in own and len(set(own)) == k for row, own in enumerate(index.tolist()))
    exact, _ = search(embedding, k)
    recall = np.mean([len(np.intersect1d(*pair)) / k for pair in zip(index, exact, strict=True)])
    assert 0.2 < recall < 1


def test_rows_for_which_an_index_finds_too_few_are_searched_exactly(capsys):
    """Lists of very different lengths, of which one is searched: what lies in a short one has few others there."""
    rng = np.random.default_rng(0)
    far = np.eye(8)[[0] * 200 + [1] * 3 + [2] * 200 + [3] * 5]
    embedding = unit(far + 0.05 * rng.standard_normal(far.shape))
    index, similarity = search(embedding, 10, "IVF4,Flat", "nprobe=1")
    said = re.search(
        r"^IVF4,Flat finds fewer than 10 for (\d+) photos: searching", capsys.readouterr().err, re.MULTILINE
    )
    assert int(said[1]) >= 8
    alone = [200, 201, 202, 403, 404, 405, 406, 407]
    expected_index, expected = expected_search(embedding, 10)
    np.testing.assert_array_equal(index[alone], expected_index[alone])
    np.testing.assert_allclose(similarity[alone], expected[alone], atol=1e-6)


@pytest.mark.parametrize(("kind", "parameters"), [*COMPLETE, *PARTIAL])
def test_threads_do_not_matter(kind, parameters, monkeypatch):
    monkeypatch.setattr("orl.discovery.search.BATCH", 100)  # several, side by side
    embedding = random_unit(1000, 32)
    expected = search(embedding, 6, kind, parameters)
    for found, one in zip(search(embedding, 6, kind, parameters, threads=3), expected, strict=True):
        np.testing.assert_array_equal(found, one)


def test_every_call_of_faiss_has_one_thread(monkeypatch):
    """Sums of float32 and HNSW's graph depend on the number of threads."""
    calls = []

    def record(owner, name):
        call = getattr(owner, name)

        def recorded(*given, **named):
            calls.append((name, faiss.omp_get_max_threads()))
            return call(*given, **named)

        monkeypatch.setattr(owner, name, recorded)

    record(faiss, "knn")
    for kind in (faiss.IndexHNSWFlat, faiss.IndexIVFFlat):
        for name in ("train", "add", "search"):
            record(kind, name)
    for kind in ("Flat", "HNSW4", "IVF4,Flat"):
        faiss.omp_set_num_threads(3)
        search(random_unit(200, 8), 3, kind, threads=3)
    assert {name for name, _ in calls} == {"knn", "train", "add", "search"}
    assert {threads for _, threads in calls} == {1}


def test_an_index_is_trained_on_a_fixed_sample(monkeypatch):
    monkeypatch.setattr("orl.discovery.search.TRAINED", 0)
    trained, train = [], faiss.IndexIVFFlat.train
    monkeypatch.setattr(faiss.IndexIVFFlat, "train", lambda index, rows: trained.append(rows) or train(index, rows))
    for _ in range(2):
        search(random_unit(1000, 8), 3, "IVF4,Flat", pool=np.arange(200, 1000))
    assert len(trained[0]) == 256
    np.testing.assert_array_equal(*trained)
    assert len(np.unique(trained[0], axis=0)) == 256
    assert (trained[0][:, None] == random_unit(1000, 8)[200:]).all(-1).any(1).all()


def test_ties_of_rows_for_which_an_index_finds_too_few():
    embedding = np.eye(8, dtype=np.float32)[[0] * 60 + [1] * 3]
    index, _ = search(embedding, 10, "IVF2,Flat", "nprobe=1")
    assert index[60:].tolist() == [[61, 62, *range(8)], [60, 62, *range(8)], [60, 61, *range(8)]]


@pytest.mark.parametrize(("kind", "parameters"), COMPLETE)
@pytest.mark.parametrize("make", [random_unit, halves])
def test_batches_do_not_matter(make, kind, parameters, request):
    embedding = make(150, 16)
    expected = search(embedding, 7)
    request.getfixturevalue("small")
    for found, one in zip(search(embedding, 7, kind, parameters), expected, strict=True):
        np.testing.assert_array_equal(found, one)


@given(st.data())
@settings(max_examples=40)
def test_some_rows_among_some_rows(data):
    """Pools in one piece and in many, with and without the rows themselves."""
    count = data.draw(st.integers(10, 60))
    embedding = halves(count, 6, data.draw(st.integers(0, 1000)))
    pool = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=4))))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    k = data.draw(st.integers(1, len(pool) - 1))
    kind, parameters = data.draw(st.sampled_from(COMPLETE[:2]))
    found = search(embedding, k, kind, parameters, rows, pool)
    for one, expected in zip(found, expected_search(embedding, k, rows, pool), strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.usefixtures("small")
def test_a_pool_in_many_runs_and_pieces():
    embedding = halves(120, 16)
    rows, pool = np.arange(0, 120, 3), np.flatnonzero(np.arange(120) % 3)
    for one, expected in zip(
        search(embedding, 9, rows=rows, pool=pool), expected_search(embedding, 9, rows, pool), strict=True
    ):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU")
@pytest.mark.parametrize(("kind", "parameters"), [*COMPLETE, *PARTIAL, ("IVF16,PQ8", "nprobe=16")])
def test_on_a_gpu_as_on_the_cpu(kind, parameters, monkeypatch, capsys):
    embedding = random_unit(3 * BATCH, 32)
    monkeypatch.setattr("orl.discovery.search.PIECE", 4 * 32 * 5000)  # several pieces
    found = search(embedding, 10, kind, parameters)
    said = capsys.readouterr().err
    assert ("stays on the CPU" in said) == (kind not in ("Flat", "IVF4,Flat", "IVF2,SQ8", "IVF16,PQ8"))
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    expected = search(embedding, 10, kind, parameters)
    if (kind, parameters) in COMPLETE[:2]:
        np.testing.assert_array_equal(found, expected)
    same = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(found[0], expected[0], strict=True)])
    assert same > 0.5


# Bad input


@pytest.mark.parametrize(
    ("kind", "parameters", "sentence"),
    [
        ("XYZ", None, "neighbors.index: FAISS has no 'XYZ' for embeddings of 16 numbers (could not parse index string"),
        ("IVF4,PQ5", None, "neighbors.index: FAISS has no 'IVF4,PQ5' for embeddings of 16 numbers (The dimension of"),
        ("LSH", None, "neighbors.index: FAISS has no 'LSH' for embeddings of 16 numbers (Error: 'metric == METRIC_L2'"),
        ("IVF4096,Flat", None, "neighbors.index: 'IVF4096,Flat' needs at least 4096 photos to search among, one per"),
        ("IVF4,PQ4", None, "neighbors.index: 'IVF4,PQ4' needs at least 256 photos to search among, one per centroid"),
        ("OPQ4,IVF4,PQ4", None, "neighbors.index: 'OPQ4,IVF4,PQ4' needs at least 256 photos"),
        ("HNSW8,PQ4", None, "neighbors.index: 'HNSW8,PQ4' needs at least 256 photos"),
        ("IVF4,PQ4,RFlat", None, "neighbors.index: 'IVF4,PQ4,RFlat' needs at least 256 photos"),
        ("IVF500_HNSW4,Flat", None, "neighbors.index: 'IVF500_HNSW4,Flat' needs at least 500 photos"),
        ("RQ4x8", None, "neighbors.index: FAISS cannot fill 'RQ4x8' with 100 photos"),
        ("IVF4,Flat", "efSearch=9", "neighbors.parameters: 'efSearch=9' are not for 'IVF4,Flat' ("),
        ("IVF4,Flat", "nprobe=2,x=9", "neighbors.parameters: 'nprobe=2,x=9' are not for 'IVF4,Flat' (ParameterSpace"),
    ],
)
def test_indexes_that_cannot_be_made(kind, parameters, sentence):
    with pytest.raises(InputError, match="^" + re.escape(sentence)) as error:
        search(random_unit(100, 16), 3, kind, parameters)
    assert ".cpp" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["IVF64,Flat", "IVF4,PQ4x4", "HNSW8,PQ4x4"])
def test_few_photos_per_centroid_are_said_once(kind, capfd):
    _, least = empty(kind, None, 16, 100)
    search(random_unit(100, 16), 3, kind)
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line.lower()]
    assert len(said) == 1
    assert said[0].startswith(f"warning: neighbors.index {kind} has {least} centroids for 100 photos; FAISS advises 39")
    search(random_unit(39 * least, 16), 3, kind)
    assert "warning" not in capfd.readouterr().err.lower()


def test_a_search_that_fails_is_one_sentence(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("Error in void f() at a/B.cpp:12: Error: 'err == cudaSuccess' failed: out of memory")

    monkeypatch.setattr(faiss, "knn", fails)
    with pytest.raises(InputError, match=r"neighbors.index: FAISS cannot search 'Flat' \(out of memory\); .*--gpus 0"):
        search(np.eye(5, dtype=np.float32), 2)
