"""RoI pairs between each photo and its neighbours."""

from bisect import bisect
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.views import rng
from orl.progress import track
from orl.workers import ordered

MEMORY = 256e6  # bytes of features that a process holds at a time


def top_pairs(query: np.ndarray, key: np.ndarray, ratio: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The max(1, int(ratio * n)) most similar pairs of RoIs (ORL release, stage 2).

    `query` [n, D] and `key` [m, D]: unit rows. Returns query_index, key_index (int64 [p]) and similarity
    (float32 [p]): cosines, best first, ties by lower flat index (query_index * m + key_index).
    """
    query, key = np.asarray(query, np.float32), np.asarray(key, np.float32)
    return _best(query, key, query @ key.T, max(1, int(ratio * len(query))))


def _best(
    query: np.ndarray, key: np.ndarray, product: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`top_pairs` of which the matrix product is known."""
    similarity = product.ravel()
    # A matrix product rounds equal rows differently from place to place: candidates are computed anew, one by one.
    cut = np.partition(similarity, -count)[-count] - 1e-5
    return _ordered(query, key, np.flatnonzero(similarity >= cut), count)


def _ordered(
    query: np.ndarray, key: np.ndarray, candidates: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` most similar of the pairs whose flat indices, ascending, are `candidates`."""
    here, there = candidates // len(key), candidates % len(key)
    exact = (query[here] * key[there]).sum(1, dtype=np.float64).astype(np.float32)
    best = np.argsort(-exact, kind="stable")[:count]
    return here[best], there[best], exact[best]


def _pairs(
    config: Config, neighbor: np.ndarray, offsets: np.ndarray, rois_paths: Sequence[str], rows: range
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs uint16 [P, 2] and similarities float16 [P] of the photos `rows` with each of their neighbours.

    Their features are read once, in the order in which they lie in the files: a block needs many photos twice, and a
    disk reads forward.
    """
    maps = [artifacts.read_rois(path).feature for path in rois_paths]
    starts = [0, *accumulate(map(len, maps))]
    features: dict[int, np.ndarray] = {}
    for row in np.unique(np.append(neighbor[rows.start : rows.stop], rows)).tolist():
        first, last = offsets[row : row + 2].tolist()
        at = bisect(starts, first) - 1
        features[row] = artifacts.read_past(maps[at], first - starts[at], last - starts[at])
    pairs: list[np.ndarray] = []
    similarities: list[np.ndarray] = []
    with threadpool_limits(1):
        for row in rows:
            query = features[row].astype(np.float32)
            if not (np.abs(np.einsum("ij,ij->i", query, query) - 1) < 0.01).all():
                path = rois_paths[bisect(starts, int(offsets[row])) - 1]
                raise InputError(f"{path}: damaged (a RoI's features have not length 1); make it again.")
            count = max(1, int(config.correspondences.ratio * len(query)))
            others = [features[other] for other in neighbor[row].tolist()]
            ends = [0, *accumulate(map(len, others))]
            keys = np.concatenate(others, dtype=np.float32, casting="safe")
            product = query @ keys.T
            for slot, (start, end) in enumerate(pairwise(ends)):
                key = keys[start:end]
                if config.correspondences.method == "random":
                    flat = rng(config.seed, 2, row, slot).choice(len(query) * len(key), count, replace=False)
                    *pair, similarity = _ordered(query, key, np.sort(flat), count)
                else:
                    *pair, similarity = _best(query, key, product[:, start:end], count)
                pairs.append(np.stack(pair, 1).astype(np.uint16))
                similarities.append(similarity.astype(np.float16))
    return np.concatenate(pairs), np.concatenate(similarities)


def correspond(
    config: Config,
    manifest_path: str,
    neighbors_path: str,
    proposals_path: str,
    rois_paths: Sequence[str],
    output: str,
    workers: int = 1,
    shard: artifacts.Shard = None,
) -> None:
    """Write correspondences.h5, or a shard of it, with `workers` processes, on which the result does not depend.

    `rois_paths`: rois.h5, or all its shards. Raises InputError.
    """
    neighbor = artifacts.read_neighbors(neighbors_path).index
    _, found = artifacts.read_boxes(manifest_path, proposals_path)
    offsets = np.array(found.box_offsets)
    artifacts.check_input(neighbors_path, "manifest", artifacts.fingerprint(manifest_path))
    artifacts.check_rows(neighbors_path, len(neighbor), len(offsets) - 1, proposals_path)
    named = (("neighbors", neighbors_path), ("proposals", proposals_path), ("rois", rois_paths[0]))
    inputs = {name: artifacts.fingerprint(path) for name, path in named}
    tiles = artifacts.tile(rois_paths)
    for path, rows in track(tiles, len(tiles), "checking RoI features, files"):
        artifacts.check_input(path, "proposals", inputs["proposals"])
        own = len(found.box) if len(tiles) == 1 else int(offsets[rows.stop] - offsets[rows.start])
        artifacts.check_rows(path, len(artifacts.read_rois(path).feature), own, proposals_path)
    width = artifacts.read_rois(rois_paths[0]).feature.shape[1]

    part, k = artifacts.part(len(neighbor), shard), neighbor.shape[1]
    photo = len(found.box) / len(neighbor) * width * 2  # bytes
    step = max(1, int(MEMORY / (photo * (k + 1))))
    blocks = [range(start, min(start + step, part.stop)) for start in range(part.start, part.stop, step)]
    rois = np.diff(offsets[part.start : part.stop + 1])
    counts = np.maximum(1, (config.correspondences.ratio * rois).astype(np.int64))
    pair_offsets = np.concatenate([[0], np.cumsum(np.repeat(counts, k))])
    work = partial(_pairs, config, neighbor, offsets, [path for path, _ in tiles])
    done = ordered(work, blocks, min(workers, len(blocks)))
    settings, held, size = used(config, "correspondences"), shard and part, int(pair_offsets[-1]) * 6
    with artifacts.create(output, artifacts.CORRESPONDENCES, settings, inputs, held, size) as file:
        file["neighbor"] = neighbor[part.start : part.stop]
        pair = file.create_dataset("pair", (pair_offsets[-1], 2), np.uint16)
        similarity = file.create_dataset("similarity", (pair_offsets[-1],), np.float16)
        start = 0
        for pairs, similarities in track(done, len(blocks), "correspondences, blocks of photos"):
            end = start + len(pairs)
            pair[start:end], similarity[start:end] = pairs, similarities
            start = end
        file["pair_offsets"] = pair_offsets
