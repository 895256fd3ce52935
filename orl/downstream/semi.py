"""Semi-supervised classification: the best of a grid of fine-tunings, and its mean over several runs (ORL release)."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from orl import InputError, artifacts
from orl.config import RESULT_VERSION

TASK, RUN = "semi", "semi_run"


def best(paths: Sequence[str | os.PathLike]) -> tuple[float, float]:
    """Learning rate and head multiple of the best top-1 among results of a grid; among equals, of the lowest. Raises
    InputError."""
    grid = [_read(path) for path in paths]
    if len({one["run"]["share"] for one in grid}) != 1:
        raise InputError(f"{paths[0]}: and the others are of different shares of the labels; name those of one.")
    found = min(grid, key=lambda one: (-one["top1"], one["run"]["lr"], one["run"]["head"]))["run"]
    return found["lr"], found["head"]


def collect(paths: Sequence[str | os.PathLike], model: str, output: str | os.PathLike) -> dict[str, Any]:
    """Put the results of `orl evaluate semi_run` for a model together; write and return the result.

    Those of run 0 are the grid; later runs are of its best setting, and with that they give mean and standard deviation
    (ddof 0). Metrics by share, in percent: `lr`, `head`, `top1`, `top1_std`, `top5`, `top5_std`, `runs` and `grid`.
    The best of the grid is chosen on the test photos, as published; its own run counts. Raises InputError.
    """
    found = [_read(path) for path in paths]
    for path, one in zip(paths, found, strict=True):
        for key in ("set", "fingerprint", "weights_fingerprint"):
            if one["data"][key] != found[0]["data"][key]:
                raise InputError(
                    f"{path}: is of another {key.replace('_', ' ')} than {paths[0]}; name those of one model."
                )
    shares: dict[str, Any] = {}
    settings: dict[str, Any] = {"version": RESULT_VERSION[TASK], "shares": {}}
    for share in sorted({one["run"]["share"] for one in found}):
        here = [(path, one) for path, one in zip(paths, found, strict=True) if one["run"]["share"] == share]
        grid = [(path, one) for path, one in here if one["run"]["number"] == 0]
        if not grid:
            raise InputError(f"{here[0][0]}: its grid, run 0 of {share:g} of the labels, is missing; name it, too.")
        lr, head = best([path for path, _ in grid])
        runs = [one for _, one in here if (one["run"]["lr"], one["run"]["head"]) == (lr, head)]
        others = [path for path, one in here if one["run"]["number"] and one not in runs]
        if others:
            raise InputError(f"{others[0]}: is not of the grid's best setting; make it again.")
        top = {key: np.array([one[key] for one in runs]) for key in ("top1", "top5")}
        settings["shares"][str(share)] = runs[0]["settings"]
        shares[str(share)] = {
            "lr": lr,
            "head": head,
            **{key: float(values.mean()) for key, values in top.items()},
            **{f"{key}_std": float(values.std()) for key, values in top.items()},
            "labels": runs[0]["data"]["labels"],
            "runs": [{"seed": one["run"]["seed"], "top1": one["top1"], "top5": one["top5"]} for one in runs],
            "grid": [
                {"lr": one["run"]["lr"], "head": one["run"]["head"], "top1": one["top1"], "top5": one["top5"]}
                for _, one in grid
            ],
        }
    data = {key: value for key, value in found[0]["data"].items() if key != "labels"}
    metrics = {"shares": shares, "chance_top1": found[0]["chance_top1"]}
    result = {"task": TASK, "model": model, "metrics": metrics, "settings": settings, "data": data}
    artifacts.write_json(output, result)
    return result


def _read(path: str | os.PathLike) -> dict[str, Any]:
    """Top-1 and top-5 of a run, `run` (its share, rates, number and seed), settings and data. Raises InputError."""
    result = artifacts.read_results(path)
    try:
        metrics, run = result["metrics"], result["settings"]["run"]
        values = {key: float(metrics[key]["5"]) for key in ("top1", "top5")}
        return {
            **values,
            "chance_top1": float(metrics["chance_top1"]),
            "run": {key: run[key] for key in ("share", "lr", "head", "number", "seed")},
            "settings": result["settings"],
            "data": result["data"],
        }
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is no result of `orl evaluate {RUN}` ({error}); evaluate again.") from None
