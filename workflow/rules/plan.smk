# What people are told: at the start what the run is made of, at the end what came out.
import atexit
import time
import typing

BEGAN = time.time()


def left_out():
    """What is not measured, by choice or for want of data, line by line."""
    wanted = {task for run in RUNS.values() for task in run.downstream.tasks}
    every = typing.get_args(settings.Task)[1:]  # without "all"
    others = [task for task in every if not {"all", task} & wanted]
    if others:
        yield f"left out by downstream.tasks: {', '.join(others)}"
    if not any(map(labels, RUNS)) and wanted & {"all", "voc07_svm", "voc07_lowshot"}:
        yield "voc07_svm and voc07_lowshot are left out: downstream.voc07_svm.root is not given"
    if not SETS and wanted & {"all", "linear", "semi", "knn"}:
        yield "linear, semi and knn are left out: downstream.sets is not given"
    if not any(map(mask_root, RUNS)) and wanted & {"all", "detection", "segmentation"}:
        yield "detection and segmentation are left out: downstream.detection.root is not given"
    if not objects() and wanted & {"all", "localization"}:
        yield (
            "localization is left out: neither data.objects nor data.annotations has the boxes of the photos' objects"
        )
    for name in SETS:
        if not any(set_root(name, v) for v in RUNS):
            yield f"the labelled set {name} is left out: downstream.sets.{name}.root is not given"


LEFT_OUT = list(left_out())  # on the page, too


def plan():
    """What the run is made of, line by line."""
    of_photos = (
        f"{RUN.data.scenes.train} generated scenes" if SCENES else f"photos in {ROOT}"
    )
    yield f"run {RUN.name}: {of_photos}"
    trained = []
    for stage, v in sorted(PLACES.needed):
        if stage == "stage3" or stage == "stage1" and not given(v):
            section = RUNS[v].stage3 if stage == "stage3" else RUNS[v].stage1
            method = "" if stage == "stage3" else f"{section.method}, "
            trained.append(
                f"{Path(found(stage, v)).name} ({method}{section.optimizer.epochs} epochs)"
            )
    yield listed("trained", trained)
    measured = [
        f"{model}{PLACES.made(what, v)[1]}"
        for v in RUNS
        for model in models_of(v)
        for what in [f"{task} {MODELS[model]}" for task in PLACES.tasks_of(v)]
        or [MODELS[model]]
    ]
    yield listed("measured", measured)
    tasks = [task for v in RUNS for task in PLACES.tasks_of(v)] + ["attention"] * bool(
        seen()
    )
    yield listed("by the tasks", tasks, "none")
    yield from LEFT_OUT
    yield f"results in {RESULTS}, the page in {RESULTS}/report/index.html"


def listed(what, names, nothing="nothing"):
    """A line with the first of the names, each once whatever its seed, and how many there are."""
    kinds = unique(re.sub(r"\.seed\d+", "", name) for name in names)
    more = ", ..." if len(kinds) > 6 else ""
    count = f" ({len(unique(names))})" if len(unique(names)) > 3 else ""
    return f"{what}{count}: {', '.join(kinds[:6]) or nothing}{more}"


def tell_plan():
    print(*(f"orl: {line}" for line in plan()), sep="\n", file=sys.stderr, flush=True)


if workflow.is_main_process and not FETCHES:
    if workflow.output_settings.dryrun:
        atexit.register(tell_plan)  # below the long list of jobs, not above it
    else:
        tell_plan()


onsuccess:
    told = Path(RESULTS, "logs/report.log")
    if told.exists() and told.stat().st_mtime > BEGAN:
        atexit.register(
            print, told.read_text(), end=""
        )  # below Snakemake's own last words
