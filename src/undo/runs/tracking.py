"""Weights & Biases beside metrics.jsonl: off by default, offline or online by `execution.tracking`.

The records on disk are the truth. The tracker gets a copy, and it is off unless a config asks for it. Tokens come
from tokens/wandb_token.txt or WANDB_API_KEY, and go to the tracker's own login only.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from undo.config.schema import StageConfig, as_raw
from undo.config.secrets import token

if TYPE_CHECKING:
    from undo.runs.directory import RunDirectory


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """One W&B run for each of ours, with the same name and grouped by stage. A resumed run continues in it."""

    def __init__(self, run: "RunDirectory", config: StageConfig) -> None:
        import wandb

        online = config.execution.tracking == "online"
        if online:
            wandb.login(key=token("wandb_token.txt", "WANDB_API_KEY"), relogin=False)
        raw = as_raw(config)
        self._run = wandb.init(
            project=f"undo-{run.setting}",
            name=run.name,
            group=run.name.split("/")[0],
            id=run.name.replace("/", "-"),
            resume="allow",
            mode="online" if online else "offline",
            dir=run.folder,
            config=raw,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


def open_tracker(run: "RunDirectory", config: StageConfig) -> Tracker:
    return NoTracker() if config.execution.tracking == "off" else WandbTracker(run, config)
