"""Every command that writes something: those of tests/test_cli.py, and the few that are not there."""

import json
from pathlib import Path

from test_cli import READS, argv

from orl.config import merge

COMMANDS = [*READS, "pretrain --stage supervised", "merge", "compare"]
TRAIN = "pretrain --stage stage", *(f"evaluate {task}" for task in ("linear", "semi_run", "detection", "segmentation"))
# So that trainings have several steps to be disturbed at.
LONGER = {
    **{stage: {"optimizer": {"epochs": 3}} for stage in ("stage1", "stage3")},
    "downstream": {
        "detection": {"iterations": 3},
        **{task: {"epochs": 3} for task in ("linear", "semi", "segmentation")},
    },
}


def line(command, settings, inputs, folder, **change):
    """A whole command line that writes `out` (and more) into `folder`; `change` replaces what is given for a flag."""
    settings = merge(json.loads(settings), LONGER)
    if command == "merge":
        return ["merge", *change.get("--shards", inputs["--shards"]), "--output", folder / "out"]
    if command == "compare":
        return ["compare", *change.get("RUN", inputs["RUN"]), "--output", folder / "out"]
    if command == "pretrain --stage supervised":
        settings = {"supervised": str(change.get("--supervised", inputs["--backbone"]))}
        return [*command.split(), "--settings", json.dumps(settings), "--output", folder / "out"]
    found = argv(command, json.dumps(settings), inputs, folder / "out", **change)
    if command == "evaluate proposals":
        found += ["--plot", folder / "plot.png"]
    return [*found, "--checkpoint-minutes", 0] if command.startswith(TRAIN) else found


def finals(folder: Path) -> dict[str, bytes]:
    """What lies below a folder under its final name: relative path -> bytes. States of trainings are left out."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not hidden(name) and not of_state(name)}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders below a folder."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in names if hidden(name))


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def of_state(name: str) -> bool:
    return any(part == "state" or part.endswith(".state") for part in Path(name).parts)
