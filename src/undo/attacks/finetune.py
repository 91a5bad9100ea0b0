"""Full finetuning: every weight is trained on the attacker's text. Section 2, Table 4."""

from typing import ClassVar, Literal

from undo.attacks.attack import FINETUNING, Attack


class Finetune(Attack):
    """The paper's attack. The text is the stage's `mixture`, the rate and the steps are those of `training`."""

    finetunes: ClassVar[bool] = True
    starts_unchanged: ClassVar[bool] = True

    name: Literal["finetune"] = "finetune"

    @property
    def title(self) -> str:
        return FINETUNING
