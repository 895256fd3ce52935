"""`orl doctor RUN`: what of a run is sound, what is stale or damaged, and the command that mends it."""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from orl import InputError, artifacts
from orl.config import EXPORTS, used, used_by_share
from orl.data.decoded import beside
from orl.doctor import content, left
from orl.doctor.chain import MERGED, SCHEMAS, Chain, differences, open_run, rule_of
from orl.doctor.labels import Labels, is_newer
from orl.places import MODELS, unique

Mark = Literal["ok", "stale", "damaged", "missing", "note"]
BAD = ("stale", "damaged", "missing")
EXTRA = {"made_with", "features", "run"}  # what a result tells among its settings that is none of its own
SNAKEMAKE = "Snakemake"  # of which a line tells
NAMED = 3  # photos of a kind; more are counted


@dataclass(frozen=True)
class Finding:
    """A line of the examination, and what mends it: files to delete, targets that Snakemake is to make again, or both.

    `again`: Snakemake alone does; `command`: another command does.
    """

    mark: Mark
    what: str
    text: str
    force: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    again: bool = False
    command: str = ""


def doctor(folder: str, configs: Sequence[str], threads: int) -> bool:
    """Examine the run in `folder` and print what is found; whether all of it is sound.

    It is compared with the config of its last start, or with the files `configs`, laid over each other. `threads`
    processes read photos again that were written after the manifest. Raises InputError.
    """
    home, chain = open_run(folder, configs)
    here = os.getcwd()
    counts: dict[str, int] = dict.fromkeys(("ok", *BAD, "note"), 0)
    force: list[str] = []
    remove: list[str] = []
    commands = set()
    is_unfinished = at_work = False
    with contextlib.chdir(home):
        if home != here:
            print(f"Commands are to be typed in {home}.")
        for finding in Examination(chain, threads).findings():
            counts[finding.mark] += 1
            print(f"{finding.mark:8} {finding.what}: {finding.text}")
            is_unfinished |= finding.mark == "note" and finding.again
            at_work |= finding.what == SNAKEMAKE and finding.mark == "note"
            command = finding.command or mend(
                chain, finding.remove, finding.force, finding.again and finding.mark in BAD
            )
            if command:
                print(f"{'':8}   {command}")
            if finding.mark in BAD and command and not finding.command:
                force, remove = [*force, *finding.force], [*remove, *finding.remove]
                commands.add(command)
            sys.stdout.flush()
        if len(commands) > 1:
            print(f"All at once:\n{'':8}   {mend(chain, remove, force, True)}")
        elif is_unfinished and not commands and not at_work:
            print(f"To make what is not made yet:\n{'':8}   {mend(chain, (), (), True)}")
    words = {"ok": "ok", "note": "notes" if counts["note"] != 1 else "note"}
    told = [f"{count} {words.get(mark, mark)}" for mark, count in counts.items() if count]
    print(f"{folder}: {', '.join(told)}")
    return not any(counts[mark] for mark in BAD)


def mend(chain: Chain, remove: Sequence[str], force: Sequence[str], again: bool) -> str:
    """The command that deletes some files and makes others again."""
    parts = []
    if remove:
        recursive = "-r " if any(map(os.path.isdir, remove)) else ""
        parts.append(f"rm {recursive}{shlex.join(dict.fromkeys(remove))}")
    if force or again:
        forced = f" --forcerun {' '.join(dict.fromkeys(force))}" if force else ""
        parts.append(f"snakemake --cores all --configfile {shlex.join(chain.config_files)}{forced}")
    return " && ".join(parts)


class Examination:
    """One look at a run, from the folder in which it was started."""

    def __init__(self, chain: Chain, threads: int) -> None:
        self.chain, self.places, self.threads = chain, chain.places, threads
        self.needed = self.places.needed
        self.asked = {self.places.made(stage, v) for stage, v in self.places.asked()}
        self.stale: set[tuple[str, str]] = set()
        self.manifest: artifacts.Manifest | None = None
        self.refused: list[str] = []  # the files that are no photo
        self.labels = Labels(chain)

    def findings(self) -> Iterator[Finding]:
        """All there is to say, in the order in which things are made."""
        yield from self._snakemake()
        for stage, v in self.places.stages():
            yield from self._stage(stage, v)
            if stage == "manifest" and self.manifest:
                yield from self._photos(self.manifest)
        for what, why in self.labels.gone.items():
            yield Finding("missing", what, why)
        yield from self._exports()
        yield from self._cards()
        yield from self._report()
        yield from self._states()
        yield from self._rest()

    # What all stages have in common

    def _stage(self, stage: str, v: str) -> Iterator[Finding]:
        place = self.places.found(stage, v)
        task = re.split(r"[. ]", stage)[0]
        if stage in MODELS.values() and left.is_locked(Path(place, "state")):
            yield Finding("note", self.chain.short(place), "a training runs there")
            return
        checks: dict[str, Callable[[str, str], Iterator[Finding]]] = {
            "manifest": self._manifest,
            **dict.fromkeys(MODELS.values(), self._model),
            **dict.fromkeys(MERGED, self._merged),
            "neighbors": self._whole,
            "rois": self._rois,
            "attention": self._attention,
            "subset": self._subset,
            "features": self._features,
            "set_features": self._features,
            "semi": self._semi,
        }
        if not self.chain.exists(stage, v) and task not in (*MERGED, "semi"):
            found = self._absent(stage, v)
        else:
            found = checks.get(task, self._result)(stage, v)
        for finding in found:
            if finding.mark == "stale" and (stage, v) in self.needed:
                self.stale.add((stage, v))
            if finding.mark in BAD and (stage, v) not in self.needed:
                text = f"{finding.mark}, but this config does not ask for it ({finding.text})"
                finding = Finding("note", finding.what, text)
            yield finding

    def _absent(self, stage: str, v: str) -> Iterator[Finding]:
        """What to say where nothing of a stage is there."""
        if (stage, v) not in self.needed:
            return
        what = self.chain.short(self.places.found(stage, v))
        used_up = any(self.chain.exists(*one) for one in self.places.made_of(stage, v))
        if (stage, v) in self.asked and (used_up or self._is_finished):
            yield Finding("missing", what, "it was removed", again=True)
        elif used_up:
            yield Finding("note", what, "not there; made again when something needs it")
        else:
            yield Finding("note", what, "not made yet", again=(stage, v) in self.asked)

    @cached_property
    def _is_finished(self) -> bool:
        """Whether the run was finished with this config: the page comes after all that it asks for."""
        page, kept = (Path(self.places.results, name) for name in ("report/index.html", "config.json"))
        own = [f"{self.places.results}/config.json"]
        return self.chain.config_files == own and page.exists() and page.stat().st_mtime >= kept.stat().st_mtime

    def _judged(
        self,
        stage: str,
        v: str,
        what: str,
        text: str,
        damage: str = "",
        reasons: Sequence[str] = (),
        force: tuple[str, ...] = (),
        remove: tuple[str, ...] = (),
    ) -> Finding:
        """One finding on a file of a stage, of what was seen."""
        if damage:
            again = bool(remove) and not force and not self._is_done(stage, v)
            return Finding("damaged", what, self._said(damage), force, remove, again)
        if reasons:
            return Finding("stale", what, "; ".join(reasons), force, remove)
        if source := self._stale_source(stage, v):
            return Finding("stale", what, f"made from {source}, which is stale")
        return Finding("ok", what, text)

    def _stale_source(self, stage: str, v: str) -> str:
        """The place of what a stage is made from, if that is stale; else empty."""
        made = (self.places.made(upstream, v) for upstream in self.places.made_from(stage, v))
        return next((self.places.place(*one) for one in made if one in self.stale), "")

    def _said(self, message: str) -> str:
        """What an InputError says, without the path that the line begins with."""
        return re.sub(rf"^{re.escape(self.places.results)}/[^:]*: ", "", message).rstrip(".")

    def _is_done(self, stage: str, v: str) -> bool:
        """Whether all that is to be made from a stage is there."""
        return all(self.chain.exists(*one) for one in self.places.made_of(stage, v))

    def _targets(self, stage: str, v: str) -> tuple[str, ...]:
        """What --forcerun is to be given so that a stage is made again, and no more than that."""
        rule = rule_of(stage)
        same = [one for one in self.needed if rule_of(one[0]) == rule]
        if len(same) <= 1 or stage == "manifest":
            return (rule,)
        if rule in ("embed", "propose", "correspond", "rois"):
            files = self.places.shards(stage, v)
            if len(files) > 1:  # for the shell to write out
                folder = shlex.quote(str(Path(files[0]).parent))
                return (f"{folder}/{{0001..{len(files):04}}}-of-{len(files):04}.h5",)
            return tuple(map(shlex.quote, files))
        if stage.startswith("subset"):
            return tuple(shlex.quote(f"{self.chain.files(stage, v)[0]}/{share}.txt")
                         for share in self.chain.config(v).downstream.semi.shares)  # fmt: skip
        return (shlex.quote(self.chain.files(stage, v)[0]),)

    # Stages

    def _manifest(self, stage: str, v: str) -> Iterator[Finding]:
        path, rejected = (f"{self.places.results}/{name}" for name in ("manifest.csv", "rejected.csv"))
        reasons = []
        if self.places.scenes:
            reasons += self._scenes()
        if self.places.held.get("manifest.csv", self.places.digest(stage, v)) != self.places.digest(stage, v):
            reasons.append("made with other settings of `data`")
        damage = ""
        try:
            self.manifest = artifacts.read_manifest(path)
            if os.path.exists(rejected):
                self.refused = content.check_rejected(rejected)
        except InputError as error:
            damage = str(error)
        force = ("scenes",) if self.places.scenes and reasons else ("manifest",)
        rows = len(self.manifest) if self.manifest else 0
        text = f"{rows} photos, {len(self.refused)} rejected"
        yield self._judged(stage, v, "manifest.csv", text, damage, reasons, force)
        if not os.path.exists(rejected):
            yield Finding("missing", "rejected.csv", "it was removed", force)

    def _scenes(self) -> list[str]:
        """Why the generated scenes, if they are there, are not those of the settings."""
        if not os.path.isdir(self.places.root):
            return []
        try:
            found = json.loads(Path(self.places.root, "scenes.json").read_text(encoding="utf-8"))["settings"]
        except (OSError, LookupError, ValueError):
            return ["the scenes are not whole"]
        told = differences(
            {"data": {"scenes": found}}, {"data": {"scenes": self.places.run.data.scenes.model_dump(mode="json")}}
        )
        return [f"the scenes: {one}" for one in told]

    def _photos(self, manifest: artifacts.Manifest) -> Iterator[Finding]:
        from orl.doctor.photos import compare

        root, again = self.places.root, ("manifest",)
        what = f"photos in {root}"
        if not os.path.isdir(root):
            advice = "" if self.places.scenes else "; bring it back, or set data.root"
            yield Finding(
                "missing", what, f"there is no such folder{advice}", ("scenes",) if self.places.scenes else ()
            )
            return
        made = os.stat(f"{self.places.results}/manifest.csv").st_mtime_ns
        try:
            found = compare(self.places.run, root, manifest, made, self.refused, self.threads)
        except InputError as error:
            yield Finding("missing", what, str(error).rstrip("."))
            return
        if self.places.scenes:
            again = ("scenes",)
        kinds: tuple[tuple[str, Mark, str, tuple[str, ...]], ...] = (
            ("missing", "missing", "of the manifest are not there", again),
            ("changed", "stale", "changed since the manifest was made", again),
            ("new", "stale", "neither in the manifest nor in rejected.csv", again),
            ("touched", "note", "written since the manifest was made, of the same size", ()),
        )
        sound = True
        for kind, mark, text, force in kinds:
            if names := found[kind]:
                sound &= mark not in BAD
                more = ", ..." if len(names) > NAMED else ""
                advice = "; bring back what is missing, or" if mark == "missing" else ""
                yield Finding(mark, what, f"{len(names)} {text} ({', '.join(names[:NAMED])}{more}){advice}", force)
        if sound:
            yield Finding("ok", what, f"{len(manifest)} as the manifest says")

    def _model(self, stage: str, v: str) -> Iterator[Finding]:
        section = self.chain.config(v).stage3 if stage == "stage3" else self.chain.config(v).stage1
        epochs = 0 if self.chain.weights(stage, v) else section.optimizer.epochs
        paths = self.chain.files(stage, v)
        if stage != "random":
            paths.append(f"{self.places.found(stage, v)}/metrics.csv")
        force, anew = self._targets(stage, v), self._anew(stage, v)
        prints = set()
        for path in paths:
            what = self.chain.short(path)
            if not os.path.exists(path):
                yield Finding("missing", what, f"it was removed{anew}", force)
                continue
            reasons: list[str] = []
            damage = text = ""
            try:
                if path.endswith(".csv"):
                    text = content.check_metrics(path, epochs)
                else:
                    attributes = artifacts.attributes(path)
                    content.check_stamp(path, attributes, SCHEMAS[stage])
                    reasons = self.chain.reasons(stage, v, attributes)
                    prints.add(attributes["fingerprint"])
                    text = content.check_weights(path)
                    if len(prints) > 1 and not reasons:
                        reasons = ["of another training than backbone.safetensors"]
            except InputError as error:
                damage = f"{str(error).rstrip('.')}{anew}"
            found = self._judged(stage, v, what, text, damage, reasons, force)
            yield found
            if found.mark == "stale":  # so are the others
                return

    def _anew(self, stage: str, v: str) -> str:
        """That a model can only be made again by training it from the start, where its checkpoint is gone."""
        if stage not in ("stage1", "stage3") or self.chain.weights(stage, v):
            return ""
        kept = Path(self.places.found(stage, v), "state", (self.chain.stamp(stage, v) or "")[:16], "checkpoint.pt")
        return "" if kept.exists() else " (trained again from the start: its checkpoint is gone)"

    def _whole(self, stage: str, v: str) -> Iterator[Finding]:
        path = self.chain.files(stage, v)[0]
        total = artifacts.part(len(self.manifest), None) if self.manifest else None
        damage, text, reasons = self._hdf5(stage, v, path, total, shard=False)
        yield self._judged(stage, v, self.chain.short(path), text, damage, reasons, self._targets(stage, v))

    def _merged(self, stage: str, v: str) -> Iterator[Finding]:
        path = self.chain.files(stage, v)[0]
        if os.path.exists(path):
            yield from self._whole(stage, v)
        else:
            yield from self._absent(stage, v)
        yield from self._shards(stage, v, os.path.exists(path))

    def _rois(self, stage: str, v: str) -> Iterator[Finding]:
        yield from self._shards(stage, v, self._is_done(stage, v))

    def _shards(self, stage: str, v: str, done: bool) -> Iterator[Finding]:
        """`done`: what they are for is there, so that they may be removed."""
        folder = Path(self.places.found(stage, v).removesuffix(".h5"))
        files = sorted(folder.glob("[0-9]*-of-[0-9]*.h5"))
        sound, stale = 0, dict[str, list[Finding]]()  # by the reason
        for path in files:
            number, count = map(int, path.stem.split("-of-"))
            part = artifacts.part(len(self.manifest), (number, count)) if self.manifest else None
            damage, text, reasons = self._hdf5(stage, v, str(path), part, shard=True)
            force = () if damage else self._targets(stage, v)
            remove = (str(path),) if damage else ()
            found = self._judged(stage, v, self.chain.short(path), text, damage, reasons, force, remove)
            if found.mark == "damaged":
                yield found
            elif found.mark == "stale":
                stale.setdefault(found.text, []).append(found)
            sound += found.mark == "ok"
        for text, (first, *others) in stale.items():
            if others:
                text = f"{1 + len(others)} shards: {text}"
                first = replace(first, what=f"{self.chain.short(folder)}/", text=text)
            yield first
        if sound:
            wanted = self.places.shards(stage, v)
            here = sum(map(os.path.exists, wanted))
            text = (
                f"{sound} shard{'s' if sound > 1 else ''}"
                if done or here == len(wanted)
                else f"{here} of {len(wanted)} shards so far"
            )
            yield Finding("ok", f"{self.chain.short(folder)}/", text)

    def _hdf5(
        self, stage: str, v: str, path: str, part: artifacts.Part | None, shard: bool
    ) -> tuple[str, str, list[str]]:
        """What is damaged in a file of stage 2, what it holds, and why it is stale."""
        schema, reasons = SCHEMAS[stage], list[str]()
        try:
            found = artifacts.attributes(path)
            content.check_stamp(path, found, schema)
            reasons = self.chain.reasons(stage, v, found)
            alone = bool(reasons or self._stale_source(stage, v))  # what it was made from is not what is there now
            if shard and "rows" in found and part and not alone:
                if json.loads(found["rows"]) != [part.start, part.stop, part.total]:
                    raise InputError(f"{path}: holds rows {found['rows']} of the manifest, not those of its name.")
            elif shard and "rows" not in found:
                raise InputError(f"{path}: is no shard.")
            elif not shard and "rows" in found:
                raise InputError(f"{path}: is one shard, not the whole.")
            if alone:
                return "", content.check_arrays(path, schema), reasons
            offsets = self._offsets(v) if schema in (artifacts.ROIS, artifacts.CORRESPONDENCES) else None
            return "", content.check_arrays(path, schema, part, self.manifest, offsets), reasons
        except InputError as error:
            if reasons:  # it is to be made again in any case
                return "", "", reasons
            return str(error), "", []

    def _offsets(self, v: str) -> np.ndarray | None:
        """The box_offsets of a run's proposals.h5, where they are sound."""
        try:
            found = artifacts.read_proposals(self.places.found("proposals", v))
            content.check_offsets(found.box_offsets, "box_offsets", None, len(found.box))
            return np.array(found.box_offsets)
        except (InputError, ValueError):
            return None

    def _features(self, stage: str, v: str) -> Iterator[Finding]:
        task = stage.split()[0]
        path = self.chain.files(stage, v)[0]
        schema = SCHEMAS[task.partition(".")[0]]
        reasons, damage, text = list[str](), "", ""
        try:
            found = artifacts.attributes(path)
            content.check_stamp(path, found, schema)
            reasons = self.chain.reasons(stage, v, found)
            settings, inputs = json.loads(found["settings"]), json.loads(found["inputs"])
            stages = tuple(settings["downstream"]["voc07_svm"]["stages"]) if task == "features" else ()
            text = content.check_arrays(path, schema, stages=stages)
            names = ("photo list",) if task == "features" else ("train", "val")
            now = self.labels.of(task, v, path)
            if now and [inputs.get(name) for name in names] != now[1:]:
                reasons.append("made of other labelled photos than those there")
        except InputError as error:
            damage = str(error)
        remove = (path,) if damage else ()
        force = () if damage else self._targets(stage, v)
        yield self._judged(stage, v, self.chain.short(path), text, damage, reasons, force, remove)

    def _result(self, stage: str, v: str) -> Iterator[Finding]:
        path = self.chain.files(stage, v)[0]
        task = stage.split()[0]
        damage, reasons = "", list[str]()
        try:
            result = artifacts.read_results(path)
            own = {key: value for key, value in result["settings"].items() if key not in EXTRA}
            reasons = differences(own, used(self.chain.config(v), task)) + self._sources(stage, v, path, result["data"])
            predictions = path.replace(".json", ".predictions.json")
            if task == "detection":
                content.check_end(predictions, "]")
        except InputError as error:
            damage = str(error)
        yield self._judged(stage, v, self.chain.short(path), task, damage, reasons, self._targets(stage, v))

    def _sources(self, stage: str, v: str, path: str, data: dict) -> list[str]:
        """What of that which a result was measured on is not what lies there now."""
        model = stage.partition(" ")[2]
        expected: dict[str, tuple[str | None, str]] = {
            f"{made}_fingerprint": (self.chain.fingerprint(made, v), self.places.found(made, v))
            for made in ("proposals", "correspondences")
        }
        if model:
            file = self.chain.files(model, v)[0]
            expected["weights_fingerprint"] = self.chain.fingerprint(model, v), file
        reasons = [
            self.chain.other(file) for key, (now, file) in expected.items() if key in data and now and data[key] != now
        ]
        if "annotations" in data:
            prints = [self.chain.of_file(file) for file in self.places.objects()]
            if data["annotations_fingerprints"] != prints:
                reasons.append("measured on other annotations than those there")
        task = stage.split()[0]
        if "fingerprint" in data:
            now = self.labels.of(task, v, path)
            if now and data["fingerprint"] != now[0]:
                reasons.append("measured on other labels than those there")
        return reasons

    def _semi(self, stage: str, v: str) -> Iterator[Finding]:
        task = stage.split()[0]
        path = self.chain.files(stage, v)[0]
        if os.path.exists(path):
            damage, reasons = "", list[str]()
            try:
                result = artifacts.read_results(path)
                config = self.chain.config(v)
                shares = [str(share) for share in config.downstream.semi.shares]
                if sorted(result["settings"]["shares"]) != sorted(shares):
                    reasons = [f"of shares {', '.join(result['settings']['shares'])}, config {', '.join(shares)}"]
                reasons += self._sources(stage, v, path, result["data"])
            except (InputError, KeyError) as error:
                damage = str(error)
            yield self._judged(stage, v, self.chain.short(path), task, damage, reasons, self._targets(stage, v))
        else:
            yield from self._absent(stage, v)
        yield from self._semi_runs(stage, v, path.removesuffix(".json"))

    def _semi_runs(self, stage: str, v: str, folder: str) -> Iterator[Finding]:
        """The trainings of a grid; those of shares that are not asked for are kept, and not looked at."""
        sound = 0
        config, of_set = self.chain.config(v), f"semi_run.{stage.split()[0].partition('.')[2]}"
        for path in sorted(map(str, Path(folder).glob("*.json"))):
            damage, reasons = "", list[str]()
            try:
                result = artifacts.read_results(path)
                share = str(result["settings"]["run"]["share"])
                if share not in map(str, config.downstream.semi.shares):
                    continue
                own = {key: value for key, value in result["settings"].items() if key not in EXTRA}
                reasons = differences(own, used_by_share(config, of_set, share))
                reasons += self._sources(stage, v, path, result["data"])
            except (InputError, KeyError) as error:
                damage = str(error)
            found = self._judged(stage, v, self.chain.short(path), "", damage, reasons, (shlex.quote(path),))
            if found.mark == "ok":
                sound += 1
            else:
                yield found
        if sound:
            yield Finding("ok", f"{self.chain.short(folder)}/", f"{sound} trainings")

    def _subset(self, stage: str, v: str) -> Iterator[Finding]:
        folder = self.chain.files(stage, v)[0]
        damage = ""
        files = [Path(folder, f"{share}.txt") for share in self.chain.config(v).downstream.semi.shares]
        for path in files:
            if path.exists() and not path.stat().st_size:
                damage = f"{path.name} is empty"
        here = sum(path.exists() for path in files)
        text = f"{here} of {len(files)} lists"
        yield self._judged(stage, v, f"{self.chain.short(folder)}/", text, damage, (), self._targets(stage, v))

    def _attention(self, stage: str, v: str) -> Iterator[Finding]:
        folder = self.chain.files(stage, v)[0]
        damage, text, reasons = "", "", list[str]()
        try:
            found = content.check_pictures(Path(folder))
            text = f"{len(found['photos'])} photos"
            reasons = differences(found["settings"], used(self.chain.config(v), stage))
            made = {name: found["data"].get(name) for name in ("manifest", "proposals", "correspondences")}
            for name, value in made.items():
                now = self.chain.fingerprint(name, v)
                if value and now and value != now:
                    reasons.append(self.chain.other(self.places.found(name, v)))
            for model in self.places.models_of(v):
                value, now = found["data"]["weights"].get(model), self.chain.fingerprint(MODELS[model], v)
                if now and value != now:
                    reasons.append(self.chain.other(self.chain.files(MODELS[model], v)[0]))
        except InputError as error:
            damage = str(error)
        yield self._judged(stage, v, f"{self.chain.short(folder)}/", text, damage, reasons, self._targets(stage, v))

    # What is no stage

    def _exports(self) -> Iterator[Finding]:
        for stage, v in self.places.trained():
            if self.places.made(stage, v) != (stage, v):
                continue
            backbone = self.chain.files(stage, v)[0]
            for form in self.chain.config(v).export:
                path = f"{self.places.found(stage, v)}/{form}{EXPORTS[form]}"
                what, force = self.chain.short(path), (shlex.quote(path),)
                if not os.path.exists(path):
                    if os.path.exists(backbone):
                        yield Finding("missing" if self._is_finished else "note", what, "not there", again=True)
                    continue
                older = os.path.exists(backbone) and is_newer([backbone], path)
                if path.endswith(".safetensors") and os.path.exists(backbone):
                    older = self.chain.of_file(path) != self.chain.of_file(backbone)
                reasons = [self.chain.other(backbone)] if older else []
                yield self._judged(stage, v, what, "exported", "", reasons, force)

    def _cards(self) -> Iterator[Finding]:
        for stage, v in unique(self.places.made(*one) for one in self.places.trained()):
            backbone, path = self.chain.files(stage, v)[0], f"{self.places.found(stage, v)}/README.md"
            what, reasons = self.chain.short(path), list[str]()
            if not os.path.exists(path):
                if os.path.exists(backbone):
                    yield Finding("missing" if self._is_finished else "note", what, "not there", again=True)
                continue
            told = [f"{self.places.found(stage, v)}/metrics.csv"]
            told += [self.chain.files(*one)[0] for one in self.places.told(stage, v)]
            newer = sorted(file for file in told if os.path.exists(file) and is_newer([file], path))
            weights = self.chain.of_file(backbone)
            if weights and not Path(path).read_bytes().rstrip().endswith(f"`{weights}`".encode()):
                reasons = ["cut off, or of other weights than those there"]
            elif newer:
                reasons = [f"older than {self.chain.short(newer[0])}, of which it tells"]
            yield self._judged(stage, v, what, "of these weights", "", reasons, (shlex.quote(path),))

    def _report(self) -> Iterator[Finding]:
        path = f"{self.places.results}/report/index.html"
        what = self.chain.short(path)
        if not os.path.exists(path):
            yield Finding("note", what, "not made yet", again=True)
            return
        try:
            content.check_end(path, "</html>")
        except InputError as error:
            yield Finding("damaged", what, self._said(str(error)), ("report",))
            return
        shown = {self.chain.files(*one)[0] for one in self.places.asked() if one[0] not in MODELS.values()}
        shown |= {f"{self.places.found(*one)}/metrics.csv" for one in self.places.trained()}
        newer = sorted(file for file in shown if os.path.exists(file) and is_newer([file], path))
        stale = sorted(self.places.found(*one) for one in self.stale)
        if newer:
            yield Finding("stale", what, f"older than {self.chain.short(newer[0])}, which it shows", ("report",))
        elif stale:
            yield Finding("stale", what, f"made from {self.chain.short(stale[0])}, which is stale")
        else:
            yield Finding("ok", what, "newer than all that it shows")

    def _states(self) -> Iterator[Finding]:
        decoded = beside(self.places.found("manifest"))
        if decoded.exists():
            text = f"the photos decoded so far, {left.human(left.size_of(decoded))}; `orl manifest` takes them over"
            yield Finding("note", self.chain.short(decoded), text)
        models = {self.places.found(stage, v): (stage, v) for stage in ("stage1", "stage3") for v in self.places.runs}
        for state in left.states(self.places.results):
            what = self.chain.short(state)
            if left.is_locked(state):
                yield Finding("note", what, "a training holds its lock")
                continue
            made = models.get(str(state.parent))
            for folder in left.checkpoints(state):
                checkpoint, size = folder / "checkpoint.pt", left.human(left.size_of(folder))
                what = self.chain.short(folder)
                if not checkpoint.exists():
                    yield Finding("note", what, f"without a checkpoint, {size}; `orl clean` removes it")
                    continue
                try:
                    step = left.step_of(checkpoint)
                except InputError as error:
                    again = made is not None and self.places.made(*made) in self.needed
                    yield Finding("damaged", what, self._said(str(error)), remove=(str(folder),), again=again)
                    continue
                text = f"{self._told(made, folder.name, Path(str(state).removesuffix('.state')))}, step {step}, {size}"
                yield Finding("note", what, text)

    def _told(self, made: tuple[str, str] | None, stamp: str, result: Path) -> str:
        """What a checkpoint is of."""
        if made is None:
            return "a left-over" if result.exists() else "an unfinished training"
        if stamp == (self.chain.fingerprint(*made) or "")[:16] and self.chain.exists(*made):
            return "of the model that is there"
        if not self.chain.weights(*made) and stamp == (self.chain.stamp(*made) or "")[:16]:
            return "an unfinished training, which goes on from it"
        return "a left-over of other settings, inputs or versions"

    def _rest(self) -> Iterator[Finding]:
        for path, ended in left.temporaries(self.places.results):
            text = f"temporary, {left.human(left.size_of(path))}"
            yield Finding(
                "note",
                self.chain.short(path),
                f"{text}, left by a process that has ended" if ended else f"{text}, being written",
                remove=(str(path),) if ended else (),
            )
        for path in left.leftovers(self.places):
            text = f"of an earlier config, {left.human(left.size_of(path))}; no run of this one uses it"
            yield Finding("note", self.chain.short(path), text)

    def _snakemake(self) -> Iterator[Finding]:
        results = self.places.results
        if left.locked_by_snakemake(results):
            if left.snakemake_runs():
                yield Finding("note", SNAKEMAKE, "is at work; what it has not come to yet may be stale")
                return
            text = "was killed, or works on another machine; only if it does not:"
            yield Finding("stale", SNAKEMAKE, text, command="snakemake --unlock")
        for path in left.incomplete(results):
            command = f"{mend(self.chain, (), (), True)} --rerun-incomplete"
            yield Finding(
                "damaged", self.chain.short(path), "Snakemake began to make it and was stopped", command=command
            )
