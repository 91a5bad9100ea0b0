"""The command that makes what is missing."""

from collections.abc import Callable
from pathlib import Path

from undo.config.checkout import CONFIGS, command
from undo.config.schema import Raw
from undo.config.sweep import expand, read_yaml
from undo.experiments.choose import matches
from undo.experiments.plan import sources
from undo.experiments.points import searches, with_points
from undo.results.arms import Arm, arm_of


def setting_folder(setting: str) -> Path | None:
    """Where the setting's YAML files are, if they are in configs/."""
    return next((folder / setting for folder in CONFIGS if (folder / setting).is_dir()), None)


def command_of(setting: str) -> str:
    """The command that makes a whole setting: run_wmdp.py where a model is fetched or points are searched."""
    folder = setting_folder(setting)
    main = folder / "unlearn.yaml" if folder is not None else Path()
    searched = main.is_file() and searches(read_yaml(main), {})
    fetched = folder is not None and bool(sources(folder, "base"))
    return f"{command('wmdp') if searched or fetched else command('all')} {setting}"


def written(folder: Path) -> dict[str, Raw]:
    """All runs of a setting's own YAML files by name, unvalidated."""
    found: dict[str, Raw] = {}
    for path in sorted(folder.glob("*.yaml")):
        content = read_yaml(path)
        if "name" in content:  # an experiment
            runs = expand(with_points(content, {}, None), {}, str(path))
            found |= {f"{path.stem.partition('_')[0]}/{raw['name']}": raw for raw in runs}
    return found


def command_for(name: str, setting: str) -> str:
    """The command line that makes a run. `name` is <stage>/<name>."""
    stage, _, run = name.partition("/")
    return f"{command(stage)} {setting} --only {run}"


def remedy(setting: str, stage: str, wanted: Callable[[Arm | None], bool], like: str) -> str:
    """How to make the runs of a stage whose models are `wanted`: a command, or a setting whose configs show how.

    For an attack, the attacked model counts. `like`: what such runs are called in our settings.
    """
    folder = setting_folder(setting)
    every = written(folder) if folder is not None else {}

    def arm(name: str) -> Arm | None:
        return arm_of(every[name].get("model", "") if name.startswith(("relearn/", "attack/")) else name, every.get)

    names = [name for name in every if name.startswith(f"{stage}/") and wanted(arm(name))]
    if not names:
        return f"configs/{setting} has no {like}; see configs/language for how to ask for it"
    first, last = min(names), max(names)  # what these two begin with all do
    pattern = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))] + "*"
    if any(matches(name, pattern) for name in every if name not in names):
        pattern = names[0]
    return f"make it with: {command_of(setting)} --only '{pattern}'"
