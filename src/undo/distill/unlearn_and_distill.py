"""The stage `distill`: teach a random student (Unlearn-and-Distill, Section 4, Table 6) or the reference model (oracle
matching, Section 3, Table 3)."""

from typing import Literal, Self

from pydantic import model_validator

from undo.config.schema import RunName
from undo.distill.distill import DistillingStage, distill
from undo.runs.company import Turns
from undo.runs.run import Run
from undo.train.parents import fresh_like, load_parent, wait_for_room
from undo.train.stage import Stage


class Distill(DistillingStage):
    """The student is a fresh model of the teacher's shape, or the reference model."""

    student: Literal["random", "reference"]
    reference: RunName | None = None  # the student, where it is the reference model

    @model_validator(mode="after")
    def _reference_is_named(self) -> Self:
        if (self.student == "reference") != (self.reference is not None):
            raise ValueError(
                "student: reference needs the key `reference`, a pretrain run; student: random must not have it"
            )
        return self


def start(cfg: Distill, run: Run) -> Turns:
    yield from wait_for_room(cfg, run, cfg.reference or cfg.teacher, [cfg.teacher])
    if cfg.reference is not None:
        student = load_parent(run, cfg.reference)
    else:
        student = fresh_like(run, cfg.teacher, cfg.seed_for("init"))
    yield from distill(cfg, run, student, cfg.reference or cfg.teacher)


STAGE = Stage("distill", Distill, start, __name__, "Oracle matching (Table 3), Unlearn-and-Distill (Table 6)")
