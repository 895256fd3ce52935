"""What each training of a config costs: FLOPs, counted in one step; and hours, where the run has been made.

`python benchmarks/cost.py config/scenes-evidence.yaml`. FLOPs are those of convolutions and matrix products, forward
and backward, of networks in float32; a multiply-add is two. Hours are Snakemake's of results/NAME, over all seeds; a
training that was interrupted counts from its last start.
"""

import sys
from functools import cache
from pathlib import Path

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from orl.config import Config, Stage1, Stage3, merge, runs
from orl.pretrain.loop import initial

PHOTOS = 2  # of the step: batch statistics need more than one


@cache
def flops(settings: Stage1 | Stage3) -> float:
    """FLOPs of training on one photo."""
    model = initial(settings, 0).train()
    sides = [settings.views.size] * 2
    if isinstance(settings, Stage3):
        sides += [settings.patch] * 4
    with FlopCounterMode(display=False) as counter:
        losses, _ = model(*(torch.randn(PHOTOS, 3, side, side) for side in sides))
        torch.stack(list(losses.values())).sum().backward()
    return counter.get_total_flops() / PHOTOS


def epochs_of_equal_cost(config: Config) -> float:
    """Epochs of stage 1 that cost as much as stage 1 and stage 3 together."""
    ratio = flops(config.stage3) / flops(config.stage1)
    return config.stage1.optimizer.epochs + ratio * config.stage3.optimizer.epochs


def hours(results: Path, model: str) -> str:
    """Hours of the trainings of a model, over its seeds."""
    files = [results / "benchmarks" / f"{model}.tsv", *(results / "benchmarks").glob(f"{model}.seed*.tsv")]
    seconds = [float(file.read_text().splitlines()[1].split("\t")[0]) for file in files if file.exists()]
    return f"{sum(seconds) / len(seconds) / 3600:.2f}" if seconds else ""


if __name__ == "__main__":
    raw: dict = {}
    for path in sys.argv[1:]:
        raw = merge(raw, yaml.safe_load(Path(path).read_text()))
    print("| model | epochs | GFLOP per photo | times the run's stage 1, in all | hours |")
    print("| --- | --- | --- | --- | --- |")
    whole = runs(raw)
    first = whole[""].stage1
    unit = flops(first) * first.optimizer.epochs
    for suffix, config in whole.items():
        for name, settings in (("stage1", config.stage1), ("orl", config.stage3)):
            if name in config.measure and ".seed" not in suffix:
                one, epochs = flops(settings), settings.optimizer.epochs
                spent = hours(Path("results", config.name), name + suffix)
                print(f"| {name}{suffix} | {epochs} | {one / 1e9:.2f} | {one * epochs / unit:.2f} | {spent} |")
    print(f"\nEpochs of stage 1 that cost as much as stages 1 and 3: {epochs_of_equal_cost(whole['']):.1f}")
