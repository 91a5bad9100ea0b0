"""From YAML files to planned runs: which files an experiment has, and which runs they ask for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from undo.config.checkout import CONFIGS
from undo.config.mistakes import ConfigError
from undo.config.schema import Raw, StageConfig, validate
from undo.config.sweep import expand, read_yaml, variant_of
from undo.experiments.points import with_points
from undo.runs.directory import RunDirectory
from undo.train.stage import Stage

SUFFIXES: Final = (".yaml", ".yml")


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
    if path.suffix in SUFFIXES:
        return [path]
    folders = [path] if path.is_dir() else [folder / argument for folder in CONFIGS]
    for folder in folders:
        if found := sources(folder, stage):
            return found
    settings = sorted({p.name for folder in CONFIGS for p in folder.glob("*") if sources(p, stage)})
    raise ConfigError(
        f"there is no {folders[0] / f'{stage}.yaml'}; give the path of a .yaml file, or a setting\n"
        f"settings with the stage {stage}: {', '.join(settings) or 'none'}"
    )


def sources(folder: Path, stage: str) -> list[Path]:
    """A stage's YAML files in a setting's folder, the main one first."""
    return [*folder.glob(f"{stage}.yaml"), *sorted(folder.glob(f"{stage}_*.yaml"))]


def beside_the_main(found: Iterable[Path]) -> list[str]:
    """The names of <stage>_<name>.yaml, in order."""
    return sorted({path.stem.partition("_")[2] for path in found} - {""})


def plan(
    stage: Stage, sources: Sequence[Path], overrides: Mapping[str, Any], runs: Path, stand_ins: bool = False
) -> list[PlannedRun]:
    """All runs of a stage's experiments. Their setting is the name of the folder that the YAML files lie in.

    The user's own variant (`variant=...`) replaces those of the first file and keeps its other values.
    With `stand_ins`, points that are still to be searched are stand-ins, so that all else can be validated.
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
    """Overrides without `points`, and without those for a variant that only another YAML of the stage defines."""
    changes = {key: value for key, value in overrides.items() if key != "points"}
    if any(key.startswith("variants.") for key in changes):
        others = [read_yaml(path) for path in sources(source.parent, stage) if path.name != source.name]
        theirs = [name for other in others for name in other.get("variants") or ()]
        ours = content.get("variants") or ()
        changes = {key: v for key, v in changes.items() if variant_of(key, ours) or not variant_of(key, theirs)}
    return changes
