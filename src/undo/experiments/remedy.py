"""The command that makes what is missing."""

from pathlib import Path

from undo.config.checkout import CONFIGS, command
from undo.config.schema import Raw
from undo.config.sweep import expand, read_yaml
from undo.experiments.choose import matches
from undo.experiments.plan import sources
from undo.experiments.points import searches, with_points


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


def remedy(setting: str, runs: str) -> str:
    """How to make the runs whose names match the glob `runs`: a command, or where to see how others ask for them."""
    folder = setting_folder(setting)
    if folder is not None and any(matches(name, runs) for name in written(folder)):
        return f"make it with: {command_of(setting)} --only '{runs}'"
    return f"configs/{setting} has no {runs}; see configs/language for how to ask for it"
