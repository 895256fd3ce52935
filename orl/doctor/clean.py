"""`orl clean RUN`: removes what is large and can be made again, after showing it; results stay."""

import contextlib
import fcntl
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orl import InputError, artifacts
from orl.data.decoded import beside
from orl.doctor import content, left
from orl.doctor.chain import MERGED, SCHEMAS, Chain, open_run


@dataclass(frozen=True)
class Item:
    """Something that may go: its files and folders, their bytes, and what it takes to have them again."""

    name: str
    paths: tuple[Path, ...]
    size: int
    text: str


def clean(folder: str, configs: Sequence[str], leftovers: bool, yes: bool) -> None:
    """List what can go of the run in `folder`, ask, and remove it; without a terminal to ask on, only with `yes`.

    Snakemake does not miss what is removed. `leftovers`: results of earlier configs, too. Raises InputError while a
    training or Snakemake works there.
    """
    home, chain = open_run(folder, configs)
    with contextlib.chdir(home):
        _check_idle(chain)
        items, kept = plan(chain, leftovers)
        for line in kept:
            print(f"kept: {line}")
        if not items:
            print(f"{folder}: nothing to remove")
            return
        for item in items:
            print(f"{left.human(item.size):>7}  {item.name}: {item.text}")
        print(f"{left.human(sum(item.size for item in items)):>7}  in all")
        if not yes:
            if not sys.stdin.isatty():
                print("nothing is removed: there is no terminal to ask on; add --yes")
                return
            if input("Remove? [y/N] ").strip().lower() not in ("y", "yes"):
                print("nothing is removed")
                return
        with _locked(chain):
            _check_idle(chain, trainings=False)
            _, now = open_run(chain.results, chain.config_files)  # time has passed
            still = {path for item in plan(now, leftovers)[0] for path in item.paths}
            freed = sum(_remove(path) for item in items for path in item.paths if path in still)
        print(f"{folder}: {left.human(freed)} removed")


def _check_idle(chain: Chain, trainings: bool = True) -> None:
    for state in left.states(chain.results) if trainings else ():
        if left.is_locked(state):
            raise InputError(f"{state}: a training runs there; wait for it or stop it.")
    if left.locked_by_snakemake(chain.results):
        raise InputError(
            f"{chain.results}: Snakemake works there, or was killed; wait for it, or type `snakemake --unlock`."
        )


@contextlib.contextmanager
def _locked(chain: Chain) -> Iterator[None]:
    """Hold the locks of all trainings, so that none begins. Raises InputError where one runs."""
    with contextlib.ExitStack() as held:
        for state in left.states(chain.results):
            file = held.enter_context(open(state / "lock", "a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{state}: a training runs there; wait for it or stop it.") from None
        yield


def _remove(path: Path) -> int:
    """Remove a file or folder, and its folder if it is then empty; the bytes that it took."""
    size = left.size_of(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        path.parent.rmdir()
    return size


# What can go


def plan(chain: Chain, leftovers: bool = False) -> tuple[list[Item], list[str]]:
    """What can go, and what looks like it but stays, with the reason."""
    kept: list[str] = []
    found = [*_shards(chain, kept), *_features(chain), *_states(chain), *_rest(chain, leftovers)]
    inside = f"{Path(chain.results).resolve()}/"
    items = []
    for name, paths, text in found:
        own = [path for path in paths if f"{path.parent.resolve()}/".startswith(inside) and not path.is_symlink()]
        # A folder of the run that is a link has its files elsewhere.
        if len(own) < len(paths):
            kept.append(f"{name}: lies behind a link, outside of the run")
        if own:
            items.append(Item(name, tuple(own), sum(map(left.size_of, own)), text))
    return items, kept


Found = tuple[str, list[Path], str]


def _stages(chain: Chain, *names: str) -> Iterator[tuple[str, str]]:
    """Those whose names begin so, by the run whose folder holds them."""
    return (made for made in chain.places.stages() if made[0].startswith(names))


def _is_current(chain: Chain, stage: str, v: str) -> bool:
    """Whether a stage's file can be read and is the one that would be made now."""
    path = chain.files(stage, v)[0]
    try:
        if path.endswith(".h5"):
            artifacts.read_arrays(path, SCHEMAS[stage], shards=stage == "rois")
        return not chain.reasons(stage, v, artifacts.attributes(path))
    except (InputError, LookupError, ValueError):
        return False


def _is_done(chain: Chain, stage: str, v: str) -> bool:
    """Whether all that is to be made from a stage is there as it would be made now."""
    later = chain.places.made_of(stage, v)
    return all(_is_current(chain, *one) if one[0] in SCHEMAS else chain.exists(*one) for one in later)


def _shards(chain: Chain, kept: list[str]) -> Iterator[Found]:
    places = chain.places
    for stage, v in _stages(chain, *MERGED, "rois"):
        folder = Path(places.found(stage, v).removesuffix(".h5"))
        files = sorted(folder.glob("[0-9]*-of-[0-9]*.h5"))
        if not files:
            continue
        name = f"{chain.short(folder)}/ ({len(files)} shard{'s' if len(files) > 1 else ''})"
        if stage == "rois":
            if not _is_done(chain, stage, v):
                kept.append(f"{name}: the pairs are not found from them yet")
                continue
            text = "RoI features; computed again if pairs are to be found with other settings"
        else:
            if not _is_current(chain, stage, v):
                kept.append(f"{name}: {stage}.h5 is not made from them yet")
                continue
            text = f"joined in {stage}.h5; made again only with it"
        made, asked = len(places.shards(stage, v)), getattr(places.run.compute.shards, stage)
        if made != asked:  # of other inputs, Snakemake would make what follows again
            kept.append(
                f"{name}: compute.shards.{stage} is {asked} now; removed, they would make what follows run again"
            )
            continue
        yield name, files, text


def _features(chain: Chain) -> Iterator[Found]:
    for stage, v in _stages(chain, "features ", "set_features."):
        path = Path(chain.files(stage, v)[0])
        if path.exists() and (_is_done(chain, stage, v) or (stage, v) not in chain.places.needed):
            yield chain.short(path), [path], "features; computed again when they are evaluated with other settings"


def _states(chain: Chain) -> Iterator[Found]:
    places = chain.places
    decoded = beside(places.found("manifest"))
    if decoded.exists() and chain.exists("manifest", ""):
        text = "sizes of the photos decoded; without it, `--forcerun manifest` decodes all of them again"
        yield chain.short(decoded), [decoded], text
    models = {places.found(stage, v): (stage, v) for stage in ("stage1", "stage3") for v in places.runs}
    for state in left.states(chain.results):
        made = models.get(str(state.parent))
        there, next_one = _stamps(chain, state, made)
        for folder in left.checkpoints(state):
            if folder.name == there:
                text = "checkpoint and curves of the finished training; without it, --forcerun trains from the start"
            elif folder.name == next_one or (made is None and not there):
                continue  # an unfinished training goes on from it
            else:
                text = "checkpoint of other settings, inputs or versions; going back to them would train from the start"
            yield chain.short(folder), [folder], text


def _stamps(chain: Chain, state: Path, made: tuple[str, str] | None) -> tuple[str, str]:
    """The names of the checkpoints of what is there, whole, and of what would be trained now; "" where unknown."""
    if made is None:  # beside a result, whose checkpoint is removed when it is written
        return ("done" if Path(str(state).removesuffix(".state")).exists() else ""), ""
    files = chain.files(*made)
    there = ""
    with contextlib.suppress(InputError):
        prints = {artifacts.fingerprint(path) for path in files}
        for path in files:
            content.check_weights(path)
        if len(prints) == 1 and Path(files[0]).with_name("metrics.csv").exists():
            there = prints.pop()[:16]
    trained = not chain.weights(*made)
    return there, (chain.stamp(*made) or "")[:16] if trained else ""


def _rest(chain: Chain, leftovers: bool) -> Iterator[Found]:
    for path, ended in left.temporaries(chain.results):
        if ended:
            yield chain.short(path), [path], "temporary, left by a process that has ended"
    for path in left.leftovers(chain.places):
        if leftovers:
            yield chain.short(path), [path], "of an earlier config; made again only with that"
