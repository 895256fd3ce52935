"""`orl card`: a model card beside the weights of a trained model, in the form that the Hugging Face hub reads."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from orl import InputError, artifacts
from orl.config import USES, Config
from orl.networks import MEAN, STD
from orl.networks.loading import code
from orl.places import MODELS
from orl.report.page import read_metrics, render
from orl.report.repeats import arm_of
from orl.report.run import differing
from orl.report.scores import METHODS, Task, rank, tasks

PAPERS_PHOTOS = 118_287  # of COCO train2017, 800 epochs with a ResNet-50
TITLES = {"byol": "BYOL", "simclr": "SimCLR", "moco": "MoCo v2", "orl": "ORL"}
PAPERS = {
    "orl": "Xie, Zhan, Liu, Ong, Loy: *Unsupervised Object-Level Representation Learning from Scene Images*, NeurIPS "
    "2021, <https://arxiv.org/abs/2106.11952>",
    "byol": "Grill et al.: *Bootstrap Your Own Latent*, NeurIPS 2020, <https://arxiv.org/abs/2006.07733>",
    "simclr": "Chen et al.: *A Simple Framework for Contrastive Learning of Visual Representations*, ICML 2020, "
    "<https://arxiv.org/abs/2002.05709>",
    "moco": "Chen et al.: *Improved Baselines with Momentum Contrastive Learning*, 2020, "
    "<https://arxiv.org/abs/2003.04297>",
}
LOST = f"{METHODS['lost']}: "  # before a model's name, in the table of object discovery


def card(
    config: Config,
    run_name: str,
    name: str,
    backbone_path: str,
    metrics_path: str,
    manifest_path: str | None,
    scores_paths: Sequence[str],
    output: str,
) -> None:
    """Write the card of a model of stage 1 or 3, which the results call `name`.

    `config`: the settings that decide it; `manifest_path`: its photos, of which given weights have none;
    `scores_paths`: results of this model and of those it is to be compared with. No folder is named, and no licence.
    Same inputs, same bytes. Raises InputError, having written nothing.
    """
    made = artifacts.attributes(backbone_path)
    settings, inputs = (json.loads(made.get(key, "{}")) for key in ("settings", "inputs"))
    stage = next((one for one in ("stage3", "stage1") if one in settings), "")
    section = settings.get(stage, {})
    # Random weights know of stage 1 no more than the network.
    if made.get("schema") != artifacts.MODEL or "backbone" not in made or not {"weights", "optimizer"} & set(section):
        raise InputError(f"{backbone_path}: is no backbone.safetensors of stage 1 or 3; name one of these.")
    given = section.get("weights") if stage == "stage1" else None
    last = {key: values[-1] for key, values in read_metrics(metrics_path).items() if len(values)}
    if not last and not given:
        raise InputError(f"{metrics_path}: has no epoch, but the model was trained; train it again.")
    photos = None if given else _photos(backbone_path, manifest_path)
    optimizer = section.get("optimizer", {})
    method = "" if given else "orl" if stage == "stage3" else section["method"]
    kind, measured = made["backbone"], tasks({"": scores_paths})
    roots = {str(artifacts.read_results(path)["data"].get("root")) for path in scores_paths}
    scores = _scores(measured)
    models = sorted({model for _, _, cells in scores for model in cells}, key=rank)
    if measured and _kind(name) not in models:
        raise InputError(f"--scores: no result is of {name!r}, the model of the card; name its results, too.")
    context = {
        "run_name": run_name,
        "name": name,
        "column": _kind(name),
        "kind": kind.replace("resnet", "ResNet-"),
        "method": TITLES.get(method),
        "pairs_by": None if config.stage1.weights else TITLES[config.stage1.method],
        "papers": [PAPERS[one] for one in dict.fromkeys((method, config.stage1.method)) if method],
        "tags": [kind, *(["self-supervised-learning", method] if method else [])],
        "given": given and _plain(Path(given).name),
        "layout": config.data.layout,
        "photos": photos,
        "papers_photos": PAPERS_PHOTOS,
        "is_papers": photos == PAPERS_PHOTOS and optimizer.get("epochs") == 800 and kind == "resnet50",
        "manifest": inputs.get("manifest"),
        "weights": inputs.get("weights"),
        "fingerprint": made["fingerprint"],
        "settings": [] if given else [tuple(map(_plain, row)) for row in _settings(config, stage)],
        "optimizer": optimizer,
        "size": None if given else section["views"]["size"],
        "precision": settings.get("precision"),
        "last": last,
        "models": models,
        "scores": [(*named, [cells.get(model, "–") for model in models]) for *named, cells in scores],
        "notes": [(task.title, " ".join(_notes(task, roots))) for task in measured],
        "mean": list(MEAN),
        "std": list(STD),
        "torchvision": code("torchvision", kind, "backbone.safetensors"),
        "timm": code("timm", kind, "backbone.safetensors"),
        "detectron2": code("detectron2", kind, "detectron2.pth"),
        "result_version": settings.get("version", "unknown"),
        "torch": importlib.metadata.version("torch"),
    }
    artifacts.write_text(output, render("card.jinja", context))


def _photos(backbone_path: str, manifest_path: str | None) -> int:
    """How many photos a model was trained on. Raises InputError where the manifest is another's."""
    if not manifest_path:
        raise InputError("--manifest: is not given, but the model was trained on photos; name their manifest.csv.")
    photos = len(artifacts.read_manifest(manifest_path))
    artifacts.check_input(backbone_path, "manifest", artifacts.fingerprint(manifest_path))
    return photos


def _settings(config: Config, stage: str) -> list[tuple[str, str, str]]:
    """Of the settings that decide a model, those that are not the defaults: key, value, default; no path in them."""
    decide = tuple(f"{key}." for key in USES[f"{stage}_card"])
    rows = [row for row in differing(config) if f"{row[0]}.".startswith(decide)]
    return [
        (key, json.dumps(Path(json.loads(value)).name) if key == "stage1.weights" else value, default)
        for key, value, default in rows
    ]


def _plain(text: str) -> str:
    """Text as it can stand in a cell of a Markdown table, between backticks."""
    return " ".join(text.replace("`", "'").replace("|", "¦").split())


def _kind(model: str) -> str:
    """The name of a model without variant and seed, of which a card is about one."""
    arm = arm_of(model.removeprefix(LOST))[0]
    kind = arm.split("-")[0]
    return kind if kind in MODELS else arm


def _scores(measured: Sequence[Task]) -> list[tuple[str, str, dict[str, str]]]:
    """Task, score and the text of each model, the best in bold; without what tells how models differ.

    Raises InputError where several models are called alike.
    """
    rows = []
    for task in measured:
        for table in task.tables:
            for score, cells in table.scores.items():
                given = [
                    (_kind(model.name), cell) for model, cell in zip(table.models, cells, strict=True) if cell.mean
                ]
                texts = {model: f"**{cell.text}**" if cell.best else cell.text for model, cell in given}
                if len(texts) < len(given):
                    raise InputError(f"--scores: has several variants of a model in {task.title}; name one of each.")
                if texts:
                    title = score if table.title in ("Scores", "Boxes") else f"{table.title}: {score}"
                    rows.append((task.title, title, texts))
    return rows


def _notes(task: Task, roots: set[str]) -> list[str]:
    """What is said of a task's scores, without `roots`, the folders that photos lie in."""
    notes = task.notes
    for root in sorted(roots, key=len, reverse=True):
        notes = [note.replace(f", in {root}", "") for note in notes]
    return notes
