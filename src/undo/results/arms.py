"""What a model is, by how it was made: its arm. Names and variants of runs are for people, and never looked into."""

from collections.abc import Callable
from dataclasses import dataclass

from undo.config.schema import Raw
from undo.corrupt import Noise


@dataclass(frozen=True)
class Reference:
    """Trained on all roles, here or by those who published it."""


@dataclass(frozen=True)
class Oracle:
    """Trained on everything but the forget role: data filtering."""


@dataclass(frozen=True)
class Unlearned:
    """A reference in which an unlearning method has suppressed the forget role."""

    method: str


@dataclass(frozen=True)
class Matched:
    """Distilled from a pretrained model, the oracle: oracle matching (Section 3)."""

    student: str  # what it was before: random or reference


@dataclass(frozen=True)
class Distilled:
    """A random student of an unlearned teacher: Unlearn-and-Distill (Section 4)."""

    teacher: "Arm | None"  # None: nobody knows any more


@dataclass(frozen=True)
class Undo:
    """A noised student of an unlearned teacher (Section 5)."""

    alpha: float
    beta: float
    distribution: str
    within: float | None  # of the teacher's retain performance, where distillation stopped; None: it did not
    teacher: "Arm | None"


Arm = Reference | Oracle | Unlearned | Matched | Distilled | Undo


def arm_of(name: str, config_of: Callable[[str], Raw | None]) -> Arm | None:
    """The arm of the model that a run makes; None for a run that makes none of these, or whose config is not there.

    name: <stage>/<name>. config_of: the config of a run by its name, None where there is no such run; keys that have a
    default may be missing in it.
    """
    stage, config = name.partition("/")[0], config_of(name)
    if stage == "base":
        return Reference()
    if config is None:
        return None
    if stage == "pretrain":
        return Reference() if config.get("mixture", {}).get("forget") else Oracle()
    if stage == "unlearn":
        return Unlearned(config["method"]["name"])
    if stage == "distill":
        if config["teacher"].partition("/")[0] in ("pretrain", "base"):
            return Matched(config["student"])
        return Distilled(arm_of(config["teacher"], config_of))
    if stage == "undo":
        noise, teacher = config["noise"], arm_of(config["teacher"], config_of)
        within = config.get("retain_threshold")
        beta, distribution = (noise.get(key, Noise.model_fields[key].default) for key in ("beta", "distribution"))
        return Undo(noise["alpha"], beta, distribution, within, teacher)
    return None


def method_of(arm: Arm | None) -> str | None:
    """The name of the unlearning method behind a model: its own, or that of its teacher."""
    match arm:
        case Unlearned(method):
            return method
        case Distilled(teacher) | Undo(teacher=teacher):
            return method_of(teacher)
    return None
