"""What a figure lacks."""

from collections.abc import Callable
from typing import NamedTuple

from undo.results.arms import Arm


class Missing(NamedTuple):
    """Why a figure cannot be drawn, and which runs would make it drawable."""

    what: str  # is not there
    stage: str
    wanted: Callable[[Arm | None], bool]  # of the model that such a run makes or, in an attack, starts from
    like: str  # what such runs are called in our settings
