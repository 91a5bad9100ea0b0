"""Distillation Robustifies Unlearning: unlearn, noise, distill and attack Hugging Face models in memory.

    import undo

    unlearned = undo.unlearn(model, tokenizer, method=undo.MaxEnt(), forget=f, retain=r, steps=100, learning_rate=1e-4)
    student = undo.corrupt(unlearned, alpha=0.6)
    robust = undo.distill(student, unlearned, texts, tokenizer, steps=500, learning_rate=1e-4)
    attack = undo.relearn(robust, f, tokenizer, rates=[1e-5, 1e-4], steps=100)

Importing this imports nothing else: torch comes with the first function that is used.
"""

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from undo import losses as losses
    from undo.api import Relearned as Relearned
    from undo.api import corrupt as corrupt
    from undo.api import distill as distill
    from undo.api import evaluate as evaluate
    from undo.api import finetune as finetune
    from undo.api import read_results as read_results
    from undo.api import relearn as relearn
    from undo.api import unlearn as unlearn
    from undo.corrupt import Noise as Noise
    from undo.lm.tokens import Tokens as Tokens
    from undo.prepare_models.reduced_gemma2 import ReducedGemma2 as ReducedGemma2
    from undo.unlearn import MaxEnt as MaxEnt

FUNCTIONS: Final = ("unlearn", "corrupt", "distill", "finetune", "relearn", "evaluate", "read_results", "Relearned")
METHODS: Final = ("GradDiff", "MaxEnt", "RMU", "UNDIAL", "NPO", "SimNPO", "SAM", "Smoothing", "RepNoise", "UAM")
PLACES: Final = {
    **dict.fromkeys(FUNCTIONS, "undo.api"),
    **dict.fromkeys(METHODS, "undo.unlearn"),
    "Method": "undo.unlearn.method",
    "Noise": "undo.corrupt",
    "Tokens": "undo.lm.tokens",
    "ReducedGemma2": "undo.prepare_models.reduced_gemma2",
}
__all__ = [*PLACES, "losses"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """What is public, imported when it is first asked for; a room that bears a function's name is both (see below)."""
    if name in ROOMS or name == "losses":
        return import_module(f"undo.{name}")
    if name in PLACES:
        return getattr(import_module(PLACES[name]), name)
    raise AttributeError(f"module 'undo' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


ROOMS: Final = ("unlearn", "corrupt", "distill", "evaluate")  # folders and files that are called as functions are


class _Room(ModuleType):
    """`undo.unlearn` is a folder, and `undo.unlearn(...)` the function of that name in undo/api.py."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    @property
    def _function(self) -> Any:
        return getattr(import_module("undo.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Signature:
        return signature(self._function)


class _Package(ModuleType):
    """The import system sets a package's attribute for every module that it has loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
