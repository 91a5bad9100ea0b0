"""UNDO: distill an unlearned model into a noised copy of itself. Section 5, Appendix C.

uv run run_undo.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo import cli
from undo.distill import DistillingStage, distill
from undo.noise import Noise
from undo.run import Run
from undo.stage import Stage, fresh_like, generator, load_parent, require_memory


class Undo(DistillingStage):
    """The student is the teacher, shrunk and perturbed."""

    noise: Noise


def undo(cfg: Undo, run: Run) -> None:
    require_memory(cfg, run, cfg.teacher, [cfg.teacher])
    student = load_parent(run, cfg.teacher)
    # the fresh model has no name: it is as large as the student, and gone after this
    cfg.noise.apply(student, fresh_like(run, cfg.teacher, cfg.seed_for("init")), generator(cfg.seed_for("noise")))
    distill(cfg, run, student)


STAGE = Stage("undo", Undo, undo, (__file__,))

if __name__ == "__main__":
    cli.main(STAGE)
