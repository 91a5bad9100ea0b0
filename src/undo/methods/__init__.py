"""Unlearning methods: one file each, and its name in the union below. There is no other place to register one."""

from typing import Annotated

from pydantic import Field

from undo.methods.graddiff import GradDiff
from undo.methods.maxent import MaxEnt
from undo.methods.rmu import RMU

UnlearningMethod = Annotated[GradDiff | MaxEnt | RMU, Field(discriminator="name")]
