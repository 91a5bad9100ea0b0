"""The arithmetic world: right answers, the paper's ranges and amounts, held-out templates and pairs."""

import re
from collections import Counter

import pytest

from undo.data.problems import OPERATIONS
from undo.prepare_data import templates
from undo.prepare_data.arithmetic import SIGNS, TEMPLATES, ArithmeticWorld

WORLD = ArithmeticWorld(problems=4000)
SOLVE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


def every(world=WORLD):
    return [p for role in OPERATIONS for p in world.train(role)]


def test_equations_hold_and_keep_the_paper_s_ranges():
    seen = Counter()
    for problem in every():
        if problem.form != "equation":
            continue
        a, sign, b, answer = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.text).groups()
        assert SIGNS[problem.operation] == sign
        assert SOLVE[sign](int(a), int(b)) == int(answer)  # division leaves no remainder
        largest = 50 if sign in "+-" else 20
        assert 1 <= int(b) <= largest
        assert 1 <= (int(answer) if sign == "/" else int(a)) <= largest
        seen[sign] += 1
    assert set(seen) == set("+-*/")


def test_word_problems_have_the_answer_of_their_numbers():
    for problem in every():
        if problem.form == "word_problem":
            numbers = sorted(map(int, re.findall(r"\d+", problem.prompt)))
            assert len(numbers) == 2
            assert int(problem.answer) == SOLVE[SIGNS[problem.operation]](*reversed(numbers))
            assert "{" not in problem.prompt


def test_half_of_each_role_operation_and_form():
    counts = Counter((p.role, p.operation, p.form) for p in every())
    assert set(counts.values()) == {500}
    assert len(counts) == 8


def test_forms_can_be_chosen():
    problems = every(ArithmeticWorld(problems=400, forms=("equation",)))
    assert {p.form for p in problems} == {"equation"}
    assert len(problems) == 400


def test_same_seed_same_problems_another_seed_others():
    again, other = ArithmeticWorld(problems=4000), ArithmeticWorld(problems=4000, seed=1)
    assert every() == every(again)
    assert every() != every(other)


def test_enough_templates_all_different_with_all_fields():
    for operation, (train, held_out) in TEMPLATES.items():
        assert len(set(train)) >= 20
        assert len(set(held_out)) >= 10
        assert not set(train) & set(held_out), operation
        assert all("{a}" in t and "{b}" in t for t in train + held_out)
    together = [t for pair in TEMPLATES.values() for t in pair.train + pair.held_out]
    assert len(set(together)) == len(together)
    assert len(set(templates.NAMES)) == len(templates.NAMES)


def test_validation_uses_held_out_templates_and_repeats_nothing_while_it_can():
    world = ArithmeticWorld(problems=40_000, largest_term=12, largest_factor=8, validation_per_cell=60)
    skeleton = re.compile(r"\d+")
    for role in OPERATIONS:
        training = {skeleton.sub("#", p.prompt) for p in world.train(role) if p.form == "word_problem"}
        problems = list(world.validation(role))
        assert Counter((p.operation, p.form) for p in problems) == Counter(
            {(o, f): 60 for o in OPERATIONS[role] for f in ("equation", "word_problem")}
        )
        words = {skeleton.sub("#", p.prompt) for p in problems if p.form == "word_problem"}
        assert not words & training
        equations = [p.prompt for p in problems if p.form == "equation"]
        assert len(set(equations)) == len(equations)
        assert set(equations) <= {p.prompt for p in world.train(role) if p.form == "equation"}  # recall of the tables


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_held_out_pairs_never_occur_in_training_in_either_order(share):
    world = ArithmeticWorld(problems=40_000, largest_term=12, largest_factor=8, validation_per_cell=20, holdout=share)
    for role in OPERATIONS:

        def pairs(problems, operation):
            return {frozenset(map(int, re.findall(r"\d+", p.prompt))) for p in problems if p.operation == operation}

        training, validation = list(world.train(role)), list(world.validation(role))
        for operation in OPERATIONS[role]:
            unseen = pairs([p for p in validation if not p.seen], operation)
            assert unseen
            assert not unseen & pairs(training, operation)
            seen, held_out = world.pairs(operation)
            assert abs(len(held_out) / (len(seen) + len(held_out)) - share) < 0.06
        assert pairs([p for p in validation if p.seen], operation) <= pairs(training, operation)
