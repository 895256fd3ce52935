import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from orl import InputError, config
from orl.config import Config, load, merge, parse, runs, used, variant

PROJECT = Path(__file__).parents[1]
SHIPPED = sorted(path for path in (PROJECT / "config").glob("*.yaml"))


def at(settings: Config, key: str):
    found = settings
    for part in key.split("."):
        found = getattr(found, part)
    return found


def nested(key: str, value) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def sentence(raw, **options) -> str:
    """The one sentence with which `raw` is refused."""
    with pytest.raises(InputError) as caught:
        parse(raw, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Defaults


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage1.method", "byol"),
        ("stage1.network.backbone", "resnet50"),
        ("stage1.network.hidden", 4096),
        ("stage1.network.projection", 256),
        ("stage1.views.size", 224),
        ("stage1.views.scale", (0.08, 1)),
        ("stage1.views.ratio", (3 / 4, 4 / 3)),
        ("stage1.views.flip_p", 0.5),
        ("stage1.views.jitter", (0.4, 0.4, 0.2, 0.1)),
        ("stage1.views.jitter_p", 0.8),
        ("stage1.views.grayscale_p", 0.2),
        ("stage1.views.blur_radius", (0.1, 2.0)),
        ("stage1.views.blur_p", (1.0, 0.1)),
        ("stage1.views.solarize_p", (0.0, 0.2)),
        ("stage1.optimizer.batch", 512),
        ("stage1.optimizer.epochs", 800),
        ("stage1.optimizer.lr", 0.4),
        ("stage1.optimizer.warmup_epochs", 4),
        ("stage1.optimizer.momentum", 0.9),
        ("stage1.optimizer.weight_decay", 1e-4),
        ("stage1.optimizer.ema", 0.99),
        ("embeddings.resize", 256),
        ("embeddings.crop", 224),
        ("neighbors.k", 10),
        ("neighbors.method", "nearest"),
        ("neighbors.index", "Flat"),
        ("neighbors.scope", "all"),
        ("proposals.min_size", 96),
        ("proposals.max_aspect", 3),
        ("proposals.max_iou", 0.5),
        ("proposals.top_n", 100),
        ("rois.size", 224),
        ("correspondences.method", "similar"),
        ("correspondences.ratio", 0.1),
        ("stage3.patch", 96),
        ("stage3.jitter.attempts", 200),
        ("stage3.jitter.scale", (0.5, 2)),
        ("stage3.jitter.ratio", (0.5, 2)),
        ("stage3.jitter.shift", 0.5),
        ("stage3.jitter.min_iou", 0.5),
        ("stage3.global_weight", 1),
        ("stage3.intra_weight", 1),
        ("stage3.inter_weight", 1),
        ("downstream.voc07_svm.resize", 256),
        ("downstream.voc07_svm.size", 224),
        ("downstream.voc07_svm.folds", 3),
        ("downstream.voc07_svm.stages", [1, 2, 3, 4, 5]),
        ("downstream.voc07_lowshot.shots", [1, 2, 4, 8, 16, 32, 64, 96]),
        ("downstream.voc07_lowshot.samples", 5),
        ("downstream.voc07_lowshot.protocol", "release"),
        ("downstream.linear.stages", [1, 2, 3, 4, 5]),
        ("downstream.linear.batch", 256),
        ("downstream.linear.lr", 0.01),
        ("downstream.linear.momentum", 0.9),
        ("downstream.linear.weight_decay", 1e-4),
        ("downstream.semi.shares", [0.01, 0.1]),
        ("downstream.semi.weight_decay", [5e-4, 1e-4]),
        ("downstream.semi.lr", [0.001, 0.01, 0.1]),
        ("downstream.semi.head", [1, 10, 100]),
        ("downstream.semi.runs", 5),
        ("downstream.semi.epochs", 20),
        ("downstream.semi.milestones", [12, 16]),
        ("downstream.semi.batch", 256),
        ("downstream.knn.k", [20, 200]),
        ("downstream.knn.temperature", 0.07),
        ("data.exif", "ignore"),
        ("repeats", 1),
        ("measure", ["random", "stage1", "pairs", "orl"]),
    ],
)
def test_defaults_are_the_papers(key, value):
    assert at(parse({}), key) == value


def test_default_costs_and_stage_3_defaults_are_the_papers():
    settings = parse({})
    for task in (settings.downstream.voc07_svm, settings.downstream.voc07_lowshot):
        assert set(task.costs) == {1, 10, 100} | {0.5**i for i in range(4, 20)}
    for section in ("network", "views", "optimizer"):
        assert at(settings.stage3, section) == at(settings.stage1, section)


# Refusals


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("stage1.optimiser", "stage1.optimizer"),
        ("stage1.optimizer.epoch", "stage1.optimizer.epochs"),
        ("stage3.network.hiden", "stage3.network.hidden"),
        ("stage3.jitter.atempts", "stage3.jitter.attempts"),
        ("data.scenes.trian", "data.scenes.train"),
        ("downstream.voc07_svm.cost", "downstream.voc07_svm.costs"),
        ("downstream.sets.mine.rot", "downstream.sets.mine.root"),
        ("compute.thread", "compute.threads"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known_one(key, nearest):
    assert sentence(nested(key, 1)) == f"settings: unknown key {key!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # wrong types
        ("seed", "3"),
        ("seed", True),
        ("seed", 1.5),
        ("seed", None),
        ("name", 5),
        ("data.root", 5),
        ("data.root", []),
        ("data.folders", "train2017"),
        ("stage1", 3),
        ("stage1", None),
        ("stage1.optimizer.lr", "0.1"),
        ("stage1.optimizer.lr", True),
        ("stage1.views.scale", 0.5),
        ("stage1.views.scale", [0.5]),
        ("stage1.views.scale", [0.1, 0.5, 1]),
        ("stage3.patch", "96"),
        ("variants.long", 5),
        # out of bounds
        ("seed", -1),
        ("seed", 2**31),
        ("name", "a/b"),
        ("name", "-a"),
        ("name", ""),
        ("data.layout", "imagenet"),
        ("stage1.method", "dino"),
        ("stage1.network.backbone", "resnet34"),
        ("stage1.network.hidden", 0),
        ("stage1.views.flip_p", 1.1),
        ("stage1.views.scale", [0.5, 0.1]),
        ("stage1.views.scale", [0, 1]),
        ("stage1.views.jitter", [0.4, 0.4, 0.4, 0.6]),
        ("stage1.views.jitter", [-0.4, 0.4, 0.4, 0.1]),
        ("stage1.optimizer.batch", 1),
        ("stage1.optimizer.epochs", 0),
        ("stage1.optimizer.lr", 0),
        ("stage1.optimizer.momentum", 1),
        ("stage1.optimizer.ema", 1.01),
        ("stage1.optimizer.weight_decay", -1e-4),
        ("embeddings.crop", 300),  # larger than resize
        ("proposals.max_aspect", 0.9),
        ("proposals.top_n", 2**16),  # RoI numbers are uint16
        ("neighbors.k", 0),
        ("neighbors.index", ""),
        ("neighbors.index", "IVF16, Flat"),
        ("neighbors.index", "IVF0,Flat"),  # at which FAISS crashes
        ("neighbors.parameters", "nprobe"),
        ("neighbors.parameters", "nprobe=0"),
        ("neighbors", {"parameters": "nprobe=3"}),  # with index Flat
        ("neighbors.scope", "inside"),
        ("neighbors.method", "similar"),
        ("neighbors", {"method": "random", "index": "IVF4,Flat"}),
        ("neighbors", {"method": "random", "parameters": "nprobe=3"}),
        ("correspondences.method", "nearest"),
        ("repeats", 0),
        ("repeats", 101),
        ("repeats", 2.0),
        ("measure", "stage1"),
        ("measure", ["stage3"]),  # the model is called orl
        ("correspondences.ratio", 0),
        ("correspondences.ratio", 1.1),
        ("stage3", {"global_weight": 0, "intra_weight": 0, "inter_weight": 0}),
        ("downstream.voc07_svm.costs", []),
        ("downstream.voc07_svm.costs", [0.1, -1]),
        ("compute.threads", 0),
        ("variants", {"a-b": {}}),  # the folder of variant b of another stage would look the same
    ],
)
def test_wrong_values_are_refused_by_key(key, value):
    found = sentence(nested(key, value), source="my.yaml")
    assert found.startswith(f"my.yaml: {key.rpartition('.')[0] or key}")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("key", ["stage1.optimizer.lr", "stage1.optimizer.weight_decay", "stage3.inter_weight"])
def test_numbers_are_finite(key, value):
    """An infinite setting would also not survive the JSON that Snakemake hands to the commands."""
    assert key in sentence(nested(key, value))


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_settings_are_a_mapping(raw):
    assert "must be a mapping" in sentence(raw)


def test_a_key_with_a_line_break_is_still_one_sentence():
    sentence({"variants": {"a\nb": {}}})


# Stage 3 from stage 1


def test_stage_3_takes_what_it_does_not_give_from_stage_1():
    raw = {
        "stage1": {
            "network": {"backbone": "resnet18", "hidden": 64},
            "views": {"size": 48},
            "optimizer": {"epochs": 7, "lr": 0.1},
        },
        "stage3": {"network": {"hidden": 32}, "optimizer": {"epochs": 9}},
    }
    before = copy.deepcopy(raw)
    stage1, stage3 = parse(raw).stage1, parse(raw).stage3
    assert (stage3.network.backbone, stage3.network.hidden) == ("resnet18", 32)
    assert stage3.views == stage1.views
    assert (stage3.optimizer.epochs, stage3.optimizer.lr, stage3.optimizer.batch) == (9, 0.1, 512)
    assert (stage1.network.hidden, stage1.optimizer.epochs) == (64, 7)
    assert raw == before


def test_merge_keeps_both_mappings():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 2}
    change = {"a": {"c": [3], "e": {"f": 1}}, "g": 0}
    assert merge(base, change) == {"a": {"b": 1, "c": [3], "e": {"f": 1}}, "d": 2, "g": 0}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 2}


# Variants


def test_a_variant_is_the_run_with_its_settings_laid_over():
    raw = {"neighbors": {"k": 5}, "variants": {"long": {"stage1": {"optimizer": {"epochs": 9}}}, "same": {}}}
    long = variant(raw, "long")
    assert (long.neighbors.k, long.stage1.optimizer.epochs, long.stage3.optimizer.epochs) == (5, 9, 9)
    assert long.variants == {}
    assert variant(raw, None) == variant(raw, "same") == parse({"neighbors": {"k": 5}})


@pytest.mark.parametrize("key", ["name", "data", "compute", "variants"])
def test_what_is_fixed_for_all_variants_is_refused_in_one(key):
    with pytest.raises(InputError, match=f"variants.odd: '{key}' is the same for all variants"):
        variant({"variants": {"odd": {key: {}}}}, "odd")


def test_errors_in_a_variant_name_it():
    raw = {"variants": {"odd": {"stage1": {"optimizer": {"epohcs": 1}}}}}
    with pytest.raises(InputError, match=r"variant odd: unknown key 'stage1.optimizer.epohcs'.*epochs'\?"):
        variant(raw, "odd")


def test_every_run_is_repeated_with_seeds_of_its_own():
    raw = {"seed": 3, "repeats": 2, "variants": {"once": {"repeats": 1, "neighbors": {"k": 5}}, "late": {"seed": 9}}}
    found = runs(raw)
    assert {suffix: one.seed for suffix, one in found.items()} == {
        "": 3,
        ".seed4": 4,
        "-once": 3,
        "-late": 9,
        "-late.seed10": 10,
    }
    assert [one.neighbors.k for one in found.values()] == [10, 10, 5, 10, 10]
    assert raw["seed"] == 3
    assert list(runs({})) == [""]


def test_a_repeat_differs_from_its_run_by_the_seed_alone():
    raw = {"repeats": 3, "stage1": {"method": "moco"}, "variants": {"v": {"measure": ["stage1"], "rois": {"size": 64}}}}
    found = runs(raw)
    assert list(found) == ["", ".seed1", ".seed2", "-v", "-v.seed1", "-v.seed2"]
    for first, second in (("", ".seed2"), ("-v", "-v.seed2")):
        assert found[second] == found[first].model_copy(update={"seed": 2})
    assert found["-v.seed1"].measure == ["stage1"]
    assert len(found["-v"].measure) < len(found[".seed1"].measure)


def test_rounds_follow_their_run_and_know_the_one_before():
    found = runs({"rounds": 2, "repeats": 2, "variants": {"b_c": {"rounds": 3}, "one": {"rounds": 1, "repeats": 1}}})
    before = {v: config.round_before(v) for v in found}
    assert before == {
        "": None, "-round2": "", ".seed1": None, "-round2.seed1": ".seed1",
        "-b_c": None, "-b_c_round2": "-b_c", "-b_c_round3": "-b_c_round2",
        "-b_c.seed1": None, "-b_c_round2.seed1": "-b_c.seed1", "-b_c_round3.seed1": "-b_c_round2.seed1",
        "-one": None,
    }  # fmt: skip
    assert [config.round_of(v) for v in found] == [1, 2, 1, 2, 1, 2, 3, 1, 2, 3, 1]
    assert found["-round2.seed1"].seed == 1
    assert found["-round2"].measure == ["pairs", "orl"]
    with pytest.raises(InputError, match=r"variants\.a_round2: such names are those of rounds"):
        runs({"variants": {"a_round2": {}}})
    assert set(runs({"variants": {"around2": {}, "rounds": {}}})) == {"", "-around2", "-rounds"}


def test_repeats_whose_seeds_would_be_too_large():
    with pytest.raises(InputError, match="seed"):
        runs({"seed": 2**31 - 1, "repeats": 2})


# Loading


@pytest.mark.parametrize(
    "text",
    [
        '{"seed": 5, "stage1": {"optimizer": {"weight_decay": 0.00001}}}',
        json.dumps({"seed": 5, "stage1": {"optimizer": {"weight_decay": 1e-5}}}),  # 1e-05
        '{\n\t"seed": 5,\n\t"stage1": {"optimizer": {"weight_decay": 1e-5}}\n}',
        "{seed: 5, stage1: {optimizer: {weight_decay: 1.0e-5}}}",
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_settings_come_from_text_or_file(text, in_file, tmp_path):
    """JSON text in particular: Snakemake writes a small number as 1e-05, which is text to YAML 1.1."""
    path = tmp_path / "settings.json"
    path.write_text(text)
    found = load(str(path) if in_file else text)
    assert (found.seed, found.stage1.optimizer.weight_decay) == (5, 1e-5)


def test_yaml_files(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# nothing but a comment\n")
    assert load(str(path)) == parse({})
    path.write_text("name: é\n", encoding="utf-8")
    with pytest.raises(InputError, match="name: string should match"):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"seed: [1", "is neither YAML nor JSON"),
        (b"seed: 1\n seed: 2", "is neither YAML nor JSON"),
        (b"\xff\xfe\x00", "is neither YAML nor JSON"),
        (b"seed: 2020-13-40", "is neither YAML nor JSON"),  # no such day
        (b"seed: !!int one", "is neither YAML nor JSON"),
        (b"seed: !!bool one", "is neither YAML nor JSON"),
        (b"[" * 100_000, "is neither YAML nor JSON"),
        (b"- seed\n- name\n", "must be a mapping of settings, not list"),
        (b"just text", "must be a mapping of settings, not str"),
        (b"data: {root: 2024-01-01}", ""),  # a date
        (b"data: &x {root: *x}", ""),  # a mapping inside itself
        (b"1: 2", "unknown key '1'"),
    ],
)
def test_broken_files_are_named(content, reason, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", ".", ""])
def test_files_that_cannot_be_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot read the settings \(.*\); name a config file"):
        load(name)


@pytest.mark.parametrize("text", ["{", '{"seed": 1', '{"seed": 1} {', "{seed"])
def test_broken_text_is_one_sentence(text):
    with pytest.raises(InputError, match=r"^--settings: is neither YAML nor JSON"):
        load(text)


# What a stage depends on


@pytest.mark.parametrize("stage", config.USES)
def test_used_holds_exactly_what_it_says(stage):
    settings = parse({})
    whole = settings.model_dump(mode="json")
    expected = {"version": config.RESULT_VERSION[stage]}
    for dotted in config.USES[stage]:
        value = whole
        for part in dotted.split("."):
            value = value[part]
        expected = merge(expected, nested(dotted, value))
    assert used(settings, stage) == expected
    assert "compute" not in expected
    assert "name" not in expected


def test_used_of_a_stage_written_out():
    assert used(parse({"seed": 4, "neighbors": {"k": 3}}), "neighbors") == {
        "version": 2,
        "seed": 4,
        "neighbors": {"method": "nearest", "k": 3, "index": "Flat", "parameters": None, "scope": "all"},
    }
    assert used(parse({"seed": 4}), "random") == {
        "version": 1,
        "seed": 4,
        "stage1": {"network": {"backbone": "resnet50", "hidden": 4096, "projection": 256}},
    }


@pytest.mark.parametrize("stage", config.USES)
def test_compute_and_name_and_other_stages_change_nothing(stage):
    other = {"name": "other", "compute": {"threads": 1, "gpus": 7, "checkpoint_minutes": 1, "log_every": 1}}
    assert used(parse(other), stage) == used(parse({}), stage)


@pytest.mark.parametrize("stage", config.USES)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_stage_given_only_what_it_uses_is_the_same(stage, path):
    """What the rules do: settings go to a command as the JSON of what its stage uses."""
    wanted = used(load(str(path)), stage)
    text = json.dumps({key: value for key, value in wanted.items() if key != "version"})
    assert used(load(text), stage) == wanted


# Files


def test_generated_files_are_current():
    """If not: python -m orl.config"""
    generated = config.write_generated(PROJECT)
    assert {path.relative_to(PROJECT).as_posix() for path in generated} == {
        "config/README.md",
        "workflow/schemas/config.schema.yaml",
    }
    for path, text in generated.items():
        assert path.read_text() == text


def test_every_key_is_described():
    lines = config.table().splitlines()
    assert len(lines) > 60
    for line in lines:
        key, kind, default, what = (cell.strip() for cell in line.strip("|").split("|"))
        assert kind
        assert default
        assert what not in ("", "None"), key


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    raw = yaml.safe_load(path.read_text())
    assert parse(raw, path.name).name == raw.get("name", "scenes")
    runs(raw)
    jsonschema.validate(raw, config.schema())


@pytest.mark.parametrize("raw", [{"sed": 1}, {"seed": "3"}, {"stage1": {"views": {"size": 4}}}, {"variants": 1}])
def test_the_schema_refuses_too(raw):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, config.schema())


def test_variants_whose_names_yaml_reads_as_numbers():
    raw = {"variants": {5: {"neighbors": {"k": 5}}}}
    assert list(config.parse(raw).variants) == ["5"]
    assert config.runs(raw)["-5"].neighbors.k == 5


def test_methods_have_their_own_defaults_and_stage_3_only_what_is_given():
    moco = parse({"stage1": {"method": "moco", "optimizer": {"epochs": 9}}})
    assert (moco.stage1.optimizer.batch, moco.stage1.optimizer.warmup_epochs, moco.stage1.optimizer.epochs) == (
        256,
        0,
        9,
    )
    assert (moco.stage1.views.scale, moco.stage1.network.projection, moco.stage1.temperature) == ((0.2, 1.0), 128, 0.2)
    assert moco.stage1.views.flip_p == 0.5
    assert (moco.stage3.optimizer.batch, moco.stage3.optimizer.epochs, moco.stage3.network.projection) == (512, 9, 256)
    simclr = parse({"stage1": {"method": "simclr", "optimizer": {"lr": 0.3}}})
    assert (simclr.stage1.optimizer.lr, simclr.stage1.optimizer.weight_decay) == (0.3, 1e-6)
    assert (simclr.stage3.optimizer.lr, simclr.stage3.optimizer.weight_decay) == (0.3, 1e-4)


def test_given_weights_are_all_that_counts_of_stage_1():
    given, other = ({"stage1": {"weights": "a.pth", "optimizer": {"lr": lr}}} for lr in (0.1, 0.2))
    other |= {"seed": 5, "precision": "float16"}
    assert used(parse(given), "stage1") == used(parse(other), "stage1")
    assert used(parse(other), "random")["seed"] == used(parse(other), "stage3")["seed"] == 5
    assert used(parse({"stage1": {"weights": "b.pth"}}), "stage1") != used(parse(given), "stage1")


def test_generated_scenes_have_a_labelled_set():
    assert list(parse({}).downstream.sets) == ["objects"]
    assert list(parse({"downstream": {"sets": {"mine": {"root": "x"}}}}).downstream.sets) == ["mine"]
    assert parse({"data": {"layout": "folder"}}).downstream.sets == {}


def test_a_task_on_a_labelled_set_depends_on_that_set_alone():
    sets = {"a": {"root": "x", "tasks": ["knn"]}, "b": {"root": "y"}}
    settings = parse({"downstream": {"sets": sets}})
    found = used(settings, "knn.a")["downstream"]
    assert found["sets"] == {"a": {"root": "x", "train": "train", "val": "val", "preset": None}}
    more = parse({"downstream": {"sets": {**sets, "a": {"root": "x"}, "c": {"root": "z"}}, "linear": {"lr": 1.0}}})
    assert used(more, "knn.a") == used(settings, "knn.a")
    grown = parse({"downstream": {"sets": sets, "semi": {"head": [1.0], "lr": [3.0], "runs": 9}}})
    assert used(grown, "semi_run.b") == used(settings, "semi_run.b")
    assert used(grown, "semi.b") != used(settings, "semi.b")


@pytest.mark.parametrize("task", ["set_features", "knn", "linear", "subset", "semi", "semi_run"])
def test_a_task_on_a_labelled_set_given_only_what_it_uses_is_the_same(task):
    """Lists of shares other than the default ones among it."""
    one = {"root": "x", "lists": {"0.2": "fifth.txt", "0.5": "half.txt"}, "preset": "places205"}
    semi = {"shares": [0.2, 0.5, 1.0], "weight_decay": [0.0, 0.1, 0.2]}
    wanted = used(parse({"downstream": {"sets": {"a": one, "b": {}}, "semi": semi}}), f"{task}.a")
    text = json.dumps({key: value for key, value in wanted.items() if key != "version"})
    assert used(load(text), f"{task}.a") == wanted


def test_one_share_of_semi_needs_no_list_of_another():
    """As the rules give it to a run: its own share and weight decay alone."""
    one = {"root": "x", "lists": {"0.01": "1percent.txt", "0.1": "10percent.txt"}}
    found = used(parse({"downstream": {"sets": {"a": one}}}), "semi_run.a")
    found["downstream"]["semi"] |= {"shares": [0.1], "weight_decay": [1e-4]}
    assert used(load(json.dumps({key: value for key, value in found.items() if key != "version"})), "semi_run.a")


@pytest.mark.parametrize(
    ("downstream", "reason"),
    [
        ({"linear": {"epochs": 3}}, "epochs and milestones go together"),
        ({"semi": {"shares": [0.1]}}, "weight_decay must name one number for each of shares"),
        ({"tasks": ["svm"]}, "downstream.tasks.0: input should be 'all', 'voc07_svm'"),
        ({"sets": {"a.b": {}}}, "downstream.sets.a.b: string should match"),
        ({"voc07_lowshot": {"shots": []}}, "downstream.voc07_lowshot.shots: list should have at least 1 item"),
        ({"voc07_svm": {"stages": [5, 5]}}, "downstream.voc07_svm.stages: names 5 twice; remove one"),
        ({"semi": {"lr": [0.1, 0.1]}}, "downstream.semi.lr: names 0.1 twice"),
        ({"sets": {"a": {"lists": {"1%": "x.txt"}}}}, "sets.a.lists: 1% is none of semi.shares, [0.01, 0.1]"),
        ({"voc07_svm": {"stages": [6]}}, "downstream.voc07_svm.stages.0: input should be less than or equal to 5"),
    ],
)
def test_bad_downstream_settings(downstream, reason):
    assert reason in sentence({"downstream": downstream})
