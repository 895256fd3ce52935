"""Image neighbours by cosine similarity, and how many of them an approximate search finds."""

import sys
from collections.abc import Iterator

import numpy as np

from orl import InputError, artifacts
from orl.config import Config, used
from orl.data.views import rng
from orl.discovery.search import BATCH, empty, search

RECALL_PHOTOS = 1000


def neighbors(config: Config, manifest_path: str, embeddings_path: str, output: str, threads: int = 1) -> None:
    """Write neighbors.h5. A k for which there are too few photos is clipped, with a warning. Raises InputError.

    Where the index is approximate, text attribute `recall` says which share of the k true neighbours it found, of up
    to 1000 random photos. For memory, see `search`.
    """
    settings = config.neighbors
    manifest = artifacts.read_manifest(manifest_path)
    embedding = artifacts.read_embeddings(embeddings_path).embedding
    artifacts.check_rows(embeddings_path, len(embedding), len(manifest), manifest_path)
    named = (("manifest", manifest_path), ("embeddings", embeddings_path))
    inputs = {name: artifacts.fingerprint(path) for name, path in named}
    artifacts.check_input(embeddings_path, "manifest", inputs["manifest"])
    pools = list(_pools(manifest.part, settings.scope))
    k, text = min((others, text) for _, _, others, text in pools)
    if k == 0:
        raise InputError(f"neighbors.scope: is {settings.scope!r}, but {text}; use another scope or add photos.")
    if settings.index != "Flat":
        empty(settings.index, settings.parameters, embedding.shape[1], min(len(pool) for _, pool, _, _ in pools))
    _check_unit(embedding, manifest, embeddings_path)
    if k < settings.k:
        print(f"warning: neighbors.k is {settings.k}, but {text}; using {k} neighbours each", file=sys.stderr)
    k = min(k, settings.k)

    index, similarity = np.empty((len(embedding), k), np.int32), np.empty((len(embedding), k), np.float32)
    for rows, pool, _, _ in pools:
        if settings.method == "random":
            index[rows], similarity[rows] = _random(embedding, k, rows, pool, config.seed)
        else:
            index[rows], similarity[rows] = search(
                embedding, k, settings.index, settings.parameters, rows, pool, threads=threads
            )
    attributes = {}
    if settings.index != "Flat":
        tried = np.random.default_rng(0).choice(len(index), min(RECALL_PHOTOS, len(index)), replace=False)
        hits = 0
        for rows, pool, _, _ in pools:
            if len(some := np.intersect1d(rows, tried)):
                exact, _ = search(embedding, k, rows=some, pool=pool, threads=threads)
                hits += sum(len(np.intersect1d(*pair)) for pair in zip(exact, index[some], strict=True))
        attributes["recall"] = f"{hits / (len(tried) * k):.4f}"
        print(f"recall of {settings.index}: {attributes['recall']} of the {k} nearest, measured on {len(tried)} photos",
              file=sys.stderr)  # fmt: skip
    size = index.nbytes + similarity.nbytes
    with artifacts.create(output, artifacts.NEIGHBORS, used(config, "neighbors"), inputs, size=size) as file:
        artifacts.note(file, attributes)
        file["index"], file["similarity"] = index, similarity


def _pools(part: np.ndarray, scope: str) -> Iterator[tuple[np.ndarray, np.ndarray, int, str]]:
    """Rows, the rows among which their neighbours are, how many of these are others than a row itself, and in words."""
    whole = np.arange(len(part))
    if scope == "all":
        yield whole, whole, len(part) - 1, f"there are {len(part)} photos"
        return
    for name in np.unique(part):
        rows, rest = np.flatnonzero(part == name), np.flatnonzero(part != name)
        if scope == "within":
            yield rows, rows, len(rows) - 1, f"part {str(name)!r} has {len(rows)} photo{'s' if len(rows) > 1 else ''}"
        else:
            yield rows, rest, len(rest), f"{len(rest) or 'no'} photos are outside part {str(name)!r}"


def _random(
    embedding: np.ndarray, k: int, rows: np.ndarray, pool: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `search`, but of k random photos of the `pool` (ascending): indices int32 and similarities [n, k]."""
    index, similarity = np.empty((len(rows), k), np.int32), np.empty((len(rows), k), np.float32)
    for place, row in enumerate(rows.tolist()):
        own = np.searchsorted(pool, row)
        others = len(pool) - (own < len(pool) and pool[own] == row)
        drawn = np.sort(rng(seed, 1, row).choice(others, k, replace=False))
        if others < len(pool):
            drawn += drawn >= own
        near = embedding[pool[drawn]] @ embedding[row]
        order = np.argsort(-near, kind="stable")
        index[place], similarity[place] = pool[drawn[order]], near[order]
    return index, similarity


def _check_unit(embedding: np.ndarray, manifest: artifacts.Manifest, path: str) -> None:
    for start in range(0, len(embedding), BATCH):
        with np.errstate(over="ignore"):
            norm = np.linalg.norm(embedding[start : start + BATCH], axis=1)
        wrong = np.flatnonzero(~(np.abs(norm - 1) <= 1e-3))
        if len(wrong):
            value = norm[wrong[0]]
            found = f"has length {value:.4g} instead of 1" if np.isfinite(value) else "is not finite"
            photo = str(manifest.path[start + wrong[0]])
            raise InputError(f"{path}: the embedding of {photo!r} {found}; make it again with other weights.")
