"""An arithmetic problem: what is asked, what is right, and which role it belongs to."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from undo.config.files import write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import Role

Operation = Literal["addition", "subtraction", "multiplication", "division"]
Form = Literal["equation", "word_problem"]
OPERATIONS: Final[dict[Role, tuple[Operation, Operation]]] = {
    "retain": ("addition", "subtraction"),
    "forget": ("multiplication", "division"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """The text is `prompt` + `answer`. The answer starts with the space that separates it from the prompt."""

    operation: Operation
    form: Form
    prompt: str
    answer: str
    seen: bool = True  # False: the operand pair never occurs in training

    @property
    def text(self) -> str:
        return self.prompt + self.answer

    @property
    def role(self) -> Role:
        return "retain" if self.operation in OPERATIONS["retain"] else "forget"


def write_problems(file: Path, problems: Iterable[Problem]) -> None:
    write_atomically(file, "".join(json.dumps(asdict(problem)) + "\n" for problem in problems))


def read_problems(file: Path, count: int) -> list[Problem]:
    """Raises ConfigError that names the file if it does not hold `count` problems."""
    again = "make the data again: the command of the stage prepare with --force"
    try:
        found = [Problem(**json.loads(line)) for line in file.read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})\n{again}") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{file}: is damaged\n{again}") from None
    if len(found) != count:
        raise ConfigError(f"{file}: holds {len(found):,} problems, not {count:,}\n{again}")
    return found
