"""Nearest rows by cosine similarity: FAISS finds candidates, whose similarities are then computed anew."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np

from orl import InputError
from orl.progress import track

SPARE = 16  # candidates beyond k, so that ties at the cut are seen
TIE = 4e-6  # more than float32 similarities of unit rows are off, twice
BATCH = 4096  # rows searched for at a time; fixed, for a batch's shape decides how its products are rounded
PIECE = 2**28  # bytes of rows searched among at a time
GATHER = 2**22  # numbers of candidates' rows held at a time
TOGETHER = 64  # rows with open ties that are settled at a time
GPU_CANDIDATES = 2048  # FAISS finds no more on a GPU
TRAINED = 2**16  # rows to train an index on, or 64 per centroid if these are more
ADVISED = 39  # training rows per centroid at least, by FAISS's own advice

Find = Callable[[np.ndarray], np.ndarray]  # rows float32 [B, D] -> candidates int64 [B, C], -1: none


def search(
    embedding: np.ndarray,
    k: int,
    index: str = "Flat",
    parameters: str | None = None,
    rows: np.ndarray | None = None,
    pool: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows by cosine: index int32 [len(rows), k], similarity float32 [len(rows), k].

    `embedding` float32 [N, D] holds unit rows; neighbours of `rows` are searched among `pool` (row numbers, `pool`
    ascending, with k others for each row; not given: all). Best first, ties by lower row; a row is never its own
    neighbour, its duplicates are.

    `index` is "Flat", exact, or a text for FAISS's index_factory, with `parameters` for its ParameterSpace; rows for
    which such an index finds fewer than k are searched exactly. FAISS only finds candidates: similarities are
    computed row by row with sums in float64. Equal whatever the `threads`: each FAISS call has one, on a batch of fixed
    size, and so has the training and filling of an index. With a GPU, FAISS uses that.

    Memory beside `embedding`, of which nothing is copied where `pool` is contiguous: the results, 64 MB per thread
    (more for k in the hundreds), and an index with what it is trained on (64 rows per centroid). Raises InputError.
    """
    faiss.omp_set_num_threads(1)
    embedding = np.ascontiguousarray(embedding, np.float32)
    rows, pool = (np.arange(len(embedding)) if given is None else given for given in (rows, pool))
    neighbor, similarity = np.empty((len(rows), k), np.int32), np.empty((len(rows), k), np.float32)
    wanted = min(k + 1 + SPARE, len(pool))

    def fill(find: Find, places: np.ndarray, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Find the neighbours of rows[places]; returns the places with too few of them, and those with open ties."""

        def batch(start: int) -> tuple[np.ndarray, np.ndarray]:
            here = places[start : start + BATCH]
            queries = _take(embedding, rows[here])
            try:
                candidates = find(queries)
            except RuntimeError as error:  # as a rule a GPU without enough memory
                raise InputError(
                    f"neighbors.index: FAISS cannot search {label!r} ({_reason(error)}); name another index, or search "
                    f"on the CPU (--gpus 0)."
                ) from None
            neighbor[here], similarity[here], short, tied = _best(embedding, rows[here], queries, candidates, k)
            return here[short], here[tied]

        starts = range(0, len(places), BATCH)
        with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as workers:
            done = list(track(workers.map(batch, starts), len(starts), f"neighbours by {label}, batches"))
        short, tied = zip(*done, strict=True)
        return np.concatenate(short), np.concatenate(tied)

    places, exact = np.arange(len(rows)), _exact(embedding, pool, wanted)
    if index == "Flat":
        _, tied = fill(exact, places, index)
    else:
        short, tied = fill(_approximate(embedding, index, parameters, pool, wanted), places, index)
        if len(short):
            print(f"{index} finds fewer than {k} for {len(short)} photos: searching those exactly", file=sys.stderr)
            _, more = fill(exact, short, "Flat")
            tied = np.concatenate([tied, more])
    if wanted < len(pool) and len(tied):
        _settle(neighbor, similarity, embedding, rows, tied, pool)
    return neighbor, similarity


def _take(embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows: where they follow one another, without a copy."""
    follow = (np.diff(rows) == 1).all()
    return embedding[rows[0] : rows[-1] + 1] if follow else embedding[rows]


def _pieces(embedding: np.ndarray, pool: np.ndarray, most: int = 2**31) -> Iterator[np.ndarray]:
    step = max(1, min(most, PIECE // (4 * embedding.shape[1])))
    for start in range(0, len(pool), step):
        yield pool[start : start + step]


# Candidates


def _exact(embedding: np.ndarray, pool: np.ndarray, wanted: int) -> Find:
    on_gpu = faiss.get_num_gpus() > 0 and wanted <= GPU_CANDIDATES
    resources: Any = faiss.StandardGpuResources() if on_gpu else None
    lock = threading.Lock()
    inner = faiss.METRIC_INNER_PRODUCT

    def knn(queries: np.ndarray, keys: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        if not on_gpu:
            return faiss.knn(queries, keys, most, metric=inner)
        with lock:  # a GPU's resources serve one call at a time
            return faiss.knn_gpu(resources, queries, keys, most, metric=inner)

    def find(queries: np.ndarray) -> np.ndarray:
        similarity: np.ndarray = np.empty((len(queries), 0), np.float32)
        candidates: np.ndarray = np.empty((len(queries), 0), np.int64)
        for piece in _pieces(embedding, pool):
            values, places = knn(queries, _take(embedding, piece), min(wanted, len(piece)))
            similarity = np.concatenate([similarity, values], 1)
            candidates = np.concatenate([candidates, piece[places]], 1)
            if similarity.shape[1] > wanted:
                best = np.argpartition(-similarity, wanted - 1, 1)[:, :wanted]
                similarity, candidates = (np.take_along_axis(one, best, 1) for one in (similarity, candidates))
        return candidates

    return find


def empty(index: str, parameters: str | None, width: int, count: int) -> tuple[faiss.Index, int]:
    """An index for `count` rows of `width` numbers, and how many rows it must be trained on at least.

    Raises InputError where there is no such index, it lacks such parameters or needs more rows.
    """
    try:
        made = faiss.index_factory(width, index, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"neighbors.index: FAISS has no {index!r} for embeddings of {width} numbers ({_reason(error)}); "
            f"name another, such as 'Flat' or 'IVF4096,Flat'."
        ) from None
    space: Any = faiss.ParameterSpace()  # its published types are wrong
    try:
        if parameters:
            space.set_index_parameters(made, parameters)
    except RuntimeError as error:
        raise InputError(
            f"neighbors.parameters: {parameters!r} are not for {index!r} ({_reason(error)}); correct them."
        ) from None
    least = max(max(getattr(part, "nlist", 0), part.pq.ksub if hasattr(part, "pq") else 0) for part in _parts(made))
    if count < least:
        raise InputError(
            f"neighbors.index: {index!r} needs at least {least} photos to search among, one per centroid, but there "
            f"are {count}; use fewer lists or bits, or 'Flat'."
        )
    return made, least


def _parts(index: faiss.Index) -> Iterator[faiss.Index]:
    """An index and those that it is made of."""
    yield index
    for name in ("index", "quantizer", "storage", "base_index", "refine_index"):
        if isinstance(inner := getattr(index, name, None), faiss.Index):
            yield from _parts(faiss.downcast_index(inner))


def _reason(error: Exception) -> str:
    """What FAISS's message says, without its place in the source and the failed condition."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^(Error in .*? at \S+:\d+: )?(Error: '.*?' failed: )?", "", text).rstrip(".")


def _approximate(embedding: np.ndarray, index: str, parameters: str | None, pool: np.ndarray, wanted: int) -> Find:
    made, least = empty(index, parameters, embedding.shape[1], len(pool))
    on_gpu = faiss.get_num_gpus() > 0
    if on_gpu:
        try:
            resources = faiss.StandardGpuResources()
            if wanted > GPU_CANDIDATES:
                raise RuntimeError(f"neighbors.k is over {GPU_CANDIDATES - SPARE - 1}")
            made = faiss.index_cpu_to_gpu(resources, 0, made)
        except RuntimeError as error:
            on_gpu = False
            print(f"neighbors.index: {index} stays on the CPU ({_reason(error)})", file=sys.stderr)
    lock = threading.Lock()
    try:
        _train(made, embedding, index, pool, least)
        for start in track(range(0, len(pool), BATCH), -(-len(pool) // BATCH), f"filling {index}, batches"):
            made.add(_take(embedding, pool[start : start + BATCH]))
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"neighbors.index: FAISS cannot fill {index!r} with {len(pool)} photos ({_reason(error)}); name another."
        ) from None

    def find(queries: np.ndarray) -> np.ndarray:
        if on_gpu:
            with lock:
                _, places = made.search(queries, wanted)
        else:
            _, places = made.search(queries, wanted)
        return np.where(places < 0, -1, pool[places])

    return find


def _train(made: faiss.Index, embedding: np.ndarray, index: str, pool: np.ndarray, least: int) -> None:
    if made.is_trained:
        return
    if len(pool) < ADVISED * least:
        print(
            f"warning: neighbors.index {index} has {least} centroids for {len(pool)} photos; FAISS advises {ADVISED} "
            f"photos per centroid at least, with fewer it finds less",
            file=sys.stderr,
        )
    for part in _parts(made):  # so that FAISS does not say it again, in its words
        for options in (getattr(owner, "cp", None) for owner in (part, getattr(part, "pq", None))):
            if options:
                options.min_points_per_centroid = 1
    size = min(len(pool), max(TRAINED, 64 * least))
    print(f"training {index} on {size} photos", file=sys.stderr, flush=True)
    made.train(embedding[pool[np.sort(np.random.default_rng(0).choice(len(pool), size, replace=False))]])


# Neighbours of candidates


def _best(
    embedding: np.ndarray, rows: np.ndarray, queries: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The k best of the candidates [B, C] of `rows` [B], and their similarities; bool [B]: too few, an open tie.

    The tie is open where the last candidate is as good as the k-th: there may be more, with lower numbers, unseen.
    """
    candidates = np.sort(candidates, 1)
    similarity = _similarity(embedding, queries, candidates)
    similarity[(candidates < 0) | (candidates == rows[:, None])] = -np.inf
    order = np.argsort(-similarity, 1, kind="stable")
    candidates = np.take_along_axis(candidates, order[:, :k], 1)
    similarity = np.take_along_axis(similarity, order, 1)
    short = similarity[:, k - 1] == -np.inf
    last = np.where(similarity == -np.inf, np.inf, similarity).min(1)
    return candidates, similarity[:, :k], short, ~short & (last >= similarity[:, k - 1] - TIE)


def _similarity(embedding: np.ndarray, queries: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines float32 [B, C] of unit `queries` [B, D] and the rows `others` [B, C], alike wherever a row stands."""
    found = np.empty(others.shape, np.float32)
    step = max(1, GATHER // max(1, others.shape[1] * embedding.shape[1]))
    for start in range(0, len(others), step):
        here = slice(start, start + step)
        found[here] = (embedding[others[here]] * queries[here, None]).sum(-1, dtype=np.float64)
    return found


def _settle(
    neighbor: np.ndarray,
    similarity: np.ndarray,
    embedding: np.ndarray,
    rows: np.ndarray,
    tied: np.ndarray,
    pool: np.ndarray,
) -> None:
    """Search all of the pool for the rows with open ties, as a rule copies of a photo: equal rows are searched once."""
    k = neighbor.shape[1]
    for start in track(range(0, len(tied), BATCH), -(-len(tied) // BATCH), "settling ties, batches"):
        copies: dict[bytes, list[int]] = {}
        for place in tied[start : start + BATCH]:
            copies.setdefault(embedding[rows[place]].tobytes(), []).append(place)
        groups = list(copies.values())
        for first in range(0, len(groups), TOGETHER):
            some = groups[first : first + TOGETHER]
            queries = embedding[[rows[group[0]] for group in some]]
            best = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(some)
            for piece in _pieces(embedding, pool, GATHER // TOGETHER):
                products = queries @ _take(embedding, piece).T
                for number, group in enumerate(some):
                    near = piece[products[number] >= similarity[group[0], -1] - TIE]
                    for more in np.array_split(near, 1 + near.size * embedding.shape[1] // GATHER):
                        others = np.concatenate([best[number][0], more])
                        values = _similarity(embedding, queries[number, None], more[None])[0]
                        values = np.concatenate([best[number][1], values])
                        order = np.argsort(-values, kind="stable")[: k + 1]  # one more: it may be the row itself
                        best[number] = others[order], values[order]
            for (others, values), group in zip(best, some, strict=True):
                for place in group:
                    other = others != rows[place]
                    neighbor[place], similarity[place] = others[other][:k], values[other][:k]
