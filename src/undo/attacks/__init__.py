"""Attacks, one file each. Those that change weights can come before those that finetune.

The unions are all there is to register: tables and figures ask an attack for its title.
"""

from typing import Annotated

from pydantic import Field

from undo.attacks.ablate import Ablate
from undo.attacks.finetune import Finetune
from undo.attacks.lora import LoRA
from undo.attacks.merge import Merge
from undo.attacks.perturb import Perturb
from undo.attacks.prune import Prune, SetDifference
from undo.attacks.quantise import Quantise

Change = Annotated[Quantise | Prune | SetDifference | Merge | Perturb, Field(discriminator="name")]  # of weights
AnyAttack = Annotated[
    Finetune | LoRA | Quantise | Prune | SetDifference | Merge | Perturb | Ablate, Field(discriminator="name")
]

__all__ = [
    "Ablate",
    "AnyAttack",
    "Change",
    "Finetune",
    "LoRA",
    "Merge",
    "Perturb",
    "Prune",
    "Quantise",
    "SetDifference",
]
