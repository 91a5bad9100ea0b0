"""An arithmetic problem: what is asked, what is right, and which role it belongs to."""

from dataclasses import dataclass
from typing import Final, Literal

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
