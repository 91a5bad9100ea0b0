"""Unlearning methods whose step is the gradient of their loss: each can stand alone, or carry SAM and the like.

A method of your own: one file in this folder, and its name in this union.
"""

from undo.unlearn.graddiff import GradDiff
from undo.unlearn.maxent import MaxEnt
from undo.unlearn.npo import NPO, SimNPO
from undo.unlearn.rmu import RMU
from undo.unlearn.undial import UNDIAL

PlainMethod = GradDiff | MaxEnt | RMU | UNDIAL | NPO | SimNPO
