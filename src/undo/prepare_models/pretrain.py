"""Pretrain the reference model (all roles) and the oracle (all but the forget role): Section 3, Appendix A, Table 2.

uv run run_pretrain.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from collections.abc import Mapping

from undo import cli
from undo.config import Mixture
from undo.prepare_models import ReducedGemma2
from undo.run import Run
from undo.stage import Stage, TrainingStage, fit, keep, place, require_memory


class Pretrain(TrainingStage):
    """Cross entropy from a random initialisation."""

    model: ReducedGemma2
    mixture: Mixture

    def streams(self) -> Mapping[str, Mixture]:
        return {"train": self.mixture}


def pretrain(cfg: Pretrain, run: Run) -> None:
    from undo.losses import cross_entropy

    require_memory(cfg, run, cfg.model)
    model = place(cfg.model.build(cfg.seed_for("init")), run)
    facts = fit(cfg, run, model, lambda batch: {"ce": cross_entropy(model, batch["train"])})
    keep(model, cfg, run)
    run.finish(**facts)


STAGE = Stage("pretrain", Pretrain, pretrain, (__file__,))

if __name__ == "__main__":
    cli.main(STAGE)
