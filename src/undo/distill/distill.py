"""Distillation with forward KL. Unlearn-and-Distill, oracle matching and UNDO differ in teacher and student only."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from undo.config.schema import Mixture, NonNegative, RunName
from undo.lm.shape import Shape
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

    def flops_per_token(self, model: Shape, length: int) -> int:
        return 4 * model.forward_flops(length)  # forward and backward of the student, forward of the teacher


def distill(cfg: DistillingStage, run: Run, student: "PreTrainedModel", like: RunName) -> None:
    """Train `student` on the teacher's outputs until the threshold or the last step; save it and finish the run.

    like: the run whose tokenizer and generation config it keeps. Vocabularies that differ in padding alone are one.
    """
    from undo.lm.place import freeze
    from undo.lm.read import head
    from undo.lm.vocabulary import shared_width
    from undo.losses import forward_kl
    from undo.losses.linear import same_vocabulary

    widths = shape_of_parent(run, cfg.teacher).vocab_size, len(head(student).weight)
    vocabulary = shared_width(run.sibling(cfg.teacher).model, run.sibling(like).model, widths)
    if vocabulary is None:
        same_vocabulary(*widths)
    teacher = freeze(load_parent(run, cfg.teacher))
    target: Mapping[str, float] = run.sibling(cfg.teacher).facts["evaluation"]

    def close_enough(evaluation: Mapping[str, float]) -> bool:
        return cfg.retain_threshold is not None and cfg.evaluation.reaches(
            evaluation["retain"], target["retain"], cfg.retain_threshold
        )

    facts: dict[str, Any] = fit(
        cfg,
        run,
        student,
        lambda batch: {"kl": forward_kl(student, teacher, batch["train"], vocabulary)},
        stop=close_enough,
    )
    keep(student, cfg, run, like)
    run.finish(**facts, reached_threshold=close_enough(facts["evaluation"]))
