"""The state of an unfinished training, kept outside what Snakemake deletes.

state/STAMP/checkpoint.pt belongs to the run whose settings, inputs and code version hash to STAMP: changed settings
never resume it, and going back to them finds it again.
"""

import fcntl
import os
import shutil
import weakref
import zipfile
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
        """Replace the checkpoint atomically: the old one survives a failure. Raises NoRoomError."""
        # To an open file, whose error on a full disk is the system's; by name, torch would not tell.
        with artifacts.atomic(self.path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint on the CPU, or None. Raises InputError if it is damaged."""
        if not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as content:
                if damaged := content.testzip():  # torch does not look at the checksums that it writes
                    raise ValueError(f"checksum of {damaged}")
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            detail = " ".join(str(error).split())[:120]
            raise InputError(f"{self.path}: damaged checkpoint ({detail}); delete it to train anew.") from None


def remove(folder: Path, stamp: str) -> None:
    """Delete the checkpoint of the run that `stamp` tells; the folder too, unless it has some of other settings."""
    shutil.rmtree(folder / stamp[:16], ignore_errors=True)
    if not list(folder.glob("*/checkpoint.pt")):
        shutil.rmtree(folder, ignore_errors=True)
