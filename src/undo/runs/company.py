"""Runs that go side by side in one process: whose turn it is, and what they have in common."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Turns = Iterator[int | None]  # a run at work: at each stop the step that it stands before, None while it waits for room


@dataclass(eq=False)
class Company:
    """What a run knows of the others of its process. One that goes alone has an empty one.

    The run at the lowest step has its turn, so all that come to a step take it one after the other.
    """

    step: int = -1  # of the run whose turn it is; -1 before it has begun
    followers: int = 0  # runs that have not taken this step and will be next
    beside: int = 0  # other runs that have begun: each holds a model and the states of its optimiser
    in_hand: object = None  # the run that the process's output goes to
    _held: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes, made by the first run that asks for this key."""
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]
