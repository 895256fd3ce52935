"""Image neighbours by exact cosine similarity (FAISS)."""

import sys

import faiss
import numpy as np

from orl import InputError, artifacts
from orl.config import Config, used

SPARE = 16  # candidates beyond k, so that ties at the cut are seen
BATCH = 1024


def search(embedding: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows of unit rows float32 [N, D] by cosine: index int32 [N, k], similarity float32 [N, k].

    Best first, ties by lower index; a row is never its own neighbour, its duplicates are. FAISS finds candidates;
    their similarities are then computed anew, row by row, so that a batch's shape cannot part equal rows.
    """
    count = len(embedding)
    flat = faiss.IndexFlatIP(embedding.shape[1])
    flat.add(embedding)
    index, similarity = np.empty((count, k), np.int32), np.empty((count, k), np.float32)
    pending, wanted = np.arange(count), min(k + 1 + SPARE, count)
    while len(pending):
        tied = []
        for start in range(0, len(pending), BATCH):
            rows = pending[start : start + BATCH]
            _, candidates = flat.search(embedding[rows], wanted)
            for row, found in zip(rows, candidates, strict=True):
                others = np.sort(found[found != row])
                exact = (embedding[others] * embedding[row]).sum(1, dtype=np.float64).astype(np.float32)
                best = np.argsort(-exact, kind="stable")
                index[row], similarity[row] = others[best[:k]], exact[best[:k]]
                # The last candidate ties with the k-th neighbour: there may be more, with lower indices, unseen.
                if wanted < count and exact[best[-1]] >= exact[best[k - 1]] - 1e-6:
                    tied.append(row)
        pending, wanted = np.array(tied, int), min(wanted * 4, count)
    return index, similarity


def neighbors(config: Config, embeddings_path: str, output: str, threads: int = 1) -> None:
    """Write neighbors.h5. A k of at least the number of photos is clipped, with a warning. Raises InputError."""
    embedding = np.ascontiguousarray(artifacts.read_embeddings(embeddings_path).embedding)
    inputs = {"embeddings": artifacts.fingerprint(embeddings_path)}
    if not np.isfinite(embedding).all():
        raise InputError(f"{embeddings_path}: holds values that are not finite; make it again with other weights.")
    k = min(config.neighbors.k, len(embedding) - 1)
    if k < config.neighbors.k:
        print(f"warning: neighbors.k is {config.neighbors.k}, but there are {len(embedding)} photos; "
              f"using {k} neighbours each", file=sys.stderr)  # fmt: skip
    faiss.omp_set_num_threads(threads)
    index, similarity = search(embedding, k)
    with artifacts.create(output, artifacts.NEIGHBORS, used(config, "neighbors"), inputs) as file:
        file["index"], file["similarity"] = index, similarity
