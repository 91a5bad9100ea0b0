"""The teacher of students that train side by side: loaded once, and run once on each batch."""

from typing import TYPE_CHECKING

from torch import Tensor

from undo.lm import flops
from undo.lm.read import blocks, hidden_states
from undo.lm.tokens import Tokens
from undo.runs.company import Company

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Teacher:
    """A frozen model, and its hidden states of the step in hand while there are students that still come to it."""

    def __init__(self, model: "PreTrainedModel", company: Company) -> None:
        self.model = model
        self._company, self._step = company, -1
        self._states: dict[tuple[int, bytes], Tensor] = {}  # of each micro-batch of the step

    def hidden_states(self, model: "PreTrainedModel", tokens: Tokens) -> Tensor:
        """[rows, length, hidden], computed or remembered. Either way it counts as FLOPs of the run whose turn it is, so
        that they are those of a run of its own."""
        if self._step != self._company.step:
            self._states.clear()
            self._step = self._company.step
        key = tokens.content if self._states or self._company.followers else None
        found = None if key is None else self._states.pop(key, None)
        if found is None:
            found = hidden_states(model, tokens)
        else:
            flops.body_ran(model, blocks(model), tokens, found)
        if key is not None and self._company.followers:
            self._states[key] = found
        return found
