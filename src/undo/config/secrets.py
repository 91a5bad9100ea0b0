"""Access tokens for the hub and for the tracker. They are read from here only, and never printed or stored."""

import os

from undo.config.checkout import TOKENS
from undo.config.mistakes import ConfigError
from undo.config.schema import StageConfig


def find_token(file: str, variable: str) -> str | None:
    path = TOKENS / file
    return os.environ.get(variable, "").strip() or (path.read_text().strip() if path.exists() else "") or None


def token(file: str, variable: str) -> str:
    """The token. Raises ConfigError that names both places to put it, and the content of neither."""
    value = find_token(file, variable)
    if value is None:
        raise ConfigError(f"no token: put it into tokens/{file}, or set {variable}")
    return value


def check_token(config: StageConfig) -> None:
    """Before anything is started."""
    if config.execution.tracking == "online":
        token("wandb_token.txt", "WANDB_API_KEY")
