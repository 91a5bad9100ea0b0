"""The arithmetic world of Appendix A: equations and word problems over four operations.

Retain = addition and subtraction, forget = multiplication and division. Only a few thousand different equations
exist, so as in the paper every one of them occurs in training and validation accuracy measures recall of the tables;
`holdout` keeps a share of the operand pairs out of training, so that generalisation can be measured beside it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

from pydantic import Field

from undo.config.schema import Count, Frozen, Role, Seed, Share
from undo.data.problems import OPERATIONS, Form, Operation, Problem
from undo.prepare_data import templates

if TYPE_CHECKING:
    import numpy as np

Pairs: TypeAlias = "np.ndarray"  # [n, 2] int64: the operands, in the order in which they are written

FORMS: Final[tuple[Form, Form]] = ("equation", "word_problem")
SIGNS: Final[dict[Operation, str]] = {"addition": "+", "subtraction": "-", "multiplication": "*", "division": "/"}
TEMPLATES: Final[dict[Operation, templates.Templates]] = {
    "addition": templates.ADDITION,
    "subtraction": templates.SUBTRACTION,
    "multiplication": templates.MULTIPLICATION,
    "division": templates.DIVISION,
}


class ArithmeticWorld(Frozen):
    """Operand ranges, amounts and the seed. The defaults are the paper's (Appendix A)."""

    name: Literal["arithmetic"] = "arithmetic"
    problems: Count = 1_000_000  # in training, over both roles
    validation_per_cell: Count = 100  # problems for each operation x form
    largest_term: Count = 50  # addition and subtraction use 1..largest_term
    largest_factor: Count = 20  # multiplication and division use 1..largest_factor
    forms: Annotated[tuple[Form, ...], Field(min_length=1)] = FORMS
    holdout: Share = 0.0  # share of operand pairs that training never sees
    seed: Seed = 42

    def pairs(self, operation: Operation) -> tuple[Pairs, Pairs]:
        """All operand pairs of an operation: those that training sees, and the held-out ones.

        A held-out pair is held out in both orders: a model that has seen 3 + 4 need not generalise to answer 4 + 3.
        """
        import numpy as np

        largest = self.largest_term if operation in OPERATIONS["retain"] else self.largest_factor
        numbers = range(1, largest + 1)
        every = np.array(list(itertools.product(numbers, numbers)), dtype=np.int64)
        match operation:
            case "subtraction":  # no negative answers
                every = every[every[:, 0] >= every[:, 1]]
            case "division":  # dividend = divisor x quotient, so that nothing remains
                every = np.stack([every[:, 0] * every[:, 1], every[:, 0]], axis=1)
        low, high = np.minimum(every[:, 0], every[:, 1]), np.maximum(every[:, 0], every[:, 1])
        same = low * (high.max() + 1) + high  # one number for {x, y}
        kinds = np.unique(same)
        rng = np.random.default_rng([self.seed, list(SIGNS).index(operation)])
        held_out = rng.permutation(kinds)[: round(self.holdout * len(kinds))]
        unseen = np.isin(same, held_out)
        return every[~unseen], every[unseen]

    def train(self, role: Role) -> Iterator[Problem]:
        """Half of `problems`, in equal parts from the role's two operations and the forms, in turn."""
        import numpy as np

        rng = np.random.default_rng([self.seed, 1, list(OPERATIONS).index(role)])
        cells = list(itertools.product(OPERATIONS[role], self.forms))
        amount = self.problems // (2 * len(cells))
        streams = []
        for operation, form in cells:
            seen, _ = self.pairs(operation)
            drawn = seen[rng.integers(len(seen), size=amount)]
            streams.append(_write(operation, form, drawn, TEMPLATES[operation].train, rng))
        yield from itertools.chain.from_iterable(zip(*streams, strict=True))

    def validation(self, role: Role) -> Iterator[Problem]:
        """Held-out word templates. Pairs as in training; with `holdout`, as many again of the held-out pairs."""
        import numpy as np

        rng = np.random.default_rng([self.seed, 2, list(OPERATIONS).index(role)])
        for operation, form in itertools.product(OPERATIONS[role], self.forms):
            for pairs, seen in zip(self.pairs(operation), (True, False), strict=True):
                if len(pairs) == 0:
                    continue
                amount = self.validation_per_cell  # without repetition, for as long as there are pairs
                rounds = [rng.permutation(pairs) for _ in range(-(-amount // len(pairs)))]
                drawn = np.concatenate(rounds)[:amount]
                yield from _write(operation, form, drawn, TEMPLATES[operation].held_out, rng, seen)


def solve(operation: Operation, a: int, b: int) -> int:
    """The integer answer of `a operation b`."""
    match operation:
        case "addition":
            return a + b
        case "subtraction":
            return a - b
        case "multiplication":
            return a * b
        case "division":
            return a // b


def _write(
    operation: Operation,
    form: Form,
    pairs: Pairs,
    wordings: tuple[str, ...],
    rng: "np.random.Generator",
    seen: bool = True,
) -> Iterator[Problem]:
    sign = SIGNS[operation]
    numbers = pairs.tolist()
    if form == "equation":
        for a, b in numbers:
            yield Problem(operation, form, f"{a} {sign} {b} =", f" {solve(operation, a, b)}", seen)
        return

    def draw(words: Sequence[object]) -> list[int]:  # all at once: a million single draws would take minutes
        return rng.integers(len(words), size=len(numbers)).tolist()

    first = draw(templates.NAMES)
    second = rng.integers(1, len(templates.NAMES), size=len(numbers)).tolist()  # a distance: never the same person
    fields = zip(
        numbers,
        draw(wordings),
        first,
        second,
        draw(templates.ITEMS),
        draw(templates.CONTAINERS),
        draw(templates.PLACES),
        strict=True,
    )
    for (a, b), wording, name, distance, items, container, place in fields:
        box, boxes = templates.CONTAINERS[container]
        prompt = wordings[wording].format(
            a=a,
            b=b,
            name=templates.NAMES[name],
            other=templates.NAMES[(name + distance) % len(templates.NAMES)],
            items=templates.ITEMS[items],
            box=box,
            boxes=boxes,
            place=templates.PLACES[place],
        )
        yield Problem(operation, form, prompt, f" {solve(operation, a, b)}", seen)
