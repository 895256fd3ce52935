"""RoI pairs between each photo and its neighbours."""

import numpy as np

from orl import artifacts
from orl.config import Config, used
from orl.progress import track


def top_pairs(query: np.ndarray, key: np.ndarray, ratio: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The max(1, int(ratio * n)) most similar pairs of RoIs (ORL release, stage 2).

    `query` [n, D] and `key` [m, D]: unit rows. Returns query_index, key_index (int64 [p]) and similarity
    (float32 [p]): cosines, best first, ties by lower flat index (query_index * m + key_index).
    """
    query, key = np.asarray(query, np.float32), np.asarray(key, np.float32)
    similarity = (query @ key.T).ravel()
    count = max(1, int(ratio * len(query)))
    # A matrix product rounds equal rows differently from place to place: candidates are computed anew, one by one.
    cut = np.partition(similarity, -count)[-count] - 1e-5
    candidates = np.flatnonzero(similarity >= cut)
    here, there = candidates // len(key), candidates % len(key)
    exact = (query[here] * key[there]).sum(1, dtype=np.float64).astype(np.float32)
    best = np.argsort(-exact, kind="stable")[:count]
    return here[best], there[best], exact[best]


def correspond(
    config: Config, manifest_path: str, neighbors_path: str, proposals_path: str, rois_path: str, output: str
) -> None:
    """Write correspondences.h5. Raises InputError."""
    manifest = artifacts.read_manifest(manifest_path)
    neighbor = artifacts.read_neighbors(neighbors_path).index
    found, feature = artifacts.read_proposals(proposals_path), artifacts.read_rois(rois_path).feature
    artifacts.check_rows(neighbors_path, len(neighbor), len(manifest), manifest_path)
    artifacts.check_rows(proposals_path, len(found.box_offsets) - 1, len(manifest), manifest_path)
    artifacts.check_rows(rois_path, len(feature), len(found.box), proposals_path)
    named = (("neighbors", neighbors_path), ("proposals", proposals_path), ("rois", rois_path))
    inputs = {name: artifacts.fingerprint(path) for name, path in named}
    artifacts.check_input(proposals_path, "manifest", artifacts.fingerprint(manifest_path))
    artifacts.check_input(rois_path, "proposals", inputs["proposals"])

    offsets, ratio = found.box_offsets, config.correspondences.ratio
    counts = np.array([max(1, int(ratio * rois)) for rois in np.diff(offsets)])
    pair_offsets = np.concatenate([[0], np.cumsum(np.repeat(counts, neighbor.shape[1]))])
    pair, similarity = np.empty((pair_offsets[-1], 2), np.uint16), np.empty(pair_offsets[-1], np.float16)
    for row in track(range(len(manifest)), len(manifest), "correspondences"):
        query = np.asarray(feature[offsets[row] : offsets[row + 1]], np.float32)
        for slot, other in enumerate(neighbor[row], row * neighbor.shape[1]):
            key = feature[offsets[other] : offsets[other + 1]]
            here = slice(*pair_offsets[slot : slot + 2])
            pair[here, 0], pair[here, 1], similarity[here] = top_pairs(query, key, ratio)
    with artifacts.create(output, artifacts.CORRESPONDENCES, used(config, "correspondences"), inputs) as file:
        file["neighbor"] = neighbor
        file["pair"], file["similarity"], file["pair_offsets"] = pair, similarity, pair_offsets
