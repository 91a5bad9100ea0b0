"""Methods that stand on another one: they use its terms, and add to them or take another step."""

from typing import Annotated

from pydantic import Field

from undo.config.schema import Role
from undo.lm.shape import Shape
from undo.unlearn.maxent import MaxEnt
from undo.unlearn.method import Method
from undo.unlearn.plain import PlainMethod


class OnTop(Method):
    """A method that stands on another one, its `base`: by default MaxEnt, as in Section 6."""

    base: Annotated[PlainMethod, Field(discriminator="name")] = MaxEnt()

    @property
    def needs_reference(self) -> bool:
        return self.base.needs_reference

    @property
    def forget_terms(self) -> tuple[str, ...]:
        return self.base.forget_terms

    @property
    def zero_at_first(self) -> tuple[str, ...]:
        return self.base.zero_at_first

    def objective(self, model, reference, rng):
        return self.base.objective(model, reference, rng)

    def trains(self, parameter: str) -> bool:
        return self.base.trains(parameter)

    @property
    def held_per_weight(self) -> int:
        return self.base.held_per_weight

    def role_flops(self, role: Role, model: Shape, length: int) -> int:
        return self.base.role_flops(role, model, length)
