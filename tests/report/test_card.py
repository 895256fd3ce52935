"""`orl card`, of models that are made up: what it tells, in the form that the Hugging Face hub reads."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from test_page import knn, result

from orl import artifacts, cli, config
from orl.config import EXPORTS
from orl.networks import backbones
from orl.networks.export import export
from orl.networks.loading import code

PROJECT = Path(__file__).parents[2]
SETTINGS = {
    "name": "mine",
    "data": {"layout": "folder", "root": "/data/alice"},
    "stage1": {"network": {"backbone": "resnet18"}, "optimizer": {"batch": 4, "epochs": 3}},
    "correspondences": {"ratio": 0.2},
}
FILE = "results/coco/models/orl/backbone.safetensors"  # README's
COLUMNS = ("epoch", "step", "loss", "feature_std", "lr")


class Made:
    """The files of a run's models in a folder, and the command on them."""

    def __init__(self, folder: Path, manifest: Path) -> None:
        self.folder, self.manifest = folder, manifest

    def model(self, stage: str, inputs: dict | None = None, **settings) -> None:
        given = config.parse(config.merge(SETTINGS, settings))
        inputs = {"manifest": artifacts.fingerprint(self.manifest)} if inputs is None else inputs
        stamp = artifacts.stamp(artifacts.MODEL, config.used(given, stage), inputs)
        attributes = {**stamp, "backbone": given.stage1.network.backbone}
        artifacts.write_weights(self.folder / "backbone.safetensors", {"weight": torch.zeros(1)}, attributes)
        rows = [(1, 5, 3.5, 0.5, 0.1), (3, 15, 1.25, 0.75, 0.1)] if "weights" not in inputs else []
        artifacts.write_csv(self.folder / "metrics.csv", COLUMNS, rows)
        self.settings = json.dumps(given.model_dump(mode="json", exclude={"variants"}))

    def card(self, name: str, *results: dict, manifest: bool = True) -> str:
        files = []
        for number, one in enumerate(results):
            files.append(str(self.folder / f"{number}.json"))
            artifacts.write_json(files[-1], one)
        output = self.folder / "README.md"
        of_photos = ["--manifest", str(self.manifest)] if manifest else []
        named = [f"--{key}={self.folder / file}" for key, file in (
            ("backbone", "backbone.safetensors"), ("metrics", "metrics.csv"), ("output", "README.md"))]  # fmt: skip
        cli.main(["card", "--settings", self.settings, "--run-name", "mine", "--name", name, *named, *of_photos,
                  "--scores", *files])  # fmt: skip
        return output.read_text()


@pytest.fixture
def made(tmp_path, manifest_path):
    return Made(tmp_path, manifest_path)


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def rows(text, heading):
    """The cells of the Markdown table that follows a heading."""
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def test_a_card_of_orl(made):
    made.model("stage3")
    text = made.card(
        "orl-k5.seed1", result("orl-k5.seed1", 64.0), result("stage1.seed1", 62.0), result("random.seed1", 20.0),
        knn("orl-k5.seed1", {"5": 50.0}), knn("stage1.seed1", {"5": 55.0}),
    )  # fmt: skip
    assert head(text) == {
        "library_name": "torchvision",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["resnet18", "self-supervised-learning", "orl"],
    }
    assert "\n# orl-k5.seed1 of run mine: a ResNet-18 by ORL\n" in text
    assert "found by a first model, of BYOL" in " ".join(text.split())
    assert "https://arxiv.org/abs/2106.11952" in text
    assert "https://arxiv.org/abs/2006.07733" in text
    assert "- Photos: 10, of a folder" in text
    assert f"`{artifacts.fingerprint(made.manifest)}`" in text
    assert "- Length: 3 epochs, 15 steps, 4 photos a step" in text
    assert "loss 1.25, feature spread 0.75" in text
    table = rows(text, "Training")
    assert ["`correspondences.ratio`", "`0.2`", "`0.1`"] in table
    assert ["`stage3.optimizer.epochs`", "`3`", "`800`"] in table
    first, _, svm, *others = rows(text, "Scores")
    assert first == ["task", "score", "random", "stage1", "orl"]
    assert svm == ["VOC07 linear SVM", "mAP", "20.00", "62.00", "**64.00**"]
    assert next(row[2:] for row in others if row[1].startswith("Top-1")) == ["–", "**55.0**", "50.0"]
    assert "**Not comparable with published scores** of ORL" in text
    assert text.endswith(f"`{artifacts.fingerprint(made.folder / 'backbone.safetensors')}`\n")
    assert "license:" not in text
    assert text == made.card(
        "orl-k5.seed1", result("orl-k5.seed1", 64.0), result("stage1.seed1", 62.0), result("random.seed1", 20.0),
        knn("orl-k5.seed1", {"5": 50.0}), knn("stage1.seed1", {"5": 55.0}),
    )  # fmt: skip


def test_no_folder_is_named(made):
    made.model("stage3", stage1={"weights": "/users/alice/a.pth", "network": {"backbone": "resnet18"}})
    score = result("orl", 64.0)
    score["data"]["root"] = "/users/alice/voc"
    text = made.card("orl", score)
    assert "whose weights were given" in text
    assert '`stage1.weights` | `"a.pth"`' in text
    assert "photos of" in text  # what it was measured on
    assert not [word for word in ("alice", "/data", str(made.folder), str(made.manifest.parent)) if word in text]


def test_a_card_of_stage_1_on_scenes_without_scores(made):
    made.model("stage1", data={"layout": "scenes", "root": None}, stage1={"method": "simclr"})
    text = made.card("stage1")
    assert head(text)["tags"] == ["resnet18", "self-supervised-learning", "simclr"]
    assert "stage 1 of ORL" in text
    assert "2002.05709" in text
    assert "2106.11952" not in text
    assert "drawn by a program" in text
    assert "No task has measured this model.\n\n## Loading it" in text  # nothing that could be compared


def test_a_card_of_given_weights(made):
    made.model("stage1", {"weights": "abc"}, stage1={"weights": "/users/alice/a`|b.pth"})
    text = made.card("stage1", result("stage1", 62.0), manifest=False)
    assert head(text)["tags"] == ["resnet18"]
    assert "did not train: it took its stage 1 from the file `a'¦b.pth` (SHA-256\n`abc`)" in text
    assert "alice" not in text
    assert "None here." in text
    assert "800 epochs" not in text


def test_the_hubs_own_tool_reads_it(made):
    hub = pytest.importorskip("huggingface_hub")
    made.model("stage3")
    text = made.card("orl", result("orl", 64.0))
    found = hub.ModelCard(text)
    assert found.data.library_name == "torchvision"
    assert found.data.pipeline_tag == "image-feature-extraction"
    assert found.data.license is None
    assert found.text.strip().startswith("# orl of run mine")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("random", "backbone.safetensors: is no backbone.safetensors of stage 1 or 3"),
        ("other photos", "backbone.safetensors: was made from another manifest"),
        ("no photos", "--manifest: is not given, but the model was trained"),
        ("no epoch", "metrics.csv: has no epoch"),
        ("another model", "--scores: no result is of 'orl'"),
        ("two of one", "--scores: has several variants of a model in VOC07 linear SVM"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(made, change, sentence, capsys):
    made.model({"random": "random"}.get(change, "stage3"), {"manifest": "x"} if change == "other photos" else None)
    if change == "no epoch":
        artifacts.write_csv(made.folder / "metrics.csv", COLUMNS, [])
    results = {"another model": ["stage1"], "two of one": ["orl", "orl-k5"]}.get(change, ["orl"])
    with pytest.raises(SystemExit) as end:
        made.card("orl", *(result(name, 1.0) for name in results), manifest=change != "no photos")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not (made.folder / "README.md").exists()


# The lines that load it


@pytest.fixture(scope="module", params=["resnet10", "resnet18", "resnet50"])
def weights(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = backbones.backbone(request.param)
    stamp = artifacts.stamp(artifacts.MODEL, {}, {})
    backbones.save(folder / FILE, request.param, model, stamp)
    return request.param, model.eval(), folder


def run_code(text, expected, drop_classifier):
    names = {}
    exec(text, names)
    found = names["model"].eval()
    if drop_classifier:
        found.fc = torch.nn.Identity()
    images = torch.randn(1, 3, 40, 32)
    with torch.inference_mode():
        torch.testing.assert_close(found(images), expected(images))


@pytest.mark.parametrize("framework", ["torchvision", "timm"])
def test_the_lines_load_our_file_and_the_exported_one(weights, framework, monkeypatch):
    pytest.importorskip(framework)
    kind, model, folder = weights
    monkeypatch.chdir(folder)
    lines = code(framework, kind, FILE)
    assert len(lines.replace("\n\n", "\n").splitlines()) <= 3
    run_code(lines, model, framework == "torchvision")
    export(FILE, framework, f"{framework}{EXPORTS[framework]}")
    if framework == "timm":
        run_code(code(framework, kind, "timm.safetensors"), model, False)
    else:  # as README says
        other = code(framework, kind, "torchvision.pth").replace("safetensors.torch.load_file", "torch.load")
        run_code(other.replace("import safetensors.torch", "import torch"), model, True)


def test_the_lines_load_it_in_detectron2(weights, monkeypatch):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed: no package index has it")
    kind, model, folder = weights
    if kind == "resnet10":
        assert code("detectron2", kind, "detectron2.pth") == ""
        return
    monkeypatch.chdir(folder)
    export(FILE, "detectron2", "detectron2.pth")
    names = {}
    exec(
        code("detectron2", kind, "detectron2.pth").replace("MODEL.RESNETS", "MODEL.DEVICE cpu MODEL.RESNETS", 1), names
    )
    found = names["model"].backbone.bottom_up.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(found(images)["res5"], model.stages(images)[-1])


def test_the_lines_of_the_readme_are_these():
    section = (
        (PROJECT / "README.md").read_text().partition("## Weights for other frameworks\n")[2].partition("\n## ")[0]
    )
    blocks = re.findall(r"```python\n(.*?)\n```", section, re.DOTALL)
    files = {"torchvision": FILE, "timm": FILE, "detectron2": "detectron2.pth"}
    assert blocks == [code(form, "resnet50", file) for form, file in files.items()]
