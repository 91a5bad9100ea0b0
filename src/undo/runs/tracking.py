"""Weights & Biases beside metrics.jsonl: off by default, offline or online by `execution.tracking`.

The records on disk are the truth. The tracker gets a copy, in a thread of its own, and training never waits for it.
Tokens come from tokens/wandb_token.txt or WANDB_API_KEY, and go to the tracker's own login only.
"""

import json
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Protocol

from undo.config.schema import StageConfig, as_raw
from undo.config.secrets import token

if TYPE_CHECKING:
    from undo.runs.directory import RunDirectory

PATIENCE: Final = 30.0  # seconds that a run that is done waits for its last lines to be taken


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """One W&B run for each of ours, with the same name and grouped by stage. A resumed run continues in it.

    W&B takes the values of a step when the next step begins. What an earlier attempt recorded is therefore sent again
    for its last step only, and each step is there once.
    """

    def __init__(self, run: "RunDirectory", config: StageConfig) -> None:
        self._run, self._config = run, config
        self._sent = _last_step(run.folder / "metrics.jsonl")
        self._queue = SimpleQueue[tuple[int, dict[str, Any]] | None]()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._sent:
            self._queue.put((step, dict(values)))

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            print(f"W&B has not taken everything in {PATIENCE:g} s; metrics.jsonl has it", flush=True)

    def _work(self) -> None:
        try:
            run = self._start()
            while (item := self._queue.get()) is not None:
                step, values = item
                run.log(values, step=step)
            run.finish()
        except Exception as error:  # whatever it is, it must not end the training
            reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
            print(f"W&B is not used: {reason}; metrics.jsonl has everything", flush=True)

    def _start(self) -> Any:
        import wandb

        online = self._config.execution.tracking == "online"
        if online:
            wandb.login(key=token("wandb_token.txt", "WANDB_API_KEY"), relogin=False)
        return wandb.init(
            project=f"undo-{self._run.setting}",
            name=self._run.name,
            group=self._run.name.split("/")[0],
            id=_id(self._run.folder / "wandb"),
            resume="allow",
            reinit="create_new",  # beside those of other runs of the process
            mode="online" if online else "offline",
            dir=self._run.folder,
            config=as_raw(self._config),
        )


def _last_step(metrics: Path) -> int:
    """The last step that an earlier attempt recorded whole; 0 if there was none."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except (ValueError, TypeError, KeyError):  # the run itself will say that it is damaged
        return 0


def _id(folder: Path) -> str:
    """That of the W&B run: the same for all attempts, another one after --force."""
    file = folder / "id.txt"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex[:16])
    return file.read_text()


def open_tracker(run: "RunDirectory", config: StageConfig) -> Tracker:
    return NoTracker() if config.execution.tracking == "off" else WandbTracker(run, config)
