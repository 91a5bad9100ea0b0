"""Unlearning methods: one file each, and its name in the union below. There is no other place to register one."""

from typing import Annotated

from pydantic import Field

from undo.methods.graddiff import GradDiff
from undo.methods.maxent import MaxEnt
from undo.methods.npo import NPO, SimNPO
from undo.methods.repnoise import RepNoise
from undo.methods.rmu import RMU
from undo.methods.sam import SAM, Smoothing
from undo.methods.uam import UAM
from undo.methods.undial import UNDIAL

UnlearningMethod = Annotated[
    GradDiff | MaxEnt | RMU | UNDIAL | NPO | SimNPO | SAM | Smoothing | RepNoise | UAM, Field(discriminator="name")
]
