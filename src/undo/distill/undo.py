"""The stage `undo`: distill an unlearned model into a noised copy of itself. Section 5, Appendix C."""

from undo.corrupt import Noise
from undo.distill.distill import DistillingStage, distill
from undo.runs.company import Turns
from undo.runs.run import Run
from undo.train.parents import fresh_like, generator, load_parent, wait_for_room
from undo.train.stage import Stage


class Undo(DistillingStage):
    """The student is the teacher, shrunk and perturbed."""

    noise: Noise


def undo(cfg: Undo, run: Run) -> Turns:
    yield from wait_for_room(cfg, run, cfg.teacher, [cfg.teacher])
    student = load_parent(run, cfg.teacher)
    # the fresh model has no name: it is as large as the student, and gone after this
    cfg.noise.apply(student, fresh_like(run, cfg.teacher, cfg.seed_for("init")), generator(cfg.seed_for("noise")))
    yield from distill(cfg, run, student, cfg.teacher)


STAGE = Stage("undo", Undo, undo, __name__, "UNDO (Table 6, Appendix C, D.1, D.2.4)")
