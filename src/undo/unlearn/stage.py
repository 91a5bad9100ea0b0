"""The stage `unlearn`: suppress the forget role in a reference model. Section 4, Appendix B.1, Table 5."""

from collections.abc import Mapping

from pydantic import Field

from undo.config.mistakes import ConfigError
from undo.config.schema import Mixture, RunName
from undo.lm.shape import Shape
from undo.runs.company import Turns
from undo.runs.run import Run
from undo.train.fit import fit
from undo.train.parents import generator, keep, load_parent, open_store, require_memory
from undo.train.stage import Stage, TrainingStage
from undo.unlearn import UnlearningMethod
from undo.unlearn.method import Method


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


def unlearn(cfg: Unlearn, run: Run) -> Turns:
    from undo.lm.place import freeze
    from undo.unlearn import health

    if cfg.method.needs_pairs and not open_store(run.sibling(cfg.data), "forget").paired:
        raise ConfigError(
            f"method.paired=true, but the forget data of {cfg.data} are not pairs\n"
            f"prepare them with data.forget.paired_with=<column of the harmless answer>, or set method.paired=false"
        )
    require_memory(cfg, run, cfg.reference, [cfg.reference] if cfg.method.needs_reference else [])
    model = load_parent(run, cfg.reference)
    reference = freeze(load_parent(run, cfg.reference)) if cfg.method.needs_reference else None
    rng = generator(cfg.seed_for("objective"))
    objective, step = health.begin(cfg.method, model, reference, rng, run.record)
    facts = yield from fit(cfg, run, model, objective, step=step, rng=rng, starts_as=cfg.reference)
    start = reference or load_parent(run, cfg.reference)
    found = health.of(model, start, run.sibling(cfg.data)) | health.recorded_norms(run)
    print(health.as_line(found), flush=True)
    keep(model, cfg, run, cfg.reference)
    run.finish(**facts, health=found)


STAGE = Stage("unlearn", Unlearn, unlearn, __name__, "Unlearning (Tables 5, 9 and 10, B.1, D.1)")
