"""Multiple choice as EleutherAI's lm-evaluation-harness measures it (D.2.1: MMLU 5-shot, WMDP zero-shot).

The harness renders the prompts, draws the shots, tokenises, decides what is right and aggregates; only the forward
passes are ours (`harness.py`). The config, and all that can be wrong with a file of questions, are read here, without
importing torch or the harness.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from undo.config.mistakes import ConfigError
from undo.config.schema import Count
from undo.evaluate.evaluator import SHARE, EvaluationConfig, Evaluator, Measured, Outcomes
from undo.evaluate.questions import LETTERS, Questions
from undo.runs.directory import RunDirectory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Z95: Final = 1.959963984540054  # of the standard normal


class MultipleChoice(EvaluationConfig):
    """Accuracy on questions that the model should still answer, and on those that it should not answer.

    Beside each accuracy: `chance` (the mean of 1 / choices), `low` and `high` (95 %, Wilson), `questions` (their
    number), and `says_A`, `says_B`, ...: the share answered so. A model that always says A looks unlearned.
    """

    name: Literal["multiple_choice"] = "multiple_choice"
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "accuracy"

    retain: Questions
    forget: Questions
    rows: Count = 16  # questions in one forward pass

    def check(self) -> None:
        for role, questions in self._roles():
            try:
                questions.check()
            except ConfigError as error:
                raise ConfigError(f"{role}: {error}") from None

    def load(self, data: RunDirectory, device: "torch.device") -> Evaluator:
        self.check()
        from undo.evaluate.harness import benchmark

        parts = {}  # role -> its questions, the subset's indices, those of the rest
        for role, questions in self._roles():
            # a frozen block has a hash, which only pydantic knows
            asked = benchmark(questions, data.folder, self.rows)  # pyright: ignore[reportArgumentType]
            parts[role] = asked, *self.split(len(asked))
        whole = sum(len(asked) for asked, _, _ in parts.values())

        def measure(model: "PreTrainedModel", full: bool) -> Measured:
            values, outcomes = dict[str, float](), dict[str, Outcomes]()
            tokens = seen = 0
            for asked, _, _ in parts.values():
                asked.fits(model)  # before any of them costs time
            for role, (asked, subset, rest) in parts.items():
                answered = asked.ask(model, sorted([*subset, *rest]) if full else list(subset))
                values[role] = answered.accuracy
                values |= {
                    f"{role}/{name}": value
                    for name, value in describe(answered.chosen, answered.choices, round(sum(answered.hits))).items()
                }
                outcomes[role] = Outcomes(answered.hits, [1.0] * len(answered.hits))
                tokens, seen = tokens + answered.tokens, seen + len(answered.chosen)
            if seen < whole:
                values[SHARE] = seen / whole
            return Measured(values, tokens, outcomes)

        return measure

    def _roles(self) -> tuple[tuple[str, Questions], ...]:
        return ("retain", self.retain), ("forget", self.forget)


def describe(chosen: Sequence[int], choices: Sequence[int], right: int) -> dict[str, float]:
    """The values beside an accuracy, from the chosen index and the number of choices of each question.

    The interval is Wilson's (1927): it stays within [0, 1], and holds for few questions too.
    """
    size = len(chosen)
    share, spread = right / size, Z95**2 / size
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / size + spread / (4 * size)) / (1 + spread)
    said = Counter(chosen)
    return {
        "chance": sum(1 / number for number in choices) / size,
        "low": max(0.0, centre - half),
        "high": min(1.0, centre + half),
        "questions": size,
        **{f"says_{LETTERS[i]}": said[i] / size for i in range(min(max(choices), len(LETTERS)))},
    }
