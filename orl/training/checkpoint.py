"""The state of an unfinished training, kept outside what Snakemake deletes.

state/STAMP/checkpoint.pt belongs to the run whose settings, inputs and code version hash to STAMP: changed settings
never resume it, and going back to them finds it again.
"""

import fcntl
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import torch

from orl import InputError, artifacts


class State:
    """The state folder of one run, locked by its first process. Raises InputError if another training runs there."""

    def __init__(self, folder: Path, stamp: str, lock: bool = True) -> None:
        self.path = folder / stamp[:16] / "checkpoint.pt"
        self.others = sorted(folder.glob("*/checkpoint.pt")) if folder.exists() else []
        if not lock:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(folder / "lock", "w")  # noqa: SIM115 - the kernel lets go when the process ends, however
        held = weakref.ref(self.lock)  # workers forked off would hold the lock after a kill, so they close theirs
        os.register_at_fork(after_in_child=lambda: file.close() if (file := held()) else None)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise InputError(f"{folder}: another training runs there; wait for it or stop it.") from None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically: the old one survives a failure."""
        try:
            with artifacts.atomic(self.path) as temporary:
                torch.save(state, temporary)
        except RuntimeError as error:  # as torch puts a failed write
            raise OSError(f"{self.path}: the checkpoint cannot be written; is the disk full? Free space and run "
                          f"again: the one before it is kept ({str(error).splitlines()[0]}).") from None  # fmt: skip

    def load(self) -> dict[str, Any] | None:
        """The checkpoint on the CPU, or None. Raises InputError if it is damaged."""
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            detail = " ".join(str(error).split())[:120]
            raise InputError(f"{self.path}: damaged checkpoint ({detail}); delete it to train anew.") from None


def remove(folder: Path, stamp: str) -> None:
    """Delete the checkpoint of the run that `stamp` tells; the folder too, unless it has some of other settings."""
    shutil.rmtree(folder / stamp[:16], ignore_errors=True)
    if not list(folder.glob("*/checkpoint.pt")):
        shutil.rmtree(folder, ignore_errors=True)
