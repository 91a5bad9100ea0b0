"""Pretrain the reference model (all roles) and the oracle (all but the forget role): Section 3, Appendix A, Table 2."""

from collections.abc import Mapping

from undo.config.schema import Mixture
from undo.prepare_models.reduced_gemma2 import ReducedGemma2
from undo.runs.company import Turns
from undo.runs.run import Run
from undo.train.fit import fit
from undo.train.parents import keep, place, require_memory
from undo.train.stage import Stage, TrainingStage


class Pretrain(TrainingStage):
    """Cross entropy from a random initialisation."""

    model: ReducedGemma2
    mixture: Mixture

    def streams(self) -> Mapping[str, Mixture]:
        return {"train": self.mixture}


def pretrain(cfg: Pretrain, run: Run) -> Turns:
    from undo.losses import cross_entropy

    require_memory(cfg, run, cfg.model)
    model = place(cfg.model.build(cfg.seed_for("init")), run)
    facts = yield from fit(cfg, run, model, lambda batch: {"ce": cross_entropy(model, batch["train"])})
    keep(model, cfg, run)
    run.finish(**facts)


STAGE = Stage(
    "pretrain",
    Pretrain,
    pretrain,
    __name__,
    "Models and pretraining (Tables 1 and 2)",
    shape=lambda cfg, run: cfg.model,
)
