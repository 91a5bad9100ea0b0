"""Distill a teacher into a random student (Unlearn-and-Distill, Section 4, Table 6) or into the reference model
(oracle matching, Section 3, Table 3).

    uv run run_distill.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from typing import Literal, Self

from pydantic import model_validator

from undo import cli
from undo.config import RunName
from undo.distill import DistillingStage, distill
from undo.run import Run
from undo.stage import Stage, fresh_like, load_parent, require_memory


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


def start(cfg: Distill, run: Run) -> None:
    require_memory(cfg, run, cfg.reference or cfg.teacher, [cfg.teacher])
    if cfg.reference is not None:
        student = load_parent(run, cfg.reference)
    else:
        student = fresh_like(run, cfg.teacher, cfg.seed_for("init"))
    distill(cfg, run, student)


STAGE = Stage("distill", Distill, start, (__file__,))

if __name__ == "__main__":
    cli.main(STAGE)
