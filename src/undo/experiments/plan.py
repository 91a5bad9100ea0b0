"""From configs to jobs: which runs an experiment has, whether their parents exist, what they cost, their processes."""

import fnmatch
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, Self, TypeVar

from undo.config import ConfigError, Raw, StageConfig, expand, read_yaml, validate, variant_of
from undo.launch import DeviceShare, Job, check_devices
from undo.prepare_models import ReducedGemma2
from undo.pretrained import known_shape
from undo.run import RunDirectory
from undo.selection import chosen_points
from undo.shape import Shape
from undo.stage import Stage, TrainingStage
from undo.tracking import check_token

CONFIGS: Final = (Path("configs"), Path(__file__).parents[2] / "configs")  # here, or in the checkout
STAGES: Final = ("prepare", "base", "pretrain", "unlearn", "distill", "undo", "relearn")  # in the order of the pipeline

T = TypeVar("T")


@dataclass(frozen=True)
class PlannedRun:
    """A run that a config asks for."""

    stage: Stage
    config: StageConfig
    directory: RunDirectory

    @property
    def name(self) -> str:
        return self.directory.name


def find_configs(argument: str, stage: str) -> list[Path]:
    """The YAML files of a stage: `demo` -> configs/demo/<stage>.yaml, here or in the checkout, then <stage>_*.yaml
    beside it. A path to a YAML file stays as it is."""
    path = Path(argument)
    if path.suffix in (".yaml", ".yml"):
        return [path]
    folders = [path] if path.is_dir() else [folder / argument for folder in CONFIGS]
    for folder in folders:
        if (folder / f"{stage}.yaml").exists():
            return sources(folder, stage)
    settings = sorted({p.name for folder in CONFIGS for p in folder.glob("*") if (p / f"{stage}.yaml").exists()})
    raise ConfigError(
        f"there is no {folders[0] / f'{stage}.yaml'}; settings with a {stage} stage: {', '.join(settings) or 'none'}\n"
        f"or give the path of a .yaml file"
    )


def sources(folder: Path, stage: str) -> list[Path]:
    """A stage's YAML files in a setting's folder, the main one first."""
    return [*folder.glob(f"{stage}.yaml"), *sorted(folder.glob(f"{stage}_*.yaml"))]


def beside_the_main(found: Iterable[Path]) -> list[str]:
    """The names of <stage>_<name>.yaml, in order."""
    return sorted({path.stem.partition("_")[2] for path in found} - {""})


def wanted(found: Sequence[Path], stage: str, extra: Sequence[str]) -> list[Path]:
    """The main YAML of a stage, and <stage>_<name>.yaml for each name in `extra`."""
    names = {*(path.stem for path in found[:1]), *(f"{stage}_{name}" for name in extra)}
    return [path for path in found if path.stem in names]


def plan(
    stage: Stage, sources: Sequence[Path], overrides: Mapping[str, Any], runs: Path, stand_ins: bool = False
) -> list[PlannedRun]:
    """All runs of a stage's experiments. Their setting is the name of the folder that the YAML files lie in.

    A variant of the user's own takes the place of all there are, so it has the first file's other values.
    `stand_ins`: points that are still to be searched are stand-ins, so that all else can be validated.
    """
    planned: dict[str, PlannedRun] = {}
    for source in sources[:1] if "variant" in overrides else sources:
        setting = source.resolve().parent.name
        content = with_points(read_yaml(source), overrides, None if stand_ins else runs / setting)
        for raw in expand(content, of_file(source, content, stage.name, overrides), str(source)):
            config = validate(stage.schema, raw, str(source))
            run = PlannedRun(stage, config, RunDirectory(runs, setting, f"{stage.name}/{config.name}"))
            if run.name in planned:
                raise ConfigError(f"{source}: {run.name} is a run of {sources[0]} already; give one another name")
            planned[run.name] = run
    return list(planned.values())


def of_file(source: Path, content: Raw, stage: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides without `points`, and without those for a variant that only another YAML of the stage has."""
    changes = {key: value for key, value in overrides.items() if key != "points"}
    if any(key.startswith("variants.") for key in changes):
        others = [read_yaml(path) for path in sources(source.parent, stage) if path.name != source.name]
        theirs = [name for other in others for name in other.get("variants") or ()]
        ours = content.get("variants") or ()
        changes = {key: v for key, v in changes.items() if variant_of(key, ours) or not variant_of(key, theirs)}
    return changes


def searches(raw: Raw, overrides: Mapping[str, Any]) -> bool:
    """Whether the points of a YAML are those of a search. Raises ConfigError for another override of them."""
    for key, value in overrides.items():
        if key.partition(".")[0] == "points" and (key, value) != ("points", "search"):
            raise ConfigError(
                f"{key}={value} cannot be set; `points` can be set to search only\n"
                f"give a run other values with variants.<name>.method.alpha=... and the like"
            )
    return overrides.get("points", raw.get("points")) == "search"


def with_points(raw: Raw, overrides: Mapping[str, Any], folder: Path | None) -> Raw:
    """The YAML with `points: search` replaced by what was chosen from the search's results, in the setting's runs.

    Without a folder, for a look at runs that nobody starts, every point is a stand-in.
    """
    if not searches(raw, overrides):
        return raw
    if folder is None:
        return {**raw, "points": AnyPoint(alpha=0.5, learning_rate=1.0)}  # no valid config has another rate above it
    return {**raw, "points": chosen_points(folder)}


class AnyPoint(SimpleNamespace):
    """Has every attribute; those that it was not given are itself."""

    def __getattr__(self, name: str) -> Self:
        return self


def setting_folder(setting: str) -> Path | None:
    """Where the setting's YAML files are, if they are in configs/."""
    return next((folder / setting for folder in CONFIGS if (folder / setting).is_dir()), None)


def script_of(setting: str) -> str:
    """The script that makes a whole setting: run_wmdp.py where a model is fetched or points are searched."""
    folder = setting_folder(setting)
    if folder is None:
        return "run_all.py"
    searched = (folder / "unlearn.yaml").exists() and searches(read_yaml(folder / "unlearn.yaml"), {})
    return "run_wmdp.py" if searched or sources(folder, "base") else "run_all.py"


def written(folder: Path) -> dict[str, Raw]:
    """All runs of a setting's own YAML files by name, unvalidated."""
    found: dict[str, Raw] = {}
    for stage in STAGES:
        for path in sources(folder, stage):
            runs = expand(with_points(read_yaml(path), {}, None), {}, str(path))
            found |= {f"{stage}/{raw['name']}": raw for raw in runs}
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a run's name, with or without its stage, matches the glob."""
    return any(fnmatch.fnmatch(n, pattern) for n in (name, name.partition("/")[2]))


def select(planned: Sequence[PlannedRun], pattern: str | None, with_parents: bool = False) -> list[PlannedRun]:
    """The runs whose name (with or without the stage) matches the glob; `with_parents`: and all they stand on."""
    if pattern is None:
        return list(planned)
    chosen = {p.name for p in planned if matches(p.name, pattern)}
    if not chosen:
        some = ", ".join(p.config.name for p in planned[:12]) + ", ..." * (len(planned) > 12)
        raise ConfigError(f"--only {pattern!r} matches none of: {some}")
    if with_parents:
        for run in reversed(planned):  # stages come in order, so parents come later here
            if run.name in chosen:
                chosen.update(run.config.parents())
    return [p for p in planned if p.name in chosen]


def pick(
    plans: Callable[[Sequence[str]], Sequence[PlannedRun]],
    asked: Sequence[str],
    beside: Sequence[str],
    only: str | None,
    with_parents: bool = False,
) -> list[PlannedRun]:
    """`select` from the main experiments and those `asked` for, whose names `plans` takes.

    Where `only` matches none of them, from the first of those `beside` the main ones that it matches.
    """
    for names in (asked, *([*asked, name] for name in beside)):
        planned = plans(names)
        if only is None or any(matches(run.name, only) for run in planned):
            return select(planned, only, with_parents)
    return select(plans([*asked, *beside]), only, with_parents)


def check(planned: Sequence[PlannedRun], force: bool, kept: Collection[str] = ()) -> None:
    """Everything that can be known to be wrong before a process is started. Raises ConfigError.

    `force` removes the runs, but for those whose names are in `kept`.
    """
    names = {p.name for p in planned}
    for run in planned:
        execution = run.config.execution
        check_devices(share(run.config))
        if execution.devices > 1 and not isinstance(run.config, TrainingStage):
            raise ConfigError(f"execution.devices={execution.devices}: {run.name} trains nothing; leave the key out")
        check_token(run.config)
        if not run.directory.done:
            run.config.check()
        for parent in run.config.parents():
            if parent not in names and not run.directory.sibling(parent).done:
                raise ConfigError(
                    f"{run.name} needs {parent}, which is not done in {run.directory.runs / run.directory.setting}\n"
                    f"make it with: {command_for(parent, run.directory.setting)}"
                )
    for run in planned:
        if force and run.name not in kept:
            if run.directory.is_held():
                raise ConfigError(f"{run.name} is being run by another launcher; --force would destroy its work")
            run.directory.remove()
        run.directory.claim(run.config)
        if run.directory.done and (parent := run.directory.is_stale(run.config)):
            raise ConfigError(
                f"{run.name} was made from a {parent} that has since been made anew with other settings\n"
                f"make it again with: {command_for(run.name, run.directory.setting)} --force"
            )


def command_for(name: str, setting: str) -> str:
    """The command line that makes a run."""
    stage, _, run = name.partition("/")
    if stage == "base":  # has no script of its own
        return f"uv run run_wmdp.py {setting} --stage prepare --only {name}"
    script = "python -m undo.prepare_data" if stage == "prepare" else f"run_{stage}.py"
    return f"uv run {script} {setting} --only {run}"


def jobs(planned: Iterable[PlannedRun]) -> list[Job]:
    """Runs that are not done, grouped: those of a stage that start from the same models share a process.

    A run on several devices shares none: an error of one rank leaves the others in the middle of a step.
    """
    todo = [p for p in planned if not p.directory.done]
    result = []
    for _, group in groupby(todo, key=lambda p: (p.stage.name, models(p), p.config.execution)):
        members = list(group)
        execution = members[0].config.execution
        together = execution.runs_per_process if execution.devices == 1 else 1
        for start in range(0, len(members), together):
            part = members[start : start + together]
            result.append(
                Job(
                    argv=(sys.executable, *starter(execution.devices), *part[0].stage.command, "--work"),
                    runs=tuple(p.directory for p in part),
                    waits_for=frozenset(parent for p in part for parent in p.config.parents()),
                    share=share(part[0].config),
                )
            )
    return result


def starter(devices: int) -> tuple[str, ...]:
    """What stands before a stage's command where it is started once for each device.

    torchrun itself, on a free port. Accelerate's launcher ends in the same code, but reads the user's own defaults
    (mixed precision, for one) from a file in his home.
    """
    if devices == 1:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices))


def share(config: StageConfig) -> DeviceShare:
    execution = config.execution
    return DeviceShare(execution.runs_per_gpu, execution.threads, execution.devices)


def models(run: PlannedRun) -> tuple[str, ...]:
    """The parents of a run that are no data."""
    return tuple(parent for parent in run.config.parents() if not parent.startswith("prepare/"))


# --- what it will cost ---------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of training, all steps of it; evaluation comes on top."""

    tokens: int
    flops: float

    @property
    def h200_hours(self) -> float:
        """Modelled, at a quarter of an H200's 989 TFLOP/s (dense bf16)."""
        return self.flops / (0.25 * 989e12) / 3600


class Costs:
    """What planned runs cost, from the configs alone: a run's model is found by following its parents."""

    def __init__(self, planned: Sequence[PlannedRun], setting_folder: Path, base: str | None = None) -> None:
        """`base`: the model of a base run that is neither planned nor there; None: that of the setting's own YAML."""
        self._planned = {p.name: p.config.model_dump() for p in planned}
        self._folder, self._base = setting_folder, base
        self._directories = planned[0].directory
        self._shapes: dict[str, Shape | None] = {}  # of base runs

    @cached_property
    def _written(self) -> dict[str, Raw]:
        return written(self._folder)

    def _raw(self, name: str) -> Raw | None:
        if name in self._planned:
            return self._planned[name]
        directory = self._directories.sibling(name)
        return directory.config if (directory.folder / "config.yaml").exists() else self._written.get(name)

    def _nearest(self, name: str, find: Callable[[str, Raw], T | None]) -> T | None:
        """What `find` finds, of the run or else of its nearest ancestor where it finds something."""
        raw = self._raw(name)
        if raw is None:
            return None
        if (found := find(name, raw)) is not None:
            return found
        stages = tuple(f"{stage}/" for stage in STAGES)
        parents = [value for value in raw.values() if isinstance(value, str) and value.startswith(stages)]
        return next((found for p in parents if (found := self._nearest(p, find)) is not None), None)

    def _shape(self, name: str, raw: Raw) -> Shape | None:
        model = raw.get("model")
        if not name.startswith("base/"):
            return ReducedGemma2(**model) if isinstance(model, dict) else None
        if name not in self._shapes:
            directory, model = self._directories.sibling(name), str(model)
            if name not in self._planned and not directory.done:
                model = self._base or model
            same = directory.done and directory.config["model"] == model
            self._shapes[name] = known_shape(str(directory.model) if same else model)
        return self._shapes[name]

    def of(self, run: PlannedRun) -> Cost | None:
        """None for a stage that trains nothing, or where nobody can say yet how large the model or its data are."""
        if not isinstance(run.config, TrainingStage):
            return None
        shape = self._nearest(run.name, self._shape)
        length = self._nearest(run.name, lambda _, raw: raw.get("length"))
        if shape is None or length is None:
            return None
        tokens = run.config.tokens(length)
        return Cost(tokens, run.config.flops_per_token(shape, length) * tokens)
