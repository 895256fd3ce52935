"""`orl COMMAND`: one command per rule of the workflow, so that what a rule runs a person can type."""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orl import InputError, NoRoomError, __version__, gpus
from orl.config import EXPORTS, Config, load, used

GUIDE = """Object-level representation learning from scene photos: unlabelled photos in, a pre-trained backbone and its
scores out. A whole run is one `snakemake`, in the folder of the Snakefile; each of its steps is a command here.

To begin with:
  orl doctor                          is this machine ready?
  snakemake --cores all -n            what a run on generated scenes would do (without -n: do it, five minutes)
  snakemake --cores all --resources gpu=1 --configfile config/folder.yaml --config name=mine "data={root: PHOTOS}"
                                      a run on your photos, for one GPU
  orl doctor --configfile config/folder.yaml --config "data={root: PHOTOS}" name=mine
                                      how long it would take, and whether disk and memory suffice

With what a run has made, as results/mine:
  doctor RUN   check every file: what is damaged or stale, and the command that mends it
  clean RUN    remove large files that can be made again, after showing them
  compare RUN RUN   show the scores of several runs side by side
  attention    draw what models look at
  export       write a backbone for torchvision, timm, Detectron2 or MMDetection
  card         write the model card of a backbone

The chain, step by step:
  scenes       draw the embedded scenes, or take your own photos
  fetch        download VOC2007 or COCO
  manifest     list the photos, each decoded once
  pretrain     --stage stage1: train on whole photos
  embed        embed every photo by stage 1
  propose      find boxes that may hold an object, by selective search
  neighbors    find the most similar photos of each photo
  rois         embed every box
  correspond   pair the boxes of each photo with those of its neighbours
  pretrain     --stage stage3: train on whole photos, boxes and pairs
  merge        join the shards of embed, propose or correspond (--shard 1/8 ..., for large sets)
  features     compute a backbone's features of labelled photos, from which the SVMs and k-NN start
  subset       choose a share of the labels, for semi_run
  evaluate     measure how good a backbone, the boxes or the pairs are: `orl evaluate --help` lists the tasks
  report       make the page that shows what the run did

`orl COMMAND --help` tells what a command needs."""
# What to type after a command, where that is not obvious
NEXT = {
    "scenes": "orl manifest",
    "manifest": "orl pretrain --stage stage1",
    "pretrain --stage stage1": "orl embed and orl propose",
    "pretrain --stage stage3": "orl features, then orl evaluate",
    "pretrain --stage random": "orl features, then orl evaluate",
    "pretrain --stage supervised": "orl features, then orl evaluate",
    "embed": "orl neighbors",
    "propose": "orl rois",
    "neighbors": "orl correspond",
    "rois": "orl correspond",
    "correspond": "orl pretrain --stage stage3",
    "features": "orl evaluate voc07_svm",
    "features --set": "orl evaluate knn",
    "subset": "orl evaluate semi_run",
    "evaluate semi_run": "orl evaluate semi",
    "--shard": "orl merge, once all shards are there",
}

MANIFEST = ("--manifest", "FILE", "manifest.csv, made by `orl manifest`")
ROOT = ("--root", "FOLDER", "folder of the photos, to which the manifest's paths are relative")
BACKBONE = ("--backbone", "FILE", "backbone.safetensors of any model")
FEATURES = ("--features", "FILE", "features of the photos, made by `orl features`")
SET = ("--set", "SET", "a labelled set, of downstream.sets")
NAME = ("--name", "NAME", "what the result calls the model")
ROOT_OF_LABELS: dict[str, Any] = {
    "metavar": "FOLDER",
    "help": "folder of the labelled photos (default: as in the settings)",
}
PROPOSALS = ("--proposals", "FILE", "proposals.h5, made by `orl propose`")


def _scenes(args: argparse.Namespace, config: Config) -> None:
    from orl.data.scenes import generate

    generate(args.output, config.data.scenes, args.threads)


def _manifest(args: argparse.Namespace, config: Config) -> None:
    from orl.data.manifest import build

    build(config, args.root, args.output, args.rejected, args.threads)


def _pretrain(args: argparse.Namespace, config: Config) -> None:
    from orl.pretrain import loop

    if args.stage == "random":
        loop.random(config, Path(args.output))
        return
    if args.stage == "supervised" or (args.stage == "stage1" and config.stage1.weights):
        from orl.pretrain import given

        given.write(config, args.stage, Path(args.output))
        return
    root, manifest = _given(args, "root"), _given(args, "manifest")
    optimizer = config.stage3.optimizer if args.stage == "stage3" else config.stage1.optimizer
    moco = args.stage == "stage1" and config.stage1.method == "moco"
    group = config.stage1.shuffled_batch if moco else 2
    gpus.start(args.gpus, optimizer.batch, optimizer.accumulation, args.threads, args.argv, group, args.nodes)
    loop.train(
        config,
        args.stage,
        root,
        manifest,
        Path(args.output),
        proposals_path=args.proposals,
        correspondences_path=args.correspondences,
        threads=args.threads,
        checkpoint_minutes=args.checkpoint_minutes,
        log_every=args.log_every,
        compile=bool(args.compile),
        deterministic=bool(args.deterministic),
    )


def _embed(args: argparse.Namespace, config: Config) -> None:
    from orl.discovery.embed import embed

    gpus.take_one(args.gpus)
    embed(config, args.root, args.manifest, args.model, args.output, args.threads, args.shard)


def _propose(args: argparse.Namespace, config: Config) -> None:
    from orl.discovery.proposals import propose

    propose(config, args.root, args.manifest, args.output, args.threads, args.shard)


def _neighbors(args: argparse.Namespace, config: Config) -> None:
    gpus.take_one(args.gpus)
    from orl.discovery.neighbors import neighbors  # after: FAISS may look for GPUs when it is loaded

    neighbors(config, args.manifest, args.embeddings, args.output, args.threads)


def _rois(args: argparse.Namespace, config: Config) -> None:
    from orl.discovery.rois import rois

    gpus.take_one(args.gpus)
    files = (args.manifest, args.proposals, args.backbone, args.output)
    rois(config, args.root, *files, args.threads, args.shard)


def _correspond(args: argparse.Namespace, config: Config) -> None:
    from orl.discovery.correspondences import correspond

    files = (args.manifest, args.neighbors, args.proposals, args.rois, args.output)
    correspond(config, *files, args.threads, args.shard)


def _merge(args: argparse.Namespace, config: Config) -> None:
    from orl.artifacts import merge

    merge(args.shards, args.output)


def _features(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream import sets, svm

    gpus.take_one(args.gpus)
    from orl.downstream import features

    files = (args.backbone, args.output, args.threads)
    if args.set is None:
        train, test, _ = svm.read(config, args.root)
        features.write_labels(config, *files, train, test)
    else:
        features.write_set(config, args.set, *files, *sets.read(config, args.set, args.root))


def _voc07_svm(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream.svm import evaluate

    evaluate(config, args.features, args.name, args.root, args.output, args.threads)


def _voc07_lowshot(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream.lowshot import evaluate

    evaluate(config, args.features, args.name, args.root, args.output, args.threads)


def _knn(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream import knn, sets

    photos = sets.read(config, args.set, args.root)
    knn.evaluate(config, args.set, args.features, args.name, *photos, args.output, args.threads)


def _linear(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream import sets, supervised

    job = supervised.linear_job(config, args.set, args.backbone, *sets.read(config, args.set, args.root))
    _train_with_labels(args, config, job, used(config, f"linear.{args.set}"))


def _subset(args: argparse.Namespace, config: Config) -> None:
    from orl.data.classes import read_subset, subset, write_subset
    from orl.downstream import sets

    train, _ = sets.read(config, args.set, args.root)
    given = config.downstream.sets[args.set].lists.get(str(args.share))
    rows = read_subset(given, train) if given else subset(train, args.share, config.seed)
    write_subset(args.output, train, rows)


def _semi_run(args: argparse.Namespace, config: Config) -> None:
    from orl.data.classes import read_subset
    from orl.downstream import semi, sets, supervised

    if args.best is None and (args.lr is None or args.head is None):
        raise InputError("semi_run needs --lr and --head, or --best and the results to choose them by; name them.")
    lr, head = (args.lr, args.head) if args.best is None else semi.best(args.best)
    train, val = sets.read(config, args.set, args.root)
    photos = train, read_subset(args.list, train), val
    job = supervised.semi_job(config, args.set, args.backbone, *photos, args.share, lr, head, args.run_number)
    run = {"share": args.share, "lr": lr, "head": head, "number": args.run_number, "seed": job.seed}
    _train_with_labels(args, config, job, {**used(config, f"semi_run.{args.set}"), "run": run})


def _train_with_labels(args: argparse.Namespace, config: Config, job: Any, settings: dict) -> None:
    from orl.downstream import supervised

    gpus.start(args.gpus, job.batch, 1, args.threads, args.argv)
    limits = args.threads, args.checkpoint_minutes, args.log_every
    supervised.evaluate(config, job, args.set, args.task, args.name, args.output, settings, *limits)


def _semi(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream.semi import collect

    collect(args.runs, args.name, args.output)


def _detection(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream import detection

    train, test = _masks(args, config)
    batch = detection.schedule(config.downstream.detection, len(train.with_objects())).batch
    gpus.start(args.gpus, batch, 1, args.threads, args.argv, 1)
    files = (args.backbone, train, test, args.name, args.output, args.predictions)
    limits = args.threads, args.checkpoint_minutes, args.log_every
    detection.evaluate(config, *files, *limits, faster=bool(args.faster_coco_eval))


def _segmentation(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream import segmentation

    train, test = _masks(args, config)
    batch = min(config.downstream.segmentation.batch, len(train))
    gpus.start(args.gpus, batch, 1, args.threads, args.argv, 1)
    limits = args.threads, args.checkpoint_minutes, args.log_every
    segmentation.evaluate(config, args.backbone, train, test, args.name, args.output, *limits)


def _masks(args: argparse.Namespace, config: Config) -> tuple[Any, Any]:
    """The splits of downstream.detection."""
    from orl.data.instances import read

    section = config.downstream.detection
    root = section.root if args.root is None else args.root
    if root is None:
        raise InputError("downstream.detection.root: is not set; name the folder of the photos with masks.")
    return read(root, section.train), read(root, section.test)


def _localization(args: argparse.Namespace, config: Config) -> None:
    of_model = args.backbone is not None
    if of_model == (args.correspondences is not None) or (args.proposals is None) != of_model:
        raise InputError("localization needs either --backbone, or --proposals and --correspondences; name them.")
    from orl.downstream import localization

    if of_model:
        if args.root is None:
            raise InputError("localization with --backbone needs --root, the folder of the photos; name it.")
        gpus.take_one(args.gpus)
        photos = (args.root, args.manifest, args.backbone)
        localization.evaluate_model(config, *photos, args.annotations, args.name, args.output, args.threads)
    else:
        files = (args.manifest, args.proposals, args.correspondences, args.annotations, args.output)
        localization.evaluate_pairs(config, args.name, *files)


def _attention(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream.attention import draw

    backbones = dict(args.backbones)
    if len(backbones) < len(args.backbones):
        raise InputError("--backbones: one name stands for several files; give each a name of its own.")
    gpus.take_one(args.gpus)
    files = (backbones, args.output, args.proposals, args.correspondences)
    draw(config, args.root, args.manifest, *files, roi=args.roi)


def _export(args: argparse.Namespace, config: Config) -> None:
    from orl.networks.export import export

    export(args.backbone, args.format, args.output)


def _card(args: argparse.Namespace, config: Config) -> None:
    from orl.report.card import card

    files = (args.backbone, args.metrics, args.manifest, args.scores, args.output)
    card(config, args.run_name, args.name, *files)


def _fetch(args: argparse.Namespace, config: Config) -> None:
    from orl.data.fetch import fetch

    fetch(args.what, args.output, args.parts)


def _recall(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream.proposals import evaluate

    evaluate(config, args.name, args.manifest, args.proposals, args.annotations, args.output, args.plot)


def _precision(args: argparse.Namespace, config: Config) -> None:
    from orl.downstream.pairs import evaluate

    files = (args.manifest, args.proposals, args.correspondences, args.annotations, args.output)
    evaluate(config, args.name, *files)


def _report(args: argparse.Namespace, config: Config) -> None:
    from orl.report.page import report

    report(
        args.run_name,
        args.root,
        args.manifest,
        args.rejected,
        args.metrics,
        args.scores,
        args.recalls,
        args.pairs,
        args.attention,
        _stage2(args),
        config.data.exif,
        args.output,
        args.results,
        args.graph,
        args.left_out,
    )


def _compare(args: argparse.Namespace, config: Config) -> None:
    from orl.report.compare import compare

    compare(args.run_folders, args.output)


def _doctor(args: argparse.Namespace, config: Config) -> None:
    if args.run_folder:
        from orl.doctor.run import doctor

        if args.config:
            raise InputError("--config is for an estimate, without RUN; put these settings into a file.")
        good = doctor(args.run_folder, args.configfile, args.threads)
    elif args.configfile:
        from orl.doctor import estimate

        good = estimate.report(args.configfile, args.config, args.seconds)
    else:
        from orl.doctor import machine

        good = machine.report()
    if not good:
        sys.exit(1)


def _clean(args: argparse.Namespace, config: Config) -> None:
    from orl.doctor.clean import clean

    clean(args.run_folder, args.configfile, args.leftovers, args.yes)


def _stage2(args: argparse.Namespace) -> tuple[str, str, str] | None:
    """The three files of stage 2, or None. Raises InputError where some are given without the others."""
    files = {name: getattr(args, name) for name in ("neighbors", "proposals", "correspondences")}
    given = [name for name, file in files.items() if file is not None]
    missing = [name for name, file in files.items() if file is None]
    if given and missing:
        raise InputError(f"--{given[0]} needs --{missing[0]}; name all of stage 2's files or none.")
    return None if missing else (args.neighbors, args.proposals, args.correspondences)


def _given(args: argparse.Namespace, name: str) -> str:
    value = getattr(args, name)
    if value is None:
        raise InputError(f"--stage {args.stage} needs --{name}; name it.")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    formatter = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="orl", description=GUIDE, formatter_class=formatter)
    whole.add_argument("--version", action="version", version=f"orl {__version__}")
    commands = whole.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="orl", help=argparse.SUPPRESS
    )  # the guide lists them
    whole.usage = "orl COMMAND ...   (orl --help: which, and what to type first)"

    def uses_gpu(sub: argparse.ArgumentParser, most: str) -> None:
        sub.add_argument(
            "--gpus",
            type=partial(_count, least=0),
            metavar="N",
            help=f"GPUs to use at most (default: {most}); 0: the CPU. Waits while other jobs hold them",
        )

    def trains(sub: argparse.ArgumentParser) -> None:
        minutes_help = "minutes between checkpoints (default 15)"
        sub.add_argument("--checkpoint-minutes", type=float, default=15, help=minutes_help)
        sub.add_argument("--log-every", type=_count, default=50, help="steps between log lines (default 50)")
        uses_gpu(sub, "all that are visible, one process on each")

    def takes_shard(sub: argparse.ArgumentParser) -> None:
        what = "only part NUMBER (from 1) of COUNT of the photos; `orl merge` joins them (those of rois stay apart)"
        sub.add_argument("--shard", type=_shard, metavar="NUMBER/COUNT", help=what)

    def command(
        name: str,
        run: Callable[[argparse.Namespace, Config], None],
        text: str,
        *files: tuple[str, str, str],
        output: str,
        settings: Sequence[str] = (),
        under: argparse._SubParsersAction = commands,
    ) -> argparse.ArgumentParser:
        sub = under.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        reads = f"; it reads {', '.join(settings)}" if settings else ""
        sub.add_argument(
            "--settings",
            metavar="CONFIG",
            default="{}",
            help=f"a config file, or JSON text of the same form{reads}; what is not given has the paper's value",
        )
        for flag, metavar, what in files:
            sub.add_argument(flag, metavar=metavar, required=True, help=what)
        sub.add_argument("--output", required=True, help=output)
        sub.add_argument("--threads", type=_count, default=os.cpu_count(), help="CPU cores to use (default: all)")
        sub.set_defaults(run=run)
        return sub

    command("scenes", _scenes, "draw the embedded scenes", output="folder to make", settings=["data.scenes"])
    sub = command(
        "manifest",
        _manifest,
        "list the photos, each decoded once",
        ("--root", "FOLDER", "folder of the photos"),
        ("--rejected", "FILE", "CSV to write: the files that are no photo, with the reason"),
        output="manifest.csv to write",
        settings=["data"],
    )
    sub = command(
        "pretrain",
        _pretrain,
        "train stage 1 (image level) or stage 3 (object level), going on where an interrupted run stopped",
        output="folder of the model: backbone.safetensors, model.safetensors, metrics.csv",
        settings=["stage1 or stage3", "seed", "precision", "data.exif"],
    )
    stage_help = "random: no training; supervised: none either, the weights of that setting"
    sub.add_argument("--stage", required=True, choices=["stage1", "stage3", "random", "supervised"], help=stage_help)
    for flag, metavar, what in (ROOT, MANIFEST):
        sub.add_argument(flag, nargs="?", metavar=metavar, help=what)  # the workflow has none for given weights
    sub.add_argument("--proposals", metavar="FILE", help="proposals.h5 (stage3)")
    sub.add_argument("--correspondences", metavar="FILE", help="correspondences.h5 (stage3)")
    trains(sub)
    nodes_help = "nodes of this SLURM job to train on (default 1); --gpus counts the GPUs of all"
    sub.add_argument("--nodes", type=_count, default=1, metavar="N", help=nodes_help)
    for flag, what in (("--compile", "compile the step"), ("--deterministic", "only deterministic operations")):
        help_text = f"1: {what} (default 0)"
        sub.add_argument(flag, type=int, choices=(0, 1), default=0, metavar="0|1", help=help_text)
    sub = command(
        "embed",
        _embed,
        "embed every photo with the projector of stage 1",
        ROOT,
        MANIFEST,
        ("--model", "FILE", "model.safetensors of stage 1"),
        output="embeddings.h5 to write",
        settings=["embeddings", "data.exif"],
    )
    uses_gpu(sub, "1")
    takes_shard(sub)
    sub = command(
        "propose",
        _propose,
        "find boxes that may hold an object, by selective search",
        ROOT,
        MANIFEST,
        output="proposals.h5 to write",
        settings=["proposals", "seed", "data.exif"],
    )
    takes_shard(sub)
    sub = command(
        "neighbors",
        _neighbors,
        "find the most similar photos of each photo",
        MANIFEST,
        ("--embeddings", "FILE", "embeddings.h5, made by `orl embed`"),
        output="neighbors.h5 to write",
        settings=["neighbors"],
    )
    uses_gpu(sub, "1")
    sub = command(
        "rois",
        _rois,
        "embed every proposal, once",
        ROOT,
        MANIFEST,
        PROPOSALS,
        ("--backbone", "FILE", "backbone.safetensors of stage 1"),
        output="rois.h5 to write",
        settings=["rois", "data.exif"],
    )
    uses_gpu(sub, "1")
    takes_shard(sub)
    sub = command(
        "correspond",
        _correspond,
        "pair the RoIs of each photo with those of its neighbours",
        MANIFEST,
        ("--neighbors", "FILE", "neighbors.h5, made by `orl neighbors`"),
        PROPOSALS,
        output="correspondences.h5 to write",
        settings=["correspondences"],
    )
    rois_help = "rois.h5, made by `orl rois`, or all its shards"
    sub.add_argument("--rois", nargs="+", required=True, metavar="FILE", help=rois_help)
    takes_shard(sub)
    sub = command("merge", _merge, "join the shards of embed, propose or correspond", output="HDF5 file to write")
    sub.add_argument("shards", nargs="+", metavar="SHARD", help="all shards, in any order")
    text = "download VOC2007 or COCO, going on where it was interrupted; what is there is left alone"
    sub = command("fetch", _fetch, text, output="folder: of COCO, or the one that VOCdevkit is to be in")
    sub.add_argument("what", choices=["voc2007", "coco"])
    parts_help = (
        "trainval, test; train2017, val2017, unlabeled2017, annotations, image_info_unlabeled (default: the first"
    )
    sub.add_argument("--parts", nargs="+", metavar="PART", help=f"{parts_help} two or three)")
    text = "compute a backbone's features of labelled photos: of downstream.voc07_svm, or with --set of a labelled set"
    read = ["downstream.voc07_svm", "downstream.sets and downstream.knn", "data.exif"]
    sub = command("features", _features, text, BACKBONE, output="HDF5 file to write", settings=read)
    sub.add_argument("--set", metavar="SET", help=SET[2])
    sub.add_argument("--root", **ROOT_OF_LABELS)
    uses_gpu(sub, "1")
    text = "choose the photos whose labels are used for semi_run: a share of each class, or the list of the settings"
    sub = command("subset", _subset, text, SET, output="list to write", settings=["downstream.sets", "seed"])
    sub.add_argument("--share", type=float, required=True, metavar="SHARE", help="share of the labels, above 0 to 1")
    sub.add_argument("--root", **ROOT_OF_LABELS)
    text = "measure how good a backbone or the proposals are"
    sub = commands.add_parser("evaluate", help=text, description=f"{text.capitalize()}.")
    tasks = sub.add_subparsers(dest="task", required=True, metavar="TASK")

    def evaluates(
        name: str,
        run: Callable[[argparse.Namespace, Config], None],
        text: str,
        *files: tuple[str, str, str],
        settings: Sequence[str] = (),
    ) -> argparse.ArgumentParser:
        """A task that gives a model a score."""
        sub = command(name, run, text, *files, NAME, output="JSON to write", settings=settings, under=tasks)
        sub.add_argument("--root", **ROOT_OF_LABELS)
        return sub

    svm = ["downstream.voc07_svm"]
    text = "multi-label linear SVM on a backbone's features by VOC07's protocol"
    evaluates("voc07_svm", _voc07_svm, text, FEATURES, settings=svm)
    text = "multi-label linear SVM on few photos of each class"
    evaluates("voc07_lowshot", _voc07_lowshot, text, FEATURES, settings=["downstream.voc07_lowshot", *svm, "seed"])
    text = "weighted k-nearest-neighbour classification, without training"
    evaluates("knn", _knn, text, SET, FEATURES, settings=["downstream.knn", "downstream.sets"])
    trained = ["downstream.sets", "seed", "precision", "data.exif"]
    text = "linear classification on a frozen backbone, a head for each stage, going on where it was interrupted"
    trains(evaluates("linear", _linear, text, SET, BACKBONE, settings=["downstream.linear", *trained]))
    text = "fine-tune all layers on a share of the labels, once, going on where it was interrupted"
    photos = ("--list", "FILE", "the photos whose labels are used, made by `orl subset`")
    sub = evaluates("semi_run", _semi_run, text, SET, BACKBONE, photos, settings=["downstream.semi", *trained])
    share_help = "share of the labels, of downstream.semi.shares"
    sub.add_argument("--share", type=float, required=True, metavar="SHARE", help=share_help)
    sub.add_argument("--lr", type=float, metavar="RATE", help="learning rate")
    sub.add_argument("--head", type=float, metavar="TIMES", help="multiple of it for the linear head")
    best_help = "instead of both: results of this command, of which the best tells them"
    sub.add_argument("--best", nargs="+", metavar="FILE", help=best_help)
    number_help = "number of the run, which is added to the seed (default 0: a run of the grid)"
    number = partial(_count, least=0)
    sub.add_argument("--run", dest="run_number", type=number, default=0, metavar="NUMBER", help=number_help)
    trains(sub)
    text = "put the results of semi_run together: the best of the grid, mean and standard deviation"
    sub = command("semi", _semi, text, NAME, output="JSON to write", under=tasks)
    sub.add_argument("--runs", nargs="+", required=True, metavar="FILE", help="all results of semi_run for a model")
    sub = command(
        "proposals",
        _recall,
        "recall of annotated objects by the number of proposals kept",
        MANIFEST,
        PROPOSALS,
        output="JSON to write",
        settings=["proposals.min_size, from which on objects are large"],
        under=tasks,
    )
    has_objects: dict[str, Any] = {
        "nargs": "+",
        "required": True,
        "metavar": "FILE",
        "help": "COCO JSONs with the objects' boxes, or folders of VOC XML files",
    }
    sub.add_argument("--annotations", **has_objects)
    sub.add_argument("--name", default="proposals", help="what the result calls them (default: %(default)s)")
    sub.add_argument("--plot", metavar="FILE", help="PNG to draw as well")
    sub = command(
        "pairs",
        _precision,
        "precision of RoI pairs: how many show the same class",
        MANIFEST,
        PROPOSALS,
        ("--correspondences", "FILE", "correspondences.h5"),
        output="JSON to write",
        settings=["seed, of the random pairs to compare with"],
        under=tasks,
    )
    sub.add_argument("--annotations", **has_objects)
    sub.add_argument("--name", default="pairs", help="what the result calls them (default: %(default)s)")
    masks = ["downstream.detection"]
    text = "train Mask R-CNN from a backbone, going on where it was interrupted, and test it by COCO's AP"
    sub = evaluates("detection", _detection, text, BACKBONE, settings=[*masks, "seed", "precision", "data.exif"])
    sub.add_argument("--predictions", required=True, metavar="FILE", help="COCO results JSON to write: what was found")
    help_text = "1: evaluate by faster-coco-eval, which must be installed (default 0: by pycocotools)"
    sub.add_argument("--faster-coco-eval", type=int, choices=(0, 1), default=0, metavar="0|1", help=help_text)
    trains(sub)
    text = "name each pixel's class by a linear layer on a frozen backbone, going on where it was interrupted"
    read = ["downstream.segmentation", *masks, "seed", "precision", "data.exif"]
    trains(evaluates("segmentation", _segmentation, text, BACKBONE, settings=read))
    text = "find objects without labels, from a backbone's feature maps or by how stage 2 pairs proposals"
    read = ["downstream.localization", "data.exif"]
    sub = command(
        "localization", _localization, text, MANIFEST, NAME, output="JSON to write", settings=read, under=tasks
    )
    sub.add_argument("--annotations", **has_objects)
    sub.add_argument("--root", metavar="FOLDER", help=ROOT[2])
    sub.add_argument("--backbone", metavar="FILE", help=BACKBONE[2])
    sub.add_argument("--proposals", metavar="FILE", help=PROPOSALS[2])
    sub.add_argument("--correspondences", metavar="FILE", help="correspondences.h5")
    uses_gpu(sub, "1")
    text = "draw what models look at: the energy of their last feature map, and its similarity to a RoI"
    read = ["downstream.attention", "data.exif", "seed"]
    sub = command("attention", _attention, text, ROOT, MANIFEST, output="folder to make, of PNG files", settings=read)
    backbones_help = "backbones to compare, in this order"
    sub.add_argument("--backbones", nargs="+", type=_named, required=True, metavar="NAME=FILE", help=backbones_help)
    sub.add_argument("--proposals", metavar="FILE", help=f"{PROPOSALS[2]}, of which the RoI is one")
    sub.add_argument("--correspondences", metavar="FILE", help="correspondences.h5: the RoI is the box in most pairs")
    sub.add_argument("--roi", type=_box, metavar="X,Y,W,H", help="the RoI, pixels of the one photo that is chosen")
    uses_gpu(sub, "1")
    text = "write a backbone as another framework reads it, and say how"
    sub = command("export", _export, text, BACKBONE, output="file to write: .safetensors (timm) or .pth (the others)")
    sub.add_argument("--format", required=True, choices=list(EXPORTS))
    sub = command(
        "card",
        _card,
        "write a model card, which tells what a trained backbone is, how good it is and how to load it",
        ("--run-name", "NAME", "what the card calls the run"),
        ("--name", "NAME", "what the results call the model"),
        ("--backbone", "FILE", "backbone.safetensors of stage 1 or 3"),
        ("--metrics", "FILE", "metrics.csv of its training"),
        output="Markdown file to write, README.md beside the backbone",
        settings=["data.layout, to stage3, seed and precision, with which it was trained"],
    )
    sub.add_argument("--manifest", nargs="?", metavar="FILE", help=f"{MANIFEST[2]} (not of given weights)")
    scores_help = "results of the tasks on this model, and on those to compare it with"
    sub.add_argument("--scores", nargs="*", default=[], metavar="FILE", help=scores_help)
    sub = command(
        "report",
        _report,
        "make the page that shows what a run did",
        ("--run-name", "NAME", "what the page calls the run"),
        ROOT,
        MANIFEST,
        ("--rejected", "FILE", "rejected.csv, made by `orl manifest`"),
        output="HTML page to write",
        settings=["data.exif"],
    )
    for name in ("neighbors", "proposals", "correspondences"):
        sub.add_argument(f"--{name}", metavar="FILE", help=f"{name}.h5 (all three of stage 2, or none of it)")
    sub.add_argument("--metrics", nargs="*", default=[], metavar="FILE", help="metrics.csv of each trained model")
    sub.add_argument("--scores", nargs="*", default=[], metavar="FILE", help="results of the tasks on models")
    sub.add_argument("--recalls", nargs="*", default=[], metavar="FILE", help="results of `orl evaluate proposals`")
    sub.add_argument("--pairs", nargs="*", default=[], metavar="FILE", help="results of `orl evaluate pairs`")
    sub.add_argument("--attention", nargs="*", default=[], metavar="FOLDER", help="made by `orl attention`")
    sub.add_argument("--results", metavar="FOLDER", help="of the run: its config.json and benchmarks are told of")
    sub.add_argument("--graph", metavar="FILE", help="the run's jobs, by `snakemake --dag dot`")
    sub.add_argument("--left-out", nargs="*", default=[], metavar="TEXT", help="what was not measured, and why")
    text = "show the scores of several runs side by side, and the settings in which the runs differ"
    sub = commands.add_parser("compare", help=text, description=f"{text[:1].upper()}{text[1:]}.")
    runs_help = "two or more: folders of results, as results/scenes, or their names below results, in this order"
    sub.add_argument("run_folders", nargs="+", metavar="RUN", help=runs_help)
    output_help = "folder of index.html, the page, and scores.csv (default: %(default)s, in the current folder)"
    sub.add_argument("--output", default="compare", metavar="FOLDER", help=output_help)
    sub.set_defaults(run=_compare, settings="{}", threads=os.cpu_count())

    def of_a_run(name: str, run: Callable[[argparse.Namespace, Config], None], text: str) -> argparse.ArgumentParser:
        """A command about a whole run, whose settings lie in its folder."""
        sub = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        nargs = "?" if name == "doctor" else None
        sub.add_argument("run_folder", nargs=nargs, metavar="RUN", help="folder of its results, as results/scenes")
        config_help = "config files, laid over each other as by snakemake (default: those of the run's last start)"
        sub.add_argument("--configfile", nargs="+", default=[], metavar="FILE", help=config_help)
        sub.add_argument("--threads", type=_count, default=os.cpu_count(), help="CPU cores to use (default: all)")
        sub.set_defaults(run=run, settings="{}")
        return sub

    text = (
        "check every file of a run, and its photos: what is damaged or stale, and which command mends it; without RUN, "
        "check this machine, or with --configfile estimate what is left of a run from a short measurement"
    )
    sub = of_a_run("doctor", _doctor, text)
    sub.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="for an estimate: as for snakemake")
    seconds_help = "for an estimate: about how long to measure (default %(default)s)"
    sub.add_argument("--seconds", type=float, default=60, help=seconds_help)
    text = "remove large files of a run that can be made again, after showing them"
    sub = of_a_run("clean", _clean, text)
    sub.add_argument("--leftovers", action="store_true", help="also results of earlier configs that this one has not")
    sub.add_argument("--yes", action="store_true", help="do not ask; without a terminal, nothing is removed otherwise")
    return whole


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _named(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, file


def _box(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y,W,H, four whole numbers")
    return tuple(map(int, text.split(",")))


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not NUMBER/COUNT, with a number from 1 to the count")
    return int(number), int(count)


def _say_next(args: argparse.Namespace) -> None:
    """Where the output is, and what to type next: on a terminal, since the workflow goes on by itself."""
    given = vars(args)
    if not (given.get("output") and sys.stderr.isatty()) or os.environ.get("RANK", "0") != "0":
        return
    if args.command in ("report", "export", "compare"):  # which say it
        return
    command = f"{args.command} {args.task}" if "task" in given else args.command
    kind = f" --stage {args.stage}" if "stage" in given else " --set" if command == "features" and args.set else ""
    sharded = given.get("shard") and command != "rois"
    follows = NEXT.get("--shard" if sharded else command + kind)
    print(f"orl {command}: wrote {args.output}" + (f"; next: {follows}" if follows else ""), file=sys.stderr)


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError where an output cannot be written: it would show after the work, which may take days."""
    of_folder = args.command in ("scenes", "pretrain", "attention", "fetch", "compare")
    names = ["output", "predictions", "plot", *(["rejected"] if args.command == "manifest" else [])]
    for output in filter(None, (getattr(args, name, None) for name in names)):
        if of_folder and os.path.lexists(output) and not os.path.isdir(output):
            raise InputError(f"{output}: is no folder, which is what is to be made there; name another.")
        if not of_folder and os.path.isdir(output):
            raise InputError(f"{output}: is a folder, but a file is to be made there; name a file.")
        # The folders that are replaced as a whole need their parent, as files do.
        within = args.command in ("pretrain", "fetch", "compare")
        place = Path(output).absolute() if within else Path(output).absolute().parent
        near = next(path for path in (place, *place.parents) if os.path.lexists(path))
        if not near.is_dir():
            raise InputError(f"{near}: is no folder, so {output} cannot be made; name another place.")
        if not os.access(near, os.W_OK | os.X_OK):
            raise InputError(f"{near}: cannot be written to, so {output} cannot be made; name another place.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; bad input is one sentence on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.argv = argv
    os.umask(os.umask(0o002) | 0o002)  # whatever the user's: what others could write to would be theirs to change
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    # OpenMP's threads spin while they wait, which makes a step 16 times slower as soon as anything else wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    try:
        config = load(args.settings)
        _check_outputs(args)
        args.run(args, config)
        _say_next(args)
    except (InputError, OSError) as error:
        # A worker process's error arrives with its traceback in the message; the sentence is the last line.
        sentence = re.sub(r"^orl\.[\w.]*Error: ", "", (str(error).strip() or type(error).__name__).splitlines()[-1])
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            sentence = f"{error.filename or args.output}: no room on the disk; free some and run again."
        if os.environ.get("RANK", "0") != "0":  # what is wrong everywhere, rank 0 says; torchrun then ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20)  # on a busy machine rank 0 starts that much later
        with contextlib.suppress(OSError):  # where the log lies on the same full disk
            print(f"orl {args.command}: {sentence}", file=sys.stderr, flush=True)
        if isinstance(error, NoRoomError):
            os._exit(1)  # a file that HDF5 could not close makes it crash when Python ends
        sys.exit(2 if isinstance(error, InputError) else 1)
    except RuntimeError as error:  # torch's kind
        if os.environ.get("RANK", "0") != "0":  # as a rule because another process failed, which says why
            time.sleep(3)
            sys.exit(1)
        if "out of memory" in str(error):
            advice = "make the batch smaller" + (
                " or raise optimizer.accumulation" if args.command == "pretrain" else ""
            )
            print(f"orl {args.command}: {str(error).splitlines()[0]} ({advice})", file=sys.stderr)
        elif "gloo" in str(error) or "NCCL" in str(error):
            print(f"orl {args.command}: another process of the training ended", file=sys.stderr)
        else:
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
