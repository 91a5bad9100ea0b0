"""`points: search` in a YAML: values that were chosen from the results of an earlier search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from undo.config.checkout import command
from undo.config.mistakes import ConfigError
from undo.config.schema import Raw
from undo.config.sweep import read_yaml

FILE: Final = "points.yaml"  # in a setting's folder of runs


def chosen_points(folder: Path) -> dict[str, Any]:
    """What was chosen in a setting's folder of runs. Raises ConfigError before there is a choice."""
    if not (folder / FILE).exists():
        raise ConfigError(
            f"{folder / FILE} is not there: the points are chosen from the results of a search\n"
            f"make it with: {command('wmdp')} {folder.name} --stage search"
        )
    return read_yaml(folder / FILE)


def searches(raw: Raw, overrides: Mapping[str, Any]) -> bool:
    """Whether a YAML takes its points from a search. Raises ConfigError for any other override of them."""
    for key, value in overrides.items():
        if key.partition(".")[0] == "points" and (key, value) != ("points", "search"):
            raise ConfigError(
                f"{key}={value} cannot be set; the only value for `points` is search\n"
                f"give a run other values with variants.<name>.method.alpha=... and the like"
            )
    return overrides.get("points", raw.get("points")) == "search"


def with_points(raw: Raw, overrides: Mapping[str, Any], folder: Path | None) -> Raw:
    """The YAML with `points: search` replaced by what was chosen from the search's results, in the setting's runs.

    Without a folder every point is a stand-in: for runs that are only looked at.
    """
    if not searches(raw, overrides):
        return raw
    if folder is None:
        return {**raw, "points": AnyPoint(alpha=0.5, learning_rate=1.0)}  # no valid config has another rate above it
    return {**raw, "points": chosen_points(folder)}


class AnyPoint(dict[str, Any]):
    """Has every key: those it was given, and itself for all others."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Self:
        return self
