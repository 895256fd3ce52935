import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orl import InputError
from orl.downstream.semi import best, collect


def run(folder: Path, share: float, lr: float, head: float, number: int, top1: float, **data: str) -> Path:
    """A result of semi_run."""
    path = folder / f"{share}-{lr}-{head}-{number}.json"
    result: dict[str, Any] = {
        "task": "semi_run",
        "model": "m",
        "metrics": {"top1": {"5": top1}, "top5": {"5": top1 + 10}, "chance_top1": 2.0, "epochs": []},
        "settings": {
            "seed": 3,
            "run": {"share": share, "lr": lr, "head": head, "number": number, "seed": 3 + number},
        },
        "data": {"set": "toy", "fingerprint": "f", "weights_fingerprint": "w", "labels": 7, **data},
    }
    path.write_text(json.dumps(result))
    return path


def grid(folder: Path, share: float, scores: dict[tuple[float, float], float]) -> list[Path]:
    return [run(folder, share, lr, head, 0, top1) for (lr, head), top1 in scores.items()]


SCORES = {(0.1, 1.0): 20.0, (0.01, 1.0): 30.0, (0.01, 10.0): 40.0, (0.1, 10.0): 40.0}


def test_the_best_of_the_grid_and_its_runs(tmp_path: Path) -> None:
    paths = grid(tmp_path, 0.1, SCORES)
    assert best(paths) == best(paths[::-1]) == (0.01, 10.0)  # of equals the lowest rate
    paths += [run(tmp_path, 0.1, 0.01, 10.0, number, top1) for number, top1 in ((1, 44.0), (2, 36.0))]
    paths += grid(tmp_path, 0.01, {(0.1, 1.0): 9.0})
    found = collect(paths, "stage1", tmp_path / "semi.json")
    assert json.loads((tmp_path / "semi.json").read_text()) == found
    assert (found["task"], found["model"]) == ("semi", "stage1")
    assert found["settings"]["shares"]["0.1"]["run"]["lr"] == 0.01
    assert set(found["settings"]["shares"]) == {"0.01", "0.1"}
    assert found["metrics"]["chance_top1"] == 2.0
    tenth, hundredth = found["metrics"]["shares"]["0.1"], found["metrics"]["shares"]["0.01"]
    assert (tenth["lr"], tenth["head"], tenth["labels"]) == (0.01, 10.0, 7)
    assert (tenth["top1"], tenth["top5"]) == (40.0, 50.0)
    assert tenth["top1_std"] == pytest.approx(np.std([40, 44, 36]))
    assert [one["seed"] for one in tenth["runs"]] == [3, 4, 5]
    assert [one["top1"] for one in tenth["grid"]] == list(SCORES.values())
    assert (hundredth["top1"], hundredth["top1_std"]) == (9.0, 0.0)


def test_results_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = grid(tmp_path, 0.1, SCORES)
    with pytest.raises(InputError, match=r"is of another fingerprint than .*0\.1-0\.1-1\.0-0\.json"):
        collect([*paths, run(tmp_path, 0.01, 0.1, 1.0, 0, 3.0, fingerprint="g")], "m", tmp_path / "x.json")
    with pytest.raises(InputError, match="is of another weights fingerprint"):
        collect([*paths, run(tmp_path, 0.01, 0.1, 1.0, 0, 3.0, weights_fingerprint="v")], "m", tmp_path / "x.json")
    with pytest.raises(InputError, match="is not of the grid's best setting"):
        collect([*paths, run(tmp_path, 0.1, 0.1, 1.0, 1, 99.0)], "m", tmp_path / "x.json")
    with pytest.raises(InputError, match=r"its grid, run 0 of 0\.01 of the labels, is missing"):
        collect([*paths, run(tmp_path, 0.01, 0.1, 1.0, 1, 99.0)], "m", tmp_path / "x.json")
    with pytest.raises(InputError, match="different shares"):
        best([*paths, run(tmp_path, 0.01, 0.1, 1.0, 0, 3.0)])
    (tmp_path / "knn.json").write_text('{"task": "knn", "model": "m", "metrics": {}, "settings": {}, "data": {}}')
    with pytest.raises(InputError, match=r"knn\.json: is no result of `orl evaluate semi_run`"):
        collect([tmp_path / "knn.json"], "m", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
