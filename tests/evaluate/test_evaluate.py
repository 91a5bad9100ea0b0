"""Accuracy by teacher forcing is greedy decoding; cross entropy is the naive one; both through the saved model too."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import DEVICE, SHAPE, training
from tests.train.test_loop import go
from undo.config.mistakes import ConfigError
from undo.data.ends import family_ends
from undo.data.problems import Problem, read_problems
from undo.data.store import TokenStore
from undo.evaluate import Accuracy, TokenCrossEntropy
from undo.evaluate.accuracy import arg_max_hits, encode, pack_answers, summarise
from undo.evaluate.evaluator import Measured
from undo.losses import cross_entropy
from undo.runs.directory import RunDirectory
from undo.train.fit import shared_evaluation
from undo.train.stage import TrainingStage

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def half_trained(data, tmp_path_factory):
    """A model that gets a part of the problems right."""
    wide = SHAPE.model_copy(update={"hidden_size": 48, "intermediate_size": 96, "init_std": 0.05}).build(0)
    cfg = training(steps=140, batch_rows=24, learning_rate=1e-2, evaluate_every=140)
    model, _ = go(tmp_path_factory.mktemp("half"), data, wide, cfg=cfg, rows=24)
    return model.eval()


@pytest.fixture(scope="module")
def problems(data):
    return [Problem(**json.loads(line)) for line in (data.folder / "problems.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(data):
    return AutoTokenizer.from_pretrained(data.folder / "tokenizer")


def test_teacher_forcing_equals_greedy_decoding(half_trained, problems, tokenizer):
    with torch.no_grad():
        hits = np.ones(len(problems), dtype=bool)
        for tokens, owner in pack_answers(problems, range(len(problems)), tokenizer, family_ends(tokenizer), rows=7):
            np.logical_and.at(hits, owner, arg_max_hits(half_trained, tokens))
        greedy = []
        for problem in problems:
            prompt = tokenizer(problem.prompt, return_tensors="pt")["input_ids"].to(DEVICE)
            written = half_trained.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            greedy.append(tokenizer.decode(written[0], skip_special_tokens=True) == problem.text)
    assert hits.tolist() == greedy
    assert 0.05 < np.mean(greedy) < 0.95  # both outcomes occur


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: text.rindex("{")], r"holds \d+ problems, not \d+"),
        (lambda text: text[:-40], "is damaged"),
        (lambda text: text.replace("operation", "Operation", 1), "is damaged"),
        (lambda text: None, "cannot be read"),
    ],
)
def test_damaged_problems_are_named(data, tmp_path, damage, said):
    text = damage((data.folder / "problems.jsonl").read_text())
    if text is not None:
        (tmp_path / "problems.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=rf"problems\.jsonl: {said}"):
        read_problems(tmp_path / "problems.jsonl", data.facts["problems"])


def test_accuracy_does_not_depend_on_how_problems_are_batched(half_trained, data):
    one, two = (Accuracy(rows=rows).load(data, DEVICE) for rows in (1, 500))
    with torch.no_grad():
        assert one(half_trained, True).values == two(half_trained, True).values


@pytest.mark.parametrize("evaluation", [Accuracy(), TokenCrossEntropy()], ids=lambda e: e.name)
def test_an_evaluation_takes_no_gradient(half_trained, data, evaluation):
    """Whoever calls it, and in whatever mode."""
    evaluate = evaluation.load(data, DEVICE)
    with torch.no_grad():
        expected = evaluate(half_trained, True)
    with torch.enable_grad():
        assert evaluate(half_trained, True) == expected


def test_a_fixed_evenly_spaced_subset_at_a_share_of_the_cost(half_trained, data, problems):
    """Every k-th problem, and only those; the whole set still when it is asked for."""
    chosen = problems[::4]
    with torch.no_grad():
        evaluate = Accuracy(subset=len(chosen)).load(data, DEVICE)
        part, again, whole = (evaluate(half_trained, full) for full in (False, False, True))
        assert whole.values == Accuracy().load(data, DEVICE)(half_trained, True).values
    assert part == again
    assert part.values["validation_share"] == pytest.approx(1 / 4, abs=0.01)
    assert part.tokens < whole.tokens / 3
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "tokenizer")
    right = []
    for problem in chosen:
        prompt = tokenizer(problem.prompt, return_tensors="pt")["input_ids"].to(DEVICE)
        with torch.no_grad():
            text = half_trained.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        right.append(tokenizer.decode(text, skip_special_tokens=True) == problem.text)
    expected = summarise(chosen, np.array(right))
    assert {key: part.values[key] for key in expected} == expected


def test_cross_entropy_on_a_subset_is_that_of_its_rows(half_trained, data):
    with torch.no_grad():
        part = TokenCrossEntropy(subset=2, rows=1).load(data, DEVICE)(half_trained, False)
        for role in ("retain", "forget"):
            store = TokenStore(data.folder / "validation" / role)
            tokens = next(store.batches([0, len(store) // 2], rows=2))
            assert part.values[role] == pytest.approx(cross_entropy(half_trained, tokens.to(DEVICE)).item(), rel=1e-6)
    assert part.tokens == 4 * 32
    assert 0 < part.values["validation_share"] < 0.2


def test_an_evaluation_is_made_once_for_all_runs_that_start_from_a_model(data):
    """Also for those who come while it is being made; another evaluation or precision is another number."""
    parent = RunDirectory(data.runs, "tiny", "pretrain/parent")
    parent.folder.mkdir(parents=True)
    calls = []

    def cfg(evaluation, **settings) -> TrainingStage:
        blocks = {"data": "prepare/data", "training": training(**settings), "evaluation": evaluation}
        return TrainingStage.model_validate({"name": "x", **blocks})

    def ask(config, number):
        def measure():
            time.sleep(0.2)  # long enough for all others to arrive
            calls.append(number)
            return Measured({"retain": number, "forget": 0.0}, 10)

        return shared_evaluation(parent, config, measure)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: ask(cfg(Accuracy()), number), [1.0, 2.0, 3.0, 4.0]))
    assert len(calls) == 1
    assert {answer.values["retain"] for answer in answers} == set(calls)
    assert sorted(answer.tokens for answer in answers) == [0, 0, 0, 10]
    assert ask(cfg(Accuracy(), learning_rate=0.5), 5.0).values["retain"] == calls[0]  # no business of the evaluation
    assert ask(cfg(Accuracy(subset=3)), 6.0).values["retain"] == 6.0
    assert ask(cfg(Accuracy(), precision="bf16"), 7.0).values["retain"] == 7.0


def test_groups_by_hand():
    def problem(operation, form, seen=True):
        return Problem(operation, form, "1", "2", seen)

    problems = [
        problem("addition", "equation"),
        problem("subtraction", "word_problem"),
        problem("division", "equation"),
        problem("division", "equation", seen=False),
    ]
    assert summarise(problems, np.array([True, False, True, False])) == {
        "retain": 0.5,
        "retain/equation": 1.0,
        "retain/word_problem": 0.0,
        "forget": 1.0,
        "forget/equation": 1.0,
        "forget/unseen": 0.0,
    }


def test_held_out_pairs_are_reported_apart(half_trained, data):
    with torch.no_grad():
        measured = Accuracy().load(data, DEVICE)(half_trained, True).values
    assert {"retain", "forget", "retain/unseen", "forget/unseen"} <= measured.keys()


def test_encoding_ends_in_eos_and_counts_the_prompt(problems, tokenizer):
    ids, prompt = encode(problems[0], tokenizer, family_ends(tokenizer))
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:prompt], skip_special_tokens=True) == problems[0].prompt
    assert tokenizer.decode(ids, skip_special_tokens=True) == problems[0].text  # decoding is exact


def test_cross_entropy_is_the_token_weighted_mean(half_trained, data):
    """One document at a time through Hugging Face's own loss."""
    with torch.no_grad():
        measured = TokenCrossEntropy(rows=3).load(data, DEVICE)(half_trained, True).values
        for role in ("retain", "forget"):
            store, total, count = TokenStore(data.folder / "validation" / role), 0.0, 0
            for row in range(len(store)):
                for piece in store[row]:
                    ids = torch.from_numpy(piece.astype(np.int64))[None].to(DEVICE)
                    n = ids.shape[1] - 1
                    total += float(half_trained(ids, labels=ids, use_cache=False).loss) * n
                    count += n
            assert measured[role] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("evaluation", "value", "target", "expected"),
    [
        (Accuracy(), 0.95, 1.0, True),
        (Accuracy(), 0.94, 1.0, False),
        (Accuracy(), 1.0, 0.9, True),
        (TokenCrossEntropy(), 2.1, 2.0, True),
        (TokenCrossEntropy(), 2.11, 2.0, False),
        (TokenCrossEntropy(), 1.0, 2.0, True),
    ],
)
def test_stop_rule_at_five_percent(evaluation, value, target, expected):
    assert evaluation.reaches(value, target, 0.05) is expected
