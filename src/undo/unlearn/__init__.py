"""Unlearning methods: one file each, and its name in the union below. There is no other place to register one."""

from typing import Annotated

from pydantic import Field

from undo.unlearn.graddiff import GradDiff
from undo.unlearn.maxent import MaxEnt
from undo.unlearn.npo import NPO, SimNPO
from undo.unlearn.repnoise import RepNoise
from undo.unlearn.rmu import RMU
from undo.unlearn.sam import SAM, Smoothing
from undo.unlearn.uam import UAM
from undo.unlearn.undial import UNDIAL

UnlearningMethod = Annotated[
    GradDiff | MaxEnt | RMU | UNDIAL | NPO | SimNPO | SAM | Smoothing | RepNoise | UAM, Field(discriminator="name")
]
