"""Where the loop leaves its records: a run's folder (runs/run.py), or a list in memory with a progress bar."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Recorder(Protocol):
    """Where the loop leaves its records and checkpoints. `Run` is one."""

    @property
    def stop_requested(self) -> bool: ...

    def record(self, step: int, values: Mapping[str, float]) -> None: ...

    def save_checkpoint(self, tensors: "Mapping[str, Tensor]", progress: Mapping[str, Any]) -> None: ...

    def load_checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, Any]] | None": ...

    def saves_before_it_stops(self) -> AbstractContextManager[None]: ...


class InMemory:
    """Keeps the records in a list and no checkpoint: in a notebook, an interrupted training starts again.

    With a `title`, a progress bar is shown on a terminal and in a notebook, and nowhere else.
    """

    def __init__(self, steps: int, title: str = "") -> None:
        self.records: list[dict[str, float]] = []
        self._steps, self._title = steps, title
        self._advance = lambda step: None

    @property
    def stop_requested(self) -> bool:
        return False

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self.records.append({"step": step, **values})
        self._advance(step)

    def save_checkpoint(self, tensors: "Mapping[str, Tensor]", progress: Mapping[str, Any]) -> None:
        pass

    def load_checkpoint(self) -> None:
        return None

    @contextmanager
    def saves_before_it_stops(self) -> Iterator[None]:
        """Shows the bar for as long as the loop runs."""
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        console = Console(stderr=True)
        if not self._title or not (console.is_terminal or console.is_jupyter):
            yield
            return
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(escape(self._title), total=self._steps)
            self._advance = lambda step: progress.update(task, completed=step)
            yield
