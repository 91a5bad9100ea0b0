"""The stage `relearn`: finetune a model on the forget role, over learning rates. Section 2, Tables 4 and 12.

One run is one adversary. `results/results.py` takes the worst case over the adversaries of a model.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from undo.attacks.attack import FINETUNING
from undo.config.mistakes import ConfigError
from undo.config.schema import Mixture, Role, RunName
from undo.corrupt import Noise
from undo.runs.company import Turns
from undo.runs.directory import Diverged
from undo.runs.run import Run
from undo.train.fit import fit
from undo.train.parents import fresh_like, generator, keep, load_parent, require_memory
from undo.train.stage import Stage, TrainingStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BROKEN: Final = "{}: its loss or gradient is not finite before any update, so the model is broken, not the attack"


class Relearn(TrainingStage):
    """One adversary: a model, a mixture, a learning rate; on WMDP a length of rows and shrink-perturb, too (D.2.5)."""

    model: RunName
    adversary: str = ""  # its name, where there are several kinds
    mixture: Mixture
    noise: Noise | None = None  # applied before the first step
    save_model: bool = False

    @property
    def title(self) -> str:
        """The kind of attack that it is, in the words of the stage `attack`."""
        return composed([] if self.noise is None else [f"perturbed {self.noise.alpha:g}"], FINETUNING, self.mixture)

    @property
    def leaves_model(self) -> bool:
        return self.save_model

    def streams(self) -> Mapping[str, Mixture]:
        return {"train": self.mixture}


def relearn(cfg: Relearn, run: Run) -> Turns:
    require_memory(cfg, run, cfg.model)
    model = load_parent(run, cfg.model)
    if cfg.noise is not None:
        cfg.noise.apply(model, fresh_like(run, cfg.model, cfg.seed_for("init")), generator(cfg.seed_for("noise")))
    yield from finetuned(cfg, run, model, cfg.model, unchanged=cfg.noise is None, attack=cfg.title)


def composed(before: Iterable[str], attack: str, mixture: Mapping[Role, float], examples: int | None = None) -> str:
    """The title of an attack with all that was done before it, and the text of its training where it is not forget."""
    text = [role for role, share in mixture.items() if share > 0]
    on = f" on {' and '.join(text)} text" if text != ["forget"] else ""
    return " → ".join([*before, attack]) + on + ("" if examples is None else f", {examples} examples")


def finetuned(
    cfg: TrainingStage, run: Run, model: "PreTrainedModel", attacked: RunName, *, unchanged: bool, **more: Any
) -> Turns:
    """Train the model of the run `attacked` on the stage's stream and finish this run. `more`: facts for run.json.

    unchanged: nothing was done to the model before. An attack that diverges has not elicited anything: a result.
    Raises ConfigError if it is the model that is broken.
    """
    from undo.losses import cross_entropy

    starts_as = attacked if unchanged else None  # what was changed is another model
    try:
        facts = yield from fit(
            cfg, run, model, lambda batch: {"ce": cross_entropy(model, batch["train"])}, starts_as=starts_as
        )
    except Diverged as diverged:
        if diverged.step == 0 and unchanged:
            raise ConfigError(BROKEN.format(attacked)) from None
        run.finish(outcome="diverged", steps=diverged.step, **more)
        return
    if cfg.leaves_model:
        keep(model, cfg, run, attacked)
    run.finish(outcome="finished", **facts, **more)


STAGE = Stage("relearn", Relearn, relearn, __name__, "Relearning attacks (Tables 4 and 12)")
