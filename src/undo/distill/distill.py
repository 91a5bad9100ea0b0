"""Distillation with forward KL. Unlearn-and-Distill, oracle matching and UNDO differ in teacher and student only."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from undo.config.schema import Mixture, NonNegative, RunName
from undo.lm.shape import Shape
from undo.runs.company import Turns
from undo.runs.run import Run
from undo.train.fit import fit
from undo.train.parents import keep, load_parent, shape_of_parent
from undo.train.stage import TrainingStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DistillingStage(TrainingStage):
    """Config of a stage that trains a student on a teacher's outputs."""

    teacher: RunName
    mixture: Mixture  # unlabelled training data: the student sees the teacher's outputs on all of it
    retain_threshold: NonNegative | None = (
        None  # stop within this share of the teacher's retain performance (paper: 0.05)
    )

    def streams(self) -> Mapping[str, Mixture]:
        return {"train": self.mixture}

    @property
    def common_teacher(self) -> Hashable:
        read = self.data, tuple(self.mixture.items()), self.seed_for("order"), self.training.batch_rows
        return self.teacher, *read, self.training.precision, self.compiles("cuda")

    def flops_per_token(self, model: Shape, length: int) -> int:
        return 4 * model.forward_flops(length)  # forward and backward of the student, forward of the teacher


def distill(cfg: DistillingStage, run: Run, student: "PreTrainedModel", like: RunName) -> Turns:
    """Train `student` on the teacher's outputs until the threshold or the last step; save it and finish the run.

    like: the run whose tokenizer and generation config it keeps. Vocabularies that differ in padding alone are one.
    """
    from undo.distill.teacher import Teacher
    from undo.lm.place import freeze
    from undo.lm.read import head
    from undo.lm.vocabulary import shared_width
    from undo.losses import forward_kl
    from undo.losses.linear import same_vocabulary

    widths = shape_of_parent(run, cfg.teacher).vocab_size, len(head(student).weight)
    vocabulary = shared_width(run.sibling(cfg.teacher).model, run.sibling(like).model, widths)
    if vocabulary is None:
        same_vocabulary(*widths)
    teacher = run.company.once(
        (cfg.teacher, run.sibling(cfg.teacher).identity()),
        lambda: Teacher(freeze(load_parent(run, cfg.teacher)), run.company),
    )
    target: Mapping[str, float] = run.sibling(cfg.teacher).facts["evaluation"]

    def close_enough(evaluation: Mapping[str, float]) -> bool:
        return cfg.retain_threshold is not None and cfg.evaluation.reaches(
            evaluation["retain"], target["retain"], cfg.retain_threshold
        )

    facts: dict[str, Any] = yield from fit(
        cfg,
        run,
        student,
        lambda batch: {"kl": forward_kl(student, teacher.model, batch["train"], vocabulary, teacher.hidden_states)},
        stop=close_enough,
    )
    keep(student, cfg, run, like)
    run.finish(**facts, reached_threshold=close_enough(facts["evaluation"]))
