"""The stage `attack`: anything that takes a model and tries to bring the forgotten back.

One run is one adversary: what is done to the weights first, the attack, and the values of its training. The paper's own
attack, finetuning over learning rates, is the stage `relearn`.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import Field, model_validator

from undo.attacks import AnyAttack, Change
from undo.attacks.attack import Means
from undo.attacks.relearn import composed, finetuned
from undo.config.schema import Count, Mixture, Positive, Role, RunName, Training
from undo.runs.company import Turns
from undo.runs.run import Run
from undo.train.parents import fresh_like, generator, load_parent, open_store, require_memory
from undo.train.stage import Stage, TrainingStage

if TYPE_CHECKING:
    from undo.lm.tokens import Tokens

CALIBRATION_ROWS: Final = 16  # of a batch that an attack reads without training


class AttackTraining(Training):
    """Of an attack that finetunes. No steps: it trains nothing, and the changed model is what is measured."""

    steps: Annotated[int, Field(ge=0)] = 0
    batch_rows: Count = 1
    learning_rate: Positive = 1e-3
    evaluate_every: Count = 10


class Attacked(TrainingStage):
    """One adversary of one model."""

    model: RunName
    adversary: str = ""  # its name, where there are several kinds
    before: tuple[Change, ...] = ()  # changes of the weights, in this order, and then the attack
    attack: AnyAttack
    mixture: Mixture = Field(default={"forget": 1.0})  # what finetuning trains on
    examples: Count | None = None  # documents of each role that finetuning has; None: all of the training data
    training: AttackTraining = AttackTraining()  # pyright: ignore[reportIncompatibleVariableOverride]  # it is frozen

    @model_validator(mode="after")
    def _trains_if_it_finetunes(self) -> Self:
        if self.attack.finetunes and not self.training.steps:
            raise ValueError(f"{self.attack.name} trains: give training.steps, batch_rows and learning_rate")
        if self.training.steps and not self.attack.finetunes:
            raise ValueError(f"{self.attack.name} trains nothing: leave `training` out, or put it into `before`")
        return self

    @property
    def title(self) -> str:
        """The column of the matrix that it belongs to."""
        mixture: Mixture = self.mixture if self.attack.finetunes else {"forget": 1.0}
        return composed((change.title for change in self.before), self.attack.title, mixture, self.examples)

    def parents(self) -> tuple[RunName, ...]:
        others = (name for attack in (*self.before, self.attack) for name in attack.parents())
        return tuple(dict.fromkeys((*super().parents(), *others)))

    @property
    def leaves_model(self) -> bool:
        return False

    @property
    def documents(self) -> int | None:
        return self.examples

    def streams(self) -> Mapping[str, Mixture]:
        return {"train": self.mixture}

    def trains(self, parameter: str) -> bool:
        return self.attack.trains(parameter)


def attack(cfg: Attacked, run: Run) -> Turns:
    require_memory(cfg, run, cfg.model)
    model = load_parent(run, cfg.model)
    means = Means(
        generator(cfg.seed_for("noise")),
        lambda role: text(cfg, run, role),
        lambda name: load_parent(run, name),
        lambda: fresh_like(run, cfg.model, cfg.seed_for("init")),
    )
    for change in (*cfg.before, cfg.attack):
        change.apply(model, means)
    unchanged = cfg.attack.starts_unchanged and not cfg.before
    yield from finetuned(cfg, run, model, cfg.model, unchanged=unchanged, read=means.read, attack=cfg.title)


def text(cfg: Attacked, run: Run, role: Role) -> "Iterator[Tokens]":
    """Endless batches of a role's training text, on this run's device."""
    from itertools import count

    from undo.data.stream import MixedStream
    from undo.runs.ranks import this_process

    store, device = open_store(run.sibling(cfg.data), role), this_process().device
    assert device is not None
    stream = MixedStream({role: store}, {role: 1.0}, CALIBRATION_ROWS, cfg.seed_for("objective"))
    return (stream.batch(step).to(device) for step in count())


STAGE = Stage(
    "attack",
    Attacked,
    attack,
    __name__,
    "Attacks of every kind (beyond the paper)",
    example="demo --with attacks --only '*undo_0.8*' --dry-run",
)
