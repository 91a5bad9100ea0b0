"""What every attack has: its values, and what it does to a model before the first step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

from undo.config.schema import Frozen, Role, RunName

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from undo.lm.tokens import Tokens

FINETUNING: Final = "finetuning"  # the title of the attack that the paper makes


@dataclass
class Means:
    """What an attacker has beside the model: randomness, text of each role, and other models."""

    rng: "torch.Generator"
    text: "Callable[[Role], Iterator[Tokens]]"  # endless batches of training text, in an order of the attack's own
    model: "Callable[[RunName], PreTrainedModel]"  # another run's model
    fresh: "Callable[[], PreTrainedModel]"  # a random initialisation of the attacked model's architecture
    read: int = field(default=0)  # tokens of `text` that were used

    def batches(self, role: Role, tokens: int) -> "Iterator[Tokens]":
        """Batches of a role's text with so many tokens in all, or a few more."""
        for batch in self.text(role):
            yield batch
            self.read += batch.input_ids.numel()
            tokens -= batch.input_ids.numel()
            if tokens <= 0:
                return


class Attack(Frozen):
    """An attack is its values and what `apply` does. One that `finetunes` then goes through the one training loop.

    Configs are read without torch, so an attack imports it inside `apply`.
    """

    finetunes: ClassVar[bool] = False  # whether training follows; without it the changed model is what is measured
    starts_unchanged: ClassVar[bool] = False  # whether the model computes what it did, after `apply`

    @property
    def title(self) -> str:
        """The column of the matrix that it belongs to: its values but those that an attacker searches."""
        raise TypeError(f"{type(self).__name__} has no title")

    def parents(self) -> tuple[RunName, ...]:
        """Runs whose models it needs beside the one under attack."""
        return ()

    def trains(self, parameter: str) -> bool:
        """Whether the attacked model's own weight of this name is trained."""
        return self.finetunes

    def apply(self, model: "PreTrainedModel", means: Means) -> None:
        """Change `model` in place. Raises ConfigError where it is not made for such a model."""
