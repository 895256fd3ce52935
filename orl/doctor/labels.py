"""The labelled photos of a run's tasks as they lie there now."""

import os
from collections.abc import Sequence

from orl import InputError
from orl.doctor.chain import Chain

SPLITS = {"voc": ("trainval", "test"), "coco": ("train2017", "val2017")}  # as svm.SPLITS, which is slow to load


def is_newer(files: Sequence[str], than: str) -> bool:
    """Whether a file was written after another."""
    return any(os.stat(file).st_mtime > os.stat(than).st_mtime for file in files)


class Labels:
    """Each set of labelled photos is read once. `gone`: what of them cannot be read, and why."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.gone: dict[str, str] = {}
        self._read: dict[tuple[str, str], list[str]] = {}

    def of(self, task: str, v: str, path: str) -> list[str]:
        """What results (first) and features (the others) of a task say of its photos where these are as they are now.

        Nothing where that is not known: reading takes long, and no list of them was written since the file `path`.
        """
        places, config = self.chain.places, self.chain.config(v)
        kind, _, name = task.partition(".")
        svm, masks = config.downstream.voc07_svm, config.downstream.detection
        if kind in ("detection", "segmentation"):
            root, splits = places.mask_root(v), (masks.train, masks.test)
        else:
            root, splits = places.labels(v), (svm.train or SPLITS[svm.layout][0], svm.test or SPLITS[svm.layout][1])
            kind = name or "voc07_svm"
        files = [f"{root}/annotations/instances_{split}.json" for split in splits]
        if kind == "detection":
            return ["".join((self.chain.of_file(file) or "")[:32] for file in files)]
        is_long = kind == "segmentation" or (not name and svm.layout == "coco")
        if is_long and all(map(os.path.exists, files)) and not is_newer(files, path):
            return []
        if (kind, v) not in self._read:
            try:
                self._read[kind, v] = self._labels(kind, v, root or "", splits)
            except InputError as error:
                self.gone[f"labelled photos of {kind}{v}"] = str(error).rstrip(".")
                self._read[kind, v] = []
        return self._read[kind, v]

    def _labels(self, kind: str, v: str, root: str, splits: tuple[str, str]) -> list[str]:
        config = self.chain.config(v)
        if kind == "segmentation":
            from orl.data.instances import read

            prints = [read(root, split).fingerprint() for split in splits]
            others = list[str]()
        elif kind == "voc07_svm":
            from orl.data.labels import listed, read_splits

            both = read_splits(root, config.downstream.voc07_svm.layout, *splits)
            prints, others = [one.fingerprint() for one in both], [listed(*both)]
        else:
            from orl.downstream import sets

            prints = [one.fingerprint() for one in sets.read(config, kind, self.chain.places.set_root(kind, v))]
            others = prints
        return ["".join(one[:32] for one in prints), *others]
