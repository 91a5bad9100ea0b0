"""Unlearning methods, one file each: those of plain.py, and these, which add a step or terms of their own.

The union is all there is to register: figures ask a method for its title, mark and colours.
"""

from typing import Annotated

from pydantic import Field

from undo.unlearn.graddiff import GradDiff
from undo.unlearn.maxent import MaxEnt
from undo.unlearn.npo import NPO, SimNPO
from undo.unlearn.plain import PlainMethod
from undo.unlearn.repnoise import RepNoise
from undo.unlearn.rmu import RMU
from undo.unlearn.sam import SAM, Smoothing
from undo.unlearn.uam import UAM
from undo.unlearn.undial import UNDIAL

UnlearningMethod = Annotated[PlainMethod | SAM | Smoothing | RepNoise | UAM, Field(discriminator="name")]

__all__ = [
    "NPO",
    "RMU",
    "SAM",
    "UAM",
    "UNDIAL",
    "GradDiff",
    "MaxEnt",
    "RepNoise",
    "SimNPO",
    "Smoothing",
    "UnlearningMethod",
]
