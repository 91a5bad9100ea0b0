"""Unlearn: suppress the forget role in a reference model. Section 4, Appendix B.1, Table 5; methods in undo/methods.

uv run run_unlearn.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from undo import cli
from undo.config import ConfigError, Mixture, RunName
from undo.methods import UnlearningMethod
from undo.methods.method import Method
from undo.run import Run
from undo.shape import Shape
from undo.stage import Stage, TrainingStage, fit, generator, keep, load_parent, open_store, require_memory

if TYPE_CHECKING:
    from undo.train import Gradient, Gradients, Terms


class Unlearn(TrainingStage):
    """One method with its hyper-parameters, from one reference model."""

    reference: RunName
    method: UnlearningMethod
    retain_mixture: Mixture = Field(default={"retain": 1.0})  # WMDP retains WikiText, too (D.2.2)

    def streams(self) -> Mapping[str, Mixture]:
        return {"retain": self.retain_mixture, "forget": {"forget": 1.0}}

    def trains(self, parameter: str) -> bool:
        return self.method.trains(parameter)

    @property
    def held_per_weight(self) -> int:
        return self.method.held_per_weight

    def check_shard(self) -> None:
        super().check_shard()
        if type(self.method).step is not Method.step:
            raise ConfigError(
                f"{self.name}: execution.shard=full: {self.method.name} moves single weights; set execution.shard=none"
            )

    def flops_per_token(self, model: Shape, length: int) -> int:
        return self.method.flops_per_token(model, length)


def unlearn(cfg: Unlearn, run: Run) -> None:
    from undo import health
    from undo.models import freeze

    if cfg.method.needs_pairs and not open_store(run.sibling(cfg.data), "forget").paired:
        raise ConfigError(
            f"method.paired=true, but the forget data of {cfg.data} are no pairs\n"
            f"prepare them with data.forget.paired_with=<column of the harmless answer>, or set method.paired=false"
        )
    require_memory(cfg, run, cfg.reference, [cfg.reference] if cfg.method.needs_reference else [])
    model = load_parent(run, cfg.reference)
    health.choose_weights(model, cfg.method)
    reference = freeze(load_parent(run, cfg.reference)) if cfg.method.needs_reference else None
    rng = generator(cfg.seed_for("objective"))
    objective = cfg.method.objective(model, reference, rng)

    def step(gradient: "Gradient") -> "tuple[Terms, Gradients]":
        if gradient.progress == 0:
            run.record(0, health.gradient_norms(gradient, cfg.method))
        return cfg.method.step(gradient, rng)

    facts = fit(cfg, run, model, objective, step=step, rng=rng, starts_as=cfg.reference)
    start = reference or load_parent(run, cfg.reference)
    found = health.of(model, start, run.sibling(cfg.data)) | health.recorded_norms(run)
    print(health.as_line(found), flush=True)
    keep(model, cfg, run)
    run.finish(**facts, health=found)


STAGE = Stage("unlearn", Unlearn, unlearn, (__file__,))

if __name__ == "__main__":
    cli.main(STAGE)
