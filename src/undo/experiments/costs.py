"""What planned runs cost, from their configs alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from undo.config.mistakes import ConfigError
from undo.config.schema import Raw, StageConfig, validate
from undo.experiments.plan import PlannedRun
from undo.experiments.remedy import written
from undo.lm.shape import Shape
from undo.runs.directory import RunDirectory
from undo.train.stage import Stage, TrainingStage

T = TypeVar("T")


class Cost(NamedTuple):
    """The cost of training for all steps. Evaluation is not included."""

    tokens: int
    flops: float

    @property
    def h200_hours(self) -> float:
        """Modelled, at a quarter of an H200's 989 TFLOP/s (dense bf16)."""
        return self.flops / (0.25 * 989e12) / 3600


class Costs:
    """What planned runs cost, from their configs alone. A run's model is found by following its parents."""

    def __init__(
        self,
        planned: Sequence[PlannedRun],
        setting_folder: Path,
        stages: Mapping[str, Stage],
        base: str | None = None,
    ) -> None:
        """`stages`: all stages by name, since parents that are not planned may belong to any of them.

        `base`: the model of a base run that is neither planned nor done; None takes the one in the setting's YAML.
        """
        self._planned = {p.name: p.config for p in planned}
        self._folder, self._stages, self._base = setting_folder, stages, base
        self._directories = planned[0].directory
        self._configs: dict[str, StageConfig | None] = {}  # of runs that are not planned
        self._shapes: dict[str, Shape | None] = {}
        self._lengths: dict[str, int | None] = {}
        self._vocabularies: dict[str, int | None] = {}

    @cached_property
    def _written(self) -> dict[str, Raw]:
        return written(self._folder)

    def _config(self, name: str) -> StageConfig | None:
        if name in self._planned:
            return self._planned[name]
        if name not in self._configs:
            directory, stage = self._directories.sibling(name), self._stages.get(name.partition("/")[0])
            made = (directory.folder / "config.yaml").exists()
            raw = directory.config if made else self._written.get(name)
            if raw is not None and name.startswith("base/") and self._base is not None and not directory.done:
                raw = {**raw, "model": self._base}
            try:
                self._configs[name] = None if raw is None or stage is None else validate(stage.schema, raw, name)
            except ConfigError:  # written by another version of this code
                self._configs[name] = None
        return self._configs[name]

    def _nearest(self, name: str, found: dict[str, T | None], find: Callable[[str, StageConfig], T | None]) -> T | None:
        """What `find` returns for the run, or else for its nearest ancestor that has it. Cached in `found`."""
        if name not in found:
            config = self._config(name)
            value = None if config is None else find(name, config)
            if value is None and config is not None:
                values = (self._nearest(parent, found, find) for parent in config.parents())
                value = next((v for v in values if v is not None), None)
            found[name] = value
        return found[name]

    def shape(self, name: str) -> Shape | None:
        """The shape of the model that a run trains or passes on."""
        return self._nearest(
            name, self._shapes, lambda n, config: self._stages[n.partition("/")[0]].shape(config, self._at(n))
        )

    def length(self, name: str) -> int | None:
        """Tokens per row of the data that a run reads or makes."""
        return self._nearest(
            name, self._lengths, lambda n, config: self._stages[n.partition("/")[0]].row_tokens(config)
        )

    def vocabulary(self, name: str) -> int | None:
        """The size of the vocabulary of a prepare run's data."""
        return self._nearest(
            name,
            self._vocabularies,
            lambda n, config: self._stages[n.partition("/")[0]].vocabulary(config, self._at(n)),
        )

    def _at(self, name: str) -> RunDirectory:
        return self._directories.sibling(name)

    def of(self, run: PlannedRun) -> Cost | None:
        """The cost of a run. None if it trains nothing, or if the size of its model or data is not known yet."""
        if not isinstance(run.config, TrainingStage):
            return None
        shape, length = self.shape(run.name), self.length(run.name)
        if shape is None or length is None:
            return None
        tokens = run.config.tokens(length)
        return Cost(tokens, run.config.flops_per_token(shape, length) * tokens)
