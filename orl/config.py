"""Every setting: its default (the paper's value), its source and its bounds. The settings' only home.

Scientific settings decide results; `compute` decides only how fast they come and never enters a fingerprint.
`python -m orl.config` rewrites workflow/schemas/config.schema.yaml and the table of config/README.md.
"""

import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from orl import InputError

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError(f"must be two positive numbers, the smaller first, not {list(pair)}")
    return pair


def _index(text: str) -> str:
    # FAISS crashes on counts of 0.
    if not re.fullmatch(r"[\w,()+]+", text) or re.search(r"[A-Za-z]0", text):
        raise ValueError("must be a FAISS index, such as Flat or IVF4096,Flat")
    return text


def _different(values: list) -> list:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"names {twice!r} twice; remove one")
    return values


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]


class Section(BaseModel):
    """A part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Scenes(Section):
    """The generated scenes (`data.layout: scenes`)."""

    train: Positive = 600
    """Scenes to pre-train on; also the labelled training split."""
    val: Positive = 200
    """Scenes of the labelled test split."""
    objects_train: Positive = 20
    """Single-object pictures per class, training split."""
    objects_val: Positive = 10
    """Single-object pictures per class, test split."""
    size: Annotated[tuple[Annotated[int, Field(ge=64)], int], AfterValidator(_ascending)] = (128, 160)
    """Shortest and longest side of a scene, pixels."""
    background_correlation: Probability = 0.5
    """How often the background family is the theme's own."""
    theme_share: Probability = 0.7
    """Share of objects drawn from the theme's three classes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the scenes, apart from the run's: other seeds train on the same photos."""


class Data(Section):
    """The photos to pre-train on."""

    layout: Literal["scenes", "coco", "folder"] = "scenes"
    """`scenes`: generated; `coco`: image folders of a COCO tree; `folder`: any folder, searched recursively."""
    root: str | None = None
    """Folder of the photos (not for `scenes`); manifest paths are relative to it."""
    folders: list[str] = ["train2017"]
    """Image folders under `root` (`coco`); each is a part of the manifest. COCO+ adds unlabeled2017."""
    annotations: dict[str, str] = {}
    """Per image folder, a COCO JSON under `root` that lists its photos (`coco`); without one, all its files."""
    objects: Annotated[list[str], AfterValidator(_different)] = []
    """COCO JSONs or folders of VOC XML files, under `root`, with the objects' boxes; none: those of `annotations`."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Whether photos are turned as their EXIF orientation says; phone photos want `apply`."""
    scenes: Scenes = Scenes()


class Network(Section):
    """Backbone and heads (ORL release, stage 1)."""

    backbone: Literal["resnet10", "resnet18", "resnet50"] = "resnet50"
    """Backbone; keys as in torchvision."""
    hidden: Positive = 4096
    """Hidden width of projector and predictor."""
    projection: Positive = 256
    """Output width of projector and predictor."""


class Views(Section):
    """Crops and photometric augmentation of a view (ORL release, stage 1). Pairs are view 1, view 2."""

    size: Annotated[int, Field(ge=16)] = 224
    """Side of a view, pixels."""
    scale: Range = (0.08, 1.0)
    """Share of the photo's area that a crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Aspect of a crop, width / height."""
    flip_p: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_p: Probability = 0.8
    """Probability of colour jitter."""
    grayscale_p: Probability = 0.2
    """Probability of grayscale."""
    blur_p: tuple[Probability, Probability] = (1.0, 0.1)
    """Probability of Gaussian blur."""
    blur_radius: Range = (0.1, 2.0)
    """Range of the blur's radius (Pillow's standard deviation), pixels of the view."""
    solarize_p: tuple[Probability, Probability] = (0.0, 0.2)
    """Probability of solarisation at threshold 128."""
    reduced_decode: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 where all crops of a sample allow it: faster, slightly other pixels."""


class Optimizer(Section):
    """SGD, its schedule, and the EMA (ORL release, stage 1)."""

    batch: Annotated[int, Field(ge=2)] = 512
    """Photos per optimizer step; an epoch's last, smaller batch is dropped."""
    epochs: Positive = 800
    """Epochs."""
    lr: Annotated[float, Field(gt=0)] = 0.4
    """Base learning rate at batch 512; scaled linearly with the batch."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 4
    """Epochs of linear warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum."""
    weight_decay: NonNegative = 1e-4
    """Weight decay, on all trained parameters."""
    ema: Annotated[float, Field(ge=0, le=1)] = 0.99
    """EMA momentum of the target network at the first step; it rises to 1 on a cosine (`moco`: constant)."""
    lars_trust: Annotated[float, Field(gt=0)] = 0.001
    """Trust coefficient of LARS, with which `simclr` trains; the others train with plain SGD."""
    accumulation: Positive = 1
    """Parts into which a step's batch is cut for want of memory; batch statistics are then those of a part."""


class Stage1(Section):
    """Image-level pre-training. The defaults are byol's; those of the other methods are listed below."""

    method: Literal["byol", "simclr", "moco"] = "byol"
    """Self-supervised objective: BYOL, SimCLR or MoCo v2."""
    weights: str | None = None
    """File of weights to use instead of training (docs/guides/weights.md); `stage1` then only serves stage 3."""
    network: Network = Network()
    views: Views = Views()
    optimizer: Optimizer = Optimizer()
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Temperature of the contrastive loss (`simclr`, `moco`)."""
    queue: Positive = 65536
    """Keys of earlier photos that serve as negatives (`moco`); it starts as noise: with few photos, keep it short."""
    shuffled_batch: Annotated[int, Field(ge=2)] = 32
    """Photos that share batch statistics, keys shuffled among them (`moco`; the paper's 256 on 8 GPUs)."""


# Defaults of `stage1` by method, where they differ from byol's (ORL release, benchmark configs on COCO).
METHODS: dict[str, dict] = {
    "simclr": {
        "network": {"hidden": 2048, "projection": 128},
        "views": {"jitter": [0.8, 0.8, 0.8, 0.2], "blur_p": [0.5, 0.5], "solarize_p": [0.0, 0.0]},
        "optimizer": {"lr": 0.6, "weight_decay": 1e-6, "warmup_epochs": 10},
    },
    "moco": {
        "network": {"hidden": 2048, "projection": 128},
        "views": {
            "scale": [0.2, 1.0],
            "jitter": [0.4, 0.4, 0.4, 0.1],
            "blur_p": [0.5, 0.5],
            "solarize_p": [0.0, 0.0],
        },
        "optimizer": {"batch": 256, "lr": 0.6, "warmup_epochs": 0, "ema": 0.999},  # 0.6 at batch 512 is 0.3 at 256
        "temperature": 0.2,
    },
}


class Embeddings(Section):
    """Image embeddings: short side to `resize`, centre crop (ORL release, stage 2)."""

    resize: Annotated[int, Field(ge=16)] = 256
    """Short side after resizing, pixels."""
    crop: Annotated[int, Field(ge=16)] = 224
    """Side of the centre crop, pixels."""
    precision: Precision = "auto"
    """Arithmetic; auto: float16 on a GPU, float32 on the CPU (release: float32)."""

    @model_validator(mode="after")
    def _crop_fits(self) -> "Embeddings":
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} does not fit into resize {self.resize}; make it smaller")
        return self


class Proposals(Section):
    """Selective search and its greedy filter (ORL release, stage 2)."""

    method: Literal["fast", "quality", "random", "grid", "whole"] = "fast"
    """Selective search, `fast` or `quality`; or boxes that ignore what the photo shows: random, a grid, the whole."""
    long_side: Annotated[int, Field(ge=16)] | None = None
    """Longest side of the photo that selective search sees, pixels; not given: full size. About 300 is much faster."""
    min_size: Annotated[int, Field(ge=1)] = 96
    """Smallest width and height of a kept box, pixels."""
    min_share: Probability = 0.0
    """The same as a share of the photo's shorter side, where that is more: 0.2 is 96 of 480 pixels, 605 of 3024."""
    max_aspect: Annotated[float, Field(ge=1)] = 3.0
    """Largest width / height and height / width of a kept box."""
    max_iou: Probability = 0.5
    """Largest IoU with a box already kept."""
    top_n: Annotated[int, Field(ge=1, le=65535)] = 100
    """Boxes kept per photo at most."""


class Neighbors(Section):
    """Image neighbours by cosine similarity (ORL release, stage 2)."""

    method: Literal["nearest", "random"] = "nearest"
    """The most similar photos; or, to compare with, random ones."""
    k: Positive = 10
    """Neighbours per photo; clipped to the number of other photos."""
    index: Annotated[str, AfterValidator(_index)] = "Flat"
    """`Flat`: exact search; for millions of photos, text for FAISS's index_factory: `IVF4096,Flat`, `HNSW32`."""
    parameters: Annotated[str, Field(pattern=r"^\w+=[1-9][0-9.]*(,\w+=[1-9][0-9.]*)*$")] | None = None
    """Search parameters of an `index` other than `Flat`: `nprobe=32`, `efSearch=64`; not given: FAISS's."""
    scope: Literal["all", "within", "across"] = "all"
    """Neighbours are any photos, those of the same part of the manifest (an image folder of `coco`), or of others."""

    @model_validator(mode="after")
    def _parameters_fit(self) -> "Neighbors":
        if self.parameters and self.index == "Flat":
            raise ValueError("parameters are for an approximate index, but index is Flat; leave one out")
        if self.method == "random" and self.index != "Flat":
            raise ValueError(f"index {self.index} is for the nearest, but method is random; leave one out")
        return self


class Rois(Section):
    """RoI features: pooled backbone features of resized crops (ORL release, stage 2)."""

    size: Annotated[int, Field(ge=16)] = 224
    """Side to which a RoI is resized (aspect not kept), pixels."""
    precision: Precision = "auto"
    """Arithmetic; auto: float16 on a GPU, float32 on the CPU (release: float32)."""


class Correspondences(Section):
    """RoI pairs between a photo and each of its neighbours (ORL release, stage 2)."""

    method: Literal["similar", "random"] = "similar"
    """The most similar pairs; or, to compare with, as many random ones."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Pairs kept per neighbour, as a share of the number of the photo's RoIs; at least one."""


class RoiJitter(Section):
    """The jittered copy of a RoI (ORL release, stage 3)."""

    shift: NonNegative = 0.5
    """Largest shift of the centre, as a share of the RoI's sides."""
    scale: Range = (0.5, 2.0)
    """Area of the copy relative to the RoI's."""
    ratio: Range = (0.5, 2.0)
    """Absolute aspect of the copy, width / height, log-uniform."""
    min_iou: Probability = 0.5
    """The copy must overlap the RoI by more than this IoU."""
    attempts: Positive = 200
    """Tries before the RoI itself is used."""


class Stage3(Section):
    """Object-level pre-training. `network`, `views` and `optimizer` are stage 1's where not given."""

    network: Network = Network()
    views: Views = Views()
    optimizer: Optimizer = Optimizer()
    patch: Annotated[int, Field(ge=16)] = 96
    """Side of a RoI patch, pixels."""
    jitter: RoiJitter = RoiJitter()
    global_weight: NonNegative = 1.0
    """Weight of the image-level loss."""
    intra_weight: NonNegative = 1.0
    """Weight of the loss between a RoI and its jittered copy."""
    inter_weight: NonNegative = 1.0
    """Weight of the loss between corresponding RoIs of two photos."""

    @model_validator(mode="after")
    def _some_loss(self) -> "Stage3":
        if self.global_weight == self.intra_weight == self.inter_weight == 0:
            raise ValueError("global_weight, intra_weight and inter_weight are all 0; at least one loss must count")
        return self


Several = Field(min_length=1), AfterValidator(_different)
Costs = Annotated[list[Annotated[float, Field(gt=0)]], *Several]
COSTS = [*(0.5**i for i in range(19, 3, -1)), 1.0, 10.0, 100.0]
Stages = Annotated[list[Annotated[int, Field(ge=1, le=5)]], *Several]


class Voc07Svm(Section):
    """Multi-label linear SVM by VOC07's protocol (ORL release, benchmarks)."""

    layout: Literal["voc", "coco"] = "voc"
    """Layout of the labels: VOCdevkit/VOC2007, or COCO with annotations/instances_SPLIT.json."""
    root: str | None = None
    """Folder of the labelled photos; not given: the generated scenes where `data.layout` is scenes, else no SVM."""
    train: str | None = None
    """Training split; not given: trainval (voc), train2017 (coco)."""
    test: str | None = None
    """Test split; not given: test (voc), val2017 (coco)."""
    resize: Annotated[int, Field(ge=32)] = 256
    """Short side before squashing, pixels."""
    size: Annotated[int, Field(ge=32)] = 224
    """Side of the squashed photo, pixels."""
    stages: Stages = [1, 2, 3, 4, 5]
    """Stages of the backbone whose features are evaluated; the last is the result by which models are compared."""
    costs: Costs = COSTS
    """SVM costs, of which each class takes the one with the best cross-validated AP."""
    folds: Annotated[int, Field(ge=2)] = 3
    """Folds of the cross-validation (stratified, unshuffled)."""


class Voc07Lowshot(Section):
    """SVMs on few photos of each class (ORL release, benchmarks); photos and features are those of `voc07_svm`."""

    shots: Annotated[list[Positive], *Several] = [1, 2, 4, 8, 16, 32, 64, 96]
    """Positive photos per class; with 19 times as many negative ones."""
    samples: Positive = 5
    """Independent samples of photos, of which mean and standard deviation are given."""
    lists: str | None = None
    """Folder of the official samples (`{...}targets_sample{n}_k{k}.npy`); not given: they are drawn by `seed`."""
    protocol: Literal["release", "clean"] = "release"
    """How the cost is chosen: one per number of shots by the *test* mAP, as published; or by cross-validation."""
    costs: Costs = COSTS
    """SVM costs."""
    folds: Annotated[int, Field(ge=2)] = 3
    """Folds of the cross-validation (`clean`)."""


class LabelledSet(Section):
    """A set of photos with one class each, such as ImageNet."""

    root: str | None = None
    """Folder of the set; not given: the generated objects where `data.layout` is scenes, else it is left out."""
    train: str = "train"
    """Training photos: a folder under `root` with a folder per class, or a list file (`path label` in each line)."""
    val: str = "val"
    """Test photos, likewise."""
    preset: Literal["imagenet", "places205", "inaturalist18"] | None = None
    """Whose schedule and augmentation `linear` takes (not given: imagenet's), and how many classes there must be."""
    tasks: list[Literal["linear", "semi", "knn"]] = ["linear", "semi", "knn"]
    """The tasks that this set is for."""
    lists: dict[str, str] = {}
    """Share of the labels -> file of its photos (`semi`): `0.01: 1percent.txt`; without one they are drawn by seed."""


class Linear(Section):
    """Linear classification on frozen features, a head for each stage (ORL release, benchmarks)."""

    stages: Stages = [1, 2, 3, 4, 5]
    """Stages of the backbone with a head each."""
    epochs: Positive | None = None
    """Epochs; not given: the set's preset (28, 14 or 84)."""
    milestones: list[Positive] | None = None
    """Epochs after which the rate falls to a tenth; not given: the set's preset."""
    batch: Annotated[int, Field(ge=2)] = 256
    """Photos per step; fewer where there are not so many."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate, whatever the batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum (Nesterov's)."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of the heads."""
    resize: Annotated[int, Field(ge=32)] = 256
    """Short side of a test photo before its centre crop, pixels."""
    size: Annotated[int, Field(ge=32)] = 224
    """Side of training and test crops, pixels."""

    @model_validator(mode="after")
    def _both_or_none(self) -> "Linear":
        if (self.epochs is None) != (self.milestones is None):
            raise ValueError("epochs and milestones go together; give both or neither")
        return self


class Semi(Section):
    """Fine-tuning on few labels (ORL release, benchmarks)."""

    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], *Several] = [0.01, 0.1]
    """Shares of the labels."""
    weight_decay: list[NonNegative] = [5e-4, 1e-4]
    """Weight decay for each share."""
    lr: Costs = [0.001, 0.01, 0.1]
    """Learning rates of the grid, whatever the batch."""
    head: Costs = [1.0, 10.0, 100.0]
    """Multiples of the learning rate for the linear head; a training for each rate and each of these."""
    runs: Positive = 5
    """Trainings with the best of the grid, its own included, of which mean and standard deviation are given."""
    epochs: Positive = 20
    """Epochs."""
    milestones: list[Positive] = [12, 16]
    """Epochs after which the rate falls to a fifth."""
    batch: Annotated[int, Field(ge=2)] = 256
    """Photos per step; fewer where there are not so many."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum."""
    resize: Annotated[int, Field(ge=32)] = 256
    """Short side of a test photo before its centre crop, pixels."""
    size: Annotated[int, Field(ge=32)] = 224
    """Side of training and test crops, pixels."""

    @model_validator(mode="after")
    def _as_many(self) -> "Semi":
        if len(self.weight_decay) != len(self.shares):
            raise ValueError("weight_decay must name one number for each of shares; add or remove some")
        return self


class Knn(Section):
    """Weighted k-nearest-neighbour classification on pooled features, without training (Wu et al., 2018)."""

    k: Annotated[list[Positive], *Several] = [20, 200]
    """Neighbours that vote."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """A neighbour's vote counts exp(similarity / temperature)."""
    resize: Annotated[int, Field(ge=32)] = 256
    """Short side of a photo before its centre crop, pixels."""
    size: Annotated[int, Field(ge=32)] = 224
    """Side of the centre crop, pixels."""


class Detection(Section):
    """Mask R-CNN with a feature pyramid, all layers fine-tuned (ORL supplement)."""

    root: str | None = None
    """Folder in COCO layout, with masks; not given: the generated scenes where there are any, else it is left out."""
    train: str = "train2017"
    """Training split: its folder of photos, and annotations/instances_SPLIT.json."""
    test: str = "val2017"
    """Test split, likewise."""
    schedule: Literal["1x", "2x"] = "1x"
    """1x: 90,000 iterations, the rate falls to a tenth after 60,000 and 80,000; 2x: twice as many of each."""
    iterations: Positive | None = None
    """Iterations instead of the schedule's, at batch 16."""
    milestones: list[Positive] | None = None
    """Iterations after which the rate falls to a tenth, at batch 16; they go with `iterations`."""
    batch: Positive = 16
    """Photos per step; of others than 16, `lr` is scaled linearly, and iterations, milestones and warm-up inversely."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate at batch 16."""
    warmup: Annotated[int, Field(ge=0)] = 1000
    """Iterations of linear warm-up from a thousandth of the rate, at batch 16."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum."""
    weight_decay: NonNegative = 1e-4
    """Weight decay, 0 on the parameters of norms."""
    short_sides: Annotated[list[Annotated[int, Field(ge=32)]], *Several] = [640, 672, 704, 736, 768, 800]
    """Short sides of a training photo, pixels; one is drawn for each."""
    test_side: Annotated[int, Field(ge=32)] = 800
    """Short side of a test photo, pixels."""
    long_side: Annotated[int, Field(ge=32)] = 1333
    """Longest side of any, pixels; it outweighs the short one."""
    channels: Positive = 256
    """Width of the pyramid, and of the convolutions of box and mask head."""
    rois: Annotated[int, Field(ge=4)] = 512
    """RoIs of a photo that box and mask head are trained on."""
    precise_bn: Annotated[int, Field(ge=0)] = 200
    """Iterations over which batch statistics are estimated anew before testing."""

    @model_validator(mode="after")
    def _both_or_none(self) -> "Detection":
        if (self.iterations is None) != (self.milestones is None):
            raise ValueError("iterations and milestones go together; give both or neither")
        return self


class Segmentation(Section):
    """A linear layer on the frozen last stage names each pixel's class; photos and masks are those of `detection`."""

    resize: Annotated[int, Field(ge=32)] = 512
    """Short side of a photo before its centre crop, pixels."""
    size: Annotated[int, Field(ge=32)] = 448
    """Side of the centre crop, pixels."""
    epochs: Positive = 10
    """Epochs."""
    milestones: list[Positive] = [6, 8]
    """Epochs after which the rate falls to a tenth."""
    batch: Annotated[int, Field(ge=2)] = 64
    """Photos per step; fewer where there are not so many."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate, whatever the batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum."""
    weight_decay: NonNegative = 1e-4
    """Weight decay."""

    @model_validator(mode="after")
    def _crop_fits(self) -> "Segmentation":
        if self.size > self.resize:
            raise ValueError(f"size {self.size} does not fit into resize {self.resize}; make it smaller")
        return self


class Localization(Section):
    """Boxes found without labels, on the run's own photos whose objects are annotated."""

    side: Annotated[int, Field(ge=32)] = 480
    """Short side of a photo whose feature map is searched for objects, pixels."""
    expand: Positive = 100
    """Patches at most that a seed is expanded to (LOST)."""
    boxes: Positive = 5
    """Boxes per photo at most."""


class Attention(Section):
    """Maps of what a model looks at, for some of the run's photos."""

    photos: Positive = 8
    """Photos, drawn by `seed`."""
    ids: list[str] = []
    """image_id of the photos, instead."""
    side: Annotated[int, Field(ge=32)] = 480
    """Short side of a photo, pixels."""


Labelled = Literal["voc07_svm", "voc07_lowshot", "linear", "semi", "knn", "detection", "segmentation"]
Task = Literal["all", Labelled, "localization", "attention"]


class Downstream(Section):
    """Evaluations of every model."""

    tasks: list[Task] = ["all"]
    """Tasks to do, of those whose data are given."""
    voc07_svm: Voc07Svm = Voc07Svm()
    voc07_lowshot: Voc07Lowshot = Voc07Lowshot()
    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], LabelledSet] = {}
    """Name -> a set with one class a photo, for `linear`, `semi` and `knn`; its keys are listed below."""
    linear: Linear = Linear()
    semi: Semi = Semi()
    knn: Knn = Knn()
    detection: Detection = Detection()
    segmentation: Segmentation = Segmentation()
    localization: Localization = Localization()
    attention: Attention = Attention()

    @model_validator(mode="after")
    def _lists_of_shares(self) -> "Downstream":
        for name, one in self.sets.items():
            odd = next((key for key in one.lists if key not in map(str, self.semi.shares)), None)
            if odd is not None:
                raise ValueError(f"sets.{name}.lists: {odd} is none of semi.shares, {self.semi.shares}; correct either")
        return self


Shards = Annotated[int, Field(ge=1, le=1000)]


class ShardCounts(Section):
    """Into how many jobs a stage is cut, each of a range of photos."""

    embeddings: Shards = 1
    """Jobs of `embed`."""
    proposals: Shards = 1
    """Jobs of `propose`."""
    rois: Shards = 1
    """Jobs of `rois`."""
    correspondences: Shards = 1
    """Jobs of `correspond`."""


class Compute(Section):
    """How fast, never what: changing these reruns nothing."""

    threads: Positive = 8
    """CPU threads of one job at most, of a training for each GPU (Snakemake gives what `--cores` allows)."""
    gpus: Annotated[int, Field(ge=0)] = 8
    """GPUs that a training asks for at most (other GPU jobs: one); it takes what there is, and the CPU without one."""
    nodes: Positive = 1
    """Nodes that stages 1 and 3 train on together, with `gpus` on each; more than one only under SLURM."""
    shards: ShardCounts = ShardCounts()
    checkpoint_minutes: Positive = 15
    """Minutes between checkpoints inside an epoch; every epoch's end saves one too."""
    log_every: Positive = 50
    """Steps between two lines of the training log."""
    compile: bool = False
    """Compile the training step (torch.compile; it needs a C++ compiler)."""
    deterministic: bool = False
    """Only deterministic operations on a GPU, so that resuming is bit-equal there, too; slower."""
    faster_coco_eval: bool = False
    """Detections are evaluated by faster-coco-eval, where it is installed, instead of pycocotools."""


Format = Literal["torchvision", "timm", "detectron2", "mmdet"]
EXPORTS: dict[Format, str] = {"torchvision": ".pth", "timm": ".safetensors", "detectron2": ".pth", "mmdet": ".pth"}
Measured = Literal["random", "stage1", "pairs", "orl"]


class Config(Section):
    """A run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "scenes"
    """Name of the run; everything lies under results/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice."""
    repeats: Annotated[int, Field(ge=1, le=100)] = 1
    """How often all is done, with seeds `seed`, `seed` + 1, …; the report then gives mean and standard error."""
    rounds: Annotated[int, Field(ge=1, le=10)] = 1
    """How often stages 2 and 3 are done: from the second on, stage 2 takes the ORL weights of the round before."""
    measure: list[Measured] = ["random", "stage1", "pairs", "orl"]
    """Models to evaluate, and stage 2's boxes and pairs; what none of these needs is not made."""
    precision: Precision = "auto"
    """Arithmetic of training, `linear` and `semi` included; auto: bfloat16 on a GPU, float32 on the CPU."""
    supervised: str | None = None
    """File of weights that were trained with labels, to be evaluated beside the others, as model `supervised`."""
    export: Annotated[list[Format], AfterValidator(_different)] = []
    """Formats in which the trained backbones are written as well, for other frameworks."""
    data: Data = Data()
    stage1: Stage1 = Stage1()
    embeddings: Embeddings = Embeddings()
    proposals: Proposals = Proposals()
    neighbors: Neighbors = Neighbors()
    rois: Rois = Rois()
    correspondences: Correspondences = Correspondences()
    stage3: Stage3 = Stage3()
    downstream: Downstream = Downstream()
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")], dict[str, Any]] = {}
    """Name -> any settings that differ (not name, data or compute); stages that agree are shared."""
    compute: Compute = Compute()


LABELS = ("layout", "root", "train", "test", "stages")
SEMI_RUN = ("shares", "weight_decay", "epochs", "milestones", "batch", "momentum", "resize", "size")
MASKS = tuple(f"downstream.detection.{key}" for key in ("root", "train", "test"))
PHOTOS = ("data.layout", "data.exif", "data.scenes")
DISCOVERS = ("stage1", "embeddings", "proposals", "neighbors", "rois", "correspondences")
FEATURES = ("downstream.voc07_svm.resize", "downstream.voc07_svm.size")

# What each stage's result depends on beside its input files; `data.exif` decides what a decoded photo is.
USES: dict[str, tuple[str, ...]] = {
    "scenes": ("data.scenes",),
    "manifest": ("data.layout", "data.folders", "data.annotations", "data.exif"),
    "random": ("seed", "stage1.network"),
    "stage1": ("seed", "precision", "data.exif", "stage1"),
    "embeddings": ("data.exif", "embeddings"),
    "proposals": ("seed", "data.exif", "proposals"),
    "neighbors": ("seed", "neighbors"),
    "rois": ("data.exif", "rois"),
    "correspondences": ("seed", "correspondences"),
    "stage3": ("seed", "precision", "data.exif", "stage3"),
    "supervised": ("supervised",),
    "features": ("data.exif", *(f"downstream.voc07_svm.{key}" for key in LABELS), *FEATURES),
    "voc07_svm": (*(f"downstream.voc07_svm.{key}" for key in (*LABELS, "costs", "folds")), *FEATURES),
    "voc07_lowshot": ("seed", "downstream.voc07_lowshot", *(f"downstream.voc07_svm.{key}" for key in LABELS)),
    # Of a labelled set, as TASK.SET: with the set's own settings.
    "set_features": ("data.exif", "downstream.knn.resize", "downstream.knn.size"),
    "knn": ("downstream.knn",),
    "linear": ("seed", "precision", "data.exif", "downstream.linear"),
    "subset": ("seed", "downstream.semi.shares", "downstream.semi.weight_decay"),
    "semi": ("seed", "precision", "data.exif", "downstream.semi"),
    # One training of it: others of the grid, and more runs, change nothing.
    "semi_run": ("seed", "precision", "data.exif", *(f"downstream.semi.{key}" for key in SEMI_RUN)),
    "detection": ("seed", "precision", "data.exif", "downstream.detection"),
    "segmentation": ("seed", "precision", "data.exif", "downstream.segmentation", *MASKS),
    "localization": ("data.exif", "downstream.localization"),
    "attention": ("seed", "measure", "data.exif", "downstream.attention"),
    "export": (),
    "stage1_card": ("seed", "precision", *PHOTOS, "stage1"),
    "stage3_card": ("seed", "precision", *PHOTOS, *DISCOVERS, "stage3"),
    "proposals_recall": ("proposals.min_size",),
    "pair_boxes": ("downstream.localization.boxes",),
    "pair_precision": ("seed",),
    "report": ("data.exif",),
}

# Raise a stage's number when its code gives other results: what was made before is then made again.
RESULT_VERSION: dict[str, int] = {
    **dict.fromkeys(USES, 1),
    "embeddings": 2,
    "neighbors": 2,
    "pair_precision": 2,
    "report": 4,
    "rois": 2,
    "stage1": 4,
    "stage3": 4,
    "voc07_svm": 4,
}

SHARED_WITH_STAGE1 = ("network", "views", "optimizer")


def merge(base: dict, change: dict) -> dict:
    """`base` with the keys of `change` laid over it, mappings merged key by key."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _model_at(path: list) -> type[BaseModel] | None:
    """The section that holds key `path[-1]`."""
    model: Any = Config
    for key in path[:-1]:
        if typing.get_origin(model) is dict:
            model = typing.get_args(model)[1]
            continue
        field = model.model_fields.get(key) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = field.annotation if field else None
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _sentence(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "[key]"]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        model = _model_at(path)
        known = list(model.model_fields) if model else []
        near = difflib.get_close_matches(path[-1], known, 1, 0.0)
        return f"{source}: unknown key {key!r}; did you mean {'.'.join([*path[:-1], *near])!r}?"
    reason = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = "" if isinstance(value, dict) or reason in str(value) else f" (found {value!r})"
    return f"{source}: {key}: {reason[:1].lower()}{reason[1:]}{shown}; see config/README.md."


def parse(raw: Any, source: str = "settings") -> Config:
    """Check a settings mapping and fill in defaults.

    Generated scenes have the labelled set `objects` where no `downstream.sets` is given.
    `stage1` takes the defaults of its method (METHODS). `stage3` takes the network, views and optimizer that `stage1`
    is given, its method's defaults left out, where it does not give them itself.
    Raises InputError, one sentence naming `source` and the key.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{source}: must be a mapping of settings, not {type(raw).__name__}.")
    stage1, stage3 = raw.get("stage1", {}), raw.get("stage3", {})
    if isinstance(stage1, dict) and isinstance(stage3, dict):
        method = stage1.get("method")
        raw = {
            **raw,
            "stage1": merge(METHODS.get(method, {}) if isinstance(method, str) else {}, stage1),
            "stage3": merge({k: stage1[k] for k in SHARED_WITH_STAGE1 if k in stage1}, stage3),
        }
    data, downstream = raw.get("data", {}), raw.get("downstream", {})
    if isinstance(data, dict) and isinstance(downstream, dict) and data.get("layout", "scenes") == "scenes":
        raw = {**raw, "downstream": {"sets": {"objects": {}}, **downstream}}  # the generated ones
    try:
        # JSON mode, strict: arrays become tuples, but neither "3" nor true is a number.
        return Config.model_validate_json(json.dumps(raw), strict=True)
    except (TypeError, ValueError) as error:  # the others: a date, a mapping inside itself
        sentence = _sentence(error, source) if isinstance(error, ValidationError) else f"{source}: {error}."
        raise InputError(" ".join(sentence.split())) from None


def _plain(text: str) -> Any:
    try:
        return json.loads(text)  # first: YAML 1.1 refuses tabs and takes 1e-05 for text
    except ValueError:
        return yaml.safe_load(text)


def typed(value: Any) -> Any:
    """A value of Snakemake's `--config`, which hands on as text what is in braces: numbers, true, false and null."""
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value  # 000000000017 among it, which YAML takes for 15


def read(text: str) -> Any:
    """What a YAML or JSON file holds, or JSON text that starts with a brace, unchecked. Raises InputError."""
    is_text = text.lstrip().startswith("{")
    try:
        raw = _plain(text if is_text else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{text}: cannot read the settings ({error.strerror}); name a config file.") from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:  # the others: dates, tags, depth
        source = "--settings" if is_text else text
        raise InputError(f"{source}: is neither YAML nor JSON ({' '.join(str(error).split())}).") from None
    return {} if raw is None else raw


def load(text: str) -> Config:
    """Settings from a YAML or JSON file, or from JSON text that starts with a brace. Raises InputError."""
    return parse(read(text), "--settings" if text.lstrip().startswith("{") else text)


def variant(raw: dict, name: str | None) -> Config:
    """The configuration of variant `name` of a raw config (None: the run itself). Raises InputError."""
    base = {key: value for key, value in raw.items() if key != "variants"}
    if name is None:
        return parse(base, "config")
    change = raw["variants"][name]
    fixed = sorted(set(change) & {"name", "data", "compute", "variants"})
    if fixed:
        raise InputError(f"config: variants.{name}: {fixed[0]!r} is the same for all variants; set it once, outside.")
    return parse(merge(base, change), f"config, variant {name}")


ROUND = re.compile(r"(-|(?<=.)_)round([1-9]\d*)(?=$|\.)")  # in the name of a run


def runs(raw: dict) -> dict[str, Config]:
    """The configurations of the run itself, of its variants, their rounds and their repeats. Raises InputError.

    They go by what the names of their files and folders end in: nothing or -VARIANT; from the second round on -roundN
    or -VARIANT_roundN; and .seedN for a repeat.
    """
    raw = json.loads(json.dumps(raw))  # as `parse` reads it: YAML's numbers as keys become text
    found = {}
    for name in (None, *raw.get("variants", {})):
        one = variant(raw, name)
        suffix = f"-{name}" if name else ""
        if ROUND.search(suffix):
            raise InputError(f"config: variants.{name}: such names are those of rounds; choose another.")
        for seed in range(one.seed, one.seed + one.repeats):
            repeat = merge(raw, {"variants": {name: {"seed": seed}}} if name else {"seed": seed})
            ending = f".seed{seed}" if seed != one.seed else ""
            first = found[suffix + ending] = variant(repeat, name)
            later = first.model_copy(update={"measure": [what for what in first.measure if what in ("pairs", "orl")]})
            for number in range(2, first.rounds + 1):
                found[f"{suffix}{'_' if name else '-'}round{number}{ending}"] = later
    return found


def round_of(v: str) -> int:
    """The number of the round that run `v` is, a key of `runs`."""
    found = ROUND.search(v)
    return int(found[2]) if found else 1


def round_before(v: str) -> str | None:
    """The run whose ORL weights are stage 1 of run `v`, a key of `runs`; None for a first round."""
    found = ROUND.search(v)
    if not found:
        return None
    before = int(found[2]) - 1
    return v[: found.start()] + (f"{found[1]}round{before}" if before > 1 else "") + v[found.end() :]


def used(config: Config, stage: str) -> dict:
    """The settings that decide the result of `stage`, as nested plain values, with its RESULT_VERSION.

    Of a task with a labelled set the stage is TASK.SET, and the set's settings are among them.
    """
    stage, _, name = stage.partition(".")
    whole, uses = config.model_dump(mode="json"), USES[stage]
    if name:
        uses += tuple(f"downstream.sets.{name}.{key}" for key in ("root", "train", "val", "preset"))
        uses += (f"downstream.sets.{name}.lists",) if stage in ("subset", "semi") else ()
    if config.stage1.weights:
        whole["stage1"] = {key: whole["stage1"][key] for key in ("weights", "network")}  # the latter for `random`
        uses = ("stage1",) if stage == "stage1" else uses  # nothing is trained: all seeds share it
    out: dict = {"version": RESULT_VERSION[stage]}
    for dotted in uses:
        *parents, last = dotted.split(".")
        source, target = whole, out
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    return out


def used_by_share(config: Config, stage: str, share: str) -> dict:
    """`used` of a stage of semi, for one of its shares of the labels (as text) alone: nothing of the others."""
    out = used(config, stage)
    semi, one = out["downstream"]["semi"], out["downstream"]["sets"][stage.partition(".")[2]]
    number = list(map(str, semi["shares"])).index(share)
    for key in ("shares", "weight_decay"):
        semi[key] = [semi[key][number]]
    if "lists" in one:
        one["lists"] = {key: file for key, file in one["lists"].items() if key == share}
    return out


def schema() -> dict:
    """JSON schema of a config file."""
    return Config.model_json_schema()


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " / ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " / ".join("not given" if arg is type(None) else _type_name(arg) for arg in args)
    if origin is tuple:
        return f"{len(args)} × {_type_name(args[0])}"
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number"}.get(annotation.__name__, annotation.__name__)


def table(model: type[BaseModel] = Config, prefix: str = "") -> str:
    """The keys of a section as Markdown table rows, sections inside it included."""
    rows = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if prefix == "stage3." and name in SHARED_WITH_STAGE1:
                rows.append(f"| `stage3.{name}.*` | as `stage1.{name}.*` | stage 1's | Same keys as stage 1's. |")
            else:
                rows.append(table(annotation, f"{prefix}{name}."))
            continue
        default = field.get_default()
        default = "not given" if default is None else json.dumps(default)
        if name == "costs":
            default = "0.5^19 … 0.5^4, 1, 10, 100"
        rows.append(f"| `{prefix}{name}` | {_type_name(annotation)} | {default} | {field.description} |")
        if name == "sets":
            rows.append(table(LabelledSet, f"{prefix}sets.NAME."))
    return "\n".join(rows)


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    return {
        key: value
        for name, inner in values.items()
        for key, value in (
            flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
        ).items()
    }


def description(key: str) -> str:
    """What a setting is, as config/README.md says it; empty where its name is the user's."""
    path = key.split(".")
    field = getattr(_model_at(path), "model_fields", {}).get(path[-1])
    return (field and field.description) or ""


def methods_table() -> str:
    """The defaults of the methods of stage 1 that are not byol's, as Markdown table rows."""
    own = {method: flat(values, "stage1.") for method, values in METHODS.items()}
    keys = list(dict.fromkeys(key for values in own.values() for key in values))
    cells = [[json.dumps(values[key]) if key in values else "" for values in own.values()] for key in keys]
    return "\n".join(f"| `{key}` | {' | '.join(row)} |" for key, row in zip(keys, cells, strict=True))


def write_generated(root: Path) -> dict[Path, str]:
    """The generated files under the project's `root`: path -> text."""
    readme = root / "config" / "README.md"
    head, _, rest = readme.read_text().partition("<!-- keys -->\n")
    tail = rest.partition("<!-- /keys -->")[2]
    body = f"| key | type | default | what |\n| --- | --- | --- | --- |\n{table()}\n"
    named = " | ".join(f"`{method}`" for method in METHODS)
    body += f"\nDefaults of other methods than `byol`, where they differ:\n\n| key | {named} |\n| --- | --- | --- |\n"
    body += f"{methods_table()}\n"
    return {
        root / "workflow" / "schemas" / "config.schema.yaml": yaml.safe_dump(schema(), sort_keys=False, width=110),
        readme: f"{head}<!-- keys -->\n{body}<!-- /keys -->{tail}",
    }


if __name__ == "__main__":
    for path, content in write_generated(Path(__file__).parent.parent).items():
        path.write_text(content)
        print(f"wrote {path}")
