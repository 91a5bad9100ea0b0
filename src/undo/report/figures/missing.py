"""What a figure lacks."""

from typing import NamedTuple


class Missing(NamedTuple):
    """Why a figure cannot be drawn."""

    what: str  # is not there
    runs: str  # a glob of the names of runs that would make it drawable
