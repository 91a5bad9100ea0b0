"""Where configs and tokens are: beside the code in a checkout, or in the working directory of an installed package."""

from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parents[1]
_ROOT: Final = _PACKAGE.parents[1]
CHECKOUT: Final = _ROOT if (_ROOT / "pyproject.toml").exists() else None  # None: installed from a wheel
CONFIGS: Final = (Path("configs"), (CHECKOUT or _PACKAGE) / "configs")  # the user's own, then ours
TOKENS: Final = (CHECKOUT or Path()) / "tokens"  # secrets; see tokens/README.md


def command(name: str) -> str:
    """The command line of a stage or a whole setting: a script in a checkout, else the installed command `undo`."""
    return f"undo {name}" if CHECKOUT is None else f"uv run run_{name}.py"
