"""Exact-match accuracy by one teacher-forced pass over packed problems.

Greedy decoding produces the answer exactly if, given the right answer so far, each of its tokens is the arg-max. So
one forward pass over prompt + answer + <eos> decides what decoding token by token would (a test checks this).
The softcap is monotone and is left out.
"""

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, ClassVar, Literal

from undo.config.mistakes import ConfigError
from undo.data.problems import Problem, read_problems
from undo.evaluate.evaluator import SHARE, EvaluationConfig, Evaluator, Measured, Outcomes
from undo.runs.directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from undo.data.ends import Ends
    from undo.lm.tokens import Tokens


class Accuracy(EvaluationConfig):
    """Share of validation problems whose greedy answer is exactly right."""

    name: Literal["accuracy"] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "accuracy"

    def load(self, data: RunDirectory, device: "torch.device") -> Evaluator:
        import numpy as np
        import torch
        from transformers import AutoTokenizer

        from undo.data.ends import recorded_ends

        problems = read_problems(data.folder / "problems.jsonl", data.facts["problems"])
        tokenizer = AutoTokenizer.from_pretrained(data.folder / "tokenizer")
        ends = recorded_ends(data, tokenizer)
        subset, rest = (
            [
                (tokens.to(device), owner)
                for tokens, owner in pack_answers(problems, indices, tokenizer, ends, self.rows)
            ]
            for indices in self.split(len(problems))
        )

        roles = {role: np.array([p.seen and p.role == role for p in problems]) for role in ("retain", "forget")}

        @torch.no_grad()
        def measure(model: "PreTrainedModel", full: bool) -> Measured:
            right = np.ones(len(problems), dtype=bool)
            seen = np.zeros(len(problems), dtype=bool)
            batches = subset + rest if full else subset
            for tokens, owner in batches:
                seen[owner] = True
                right[owner[~arg_max_hits(model, tokens)]] = False
            values = summarise(list(compress(problems, seen)), right[seen])
            if not seen.all():
                values[SHARE] = seen.mean().item()
            kept = {role: right[seen & of_role].astype(float).tolist() for role, of_role in roles.items()}
            outcomes = {role: Outcomes(hits, [1.0] * len(hits)) for role, hits in kept.items()}
            return Measured(values, sum(tokens.input_ids.numel() for tokens, _ in batches), outcomes)

        return measure


def summarise(problems: list[Problem], hits: "np.ndarray") -> dict[str, float]:
    """Accuracy by role, by role and form, and on operand pairs that training never saw. hits: bool [problems]."""
    groups: dict[str, list[bool]] = {"retain": [], "forget": []}
    for problem, hit in zip(problems, hits.tolist(), strict=True):
        kinds = ("", f"/{problem.form}") if problem.seen else ("/unseen",)
        for kind in kinds:
            groups.setdefault(problem.role + kind, []).append(hit)
    return {name: sum(group) / len(group) for name, group in groups.items() if group}


def encode(problem: Problem, tokenizer: "PreTrainedTokenizerBase", ends: "Ends") -> "tuple[np.ndarray, int]":
    """Tokens of <bos> prompt answer <eos>, and how many of them stand before the answer.

    Raises ConfigError if the tokenizer joins the end of the prompt with the answer, since then there is no boundary.
    """
    import numpy as np

    prompt, text = tokenizer([problem.prompt, problem.text], add_special_tokens=False)["input_ids"]
    if text[: len(prompt)] != prompt:
        raise ConfigError(
            f"the tokenizer joins prompt and answer of {problem.text!r}; accuracy cannot be measured with it"
        )
    return ends.enclose(text).astype(np.int64), len(prompt) + (ends.bos is not None)


def pack_answers(
    problems: Sequence[Problem], indices: Sequence[int], tokenizer: "PreTrainedTokenizerBase", ends: "Ends", rows: int
) -> "Iterable[tuple[Tokens, np.ndarray]]":
    """Batches of packed problems in which only answer tokens have labels, and for each label its problem's index."""
    import numpy as np

    from undo.data.store import best_fit
    from undo.lm.tokens import IGNORE, collate

    encoded = [encode(problems[index], tokenizer, ends) for index in indices]
    lengths = np.array([len(ids) for ids, _ in encoded])
    bins = best_fit(lengths, int(lengths.max(initial=0)))
    for start in range(0, len(bins), rows):
        part = bins[start : start + rows]
        tokens, owner = collate([encoded[i][0] for i in row] for row in part), []
        for labels, row in zip(tokens.labels, part, strict=True):
            begin = 0
            for i in row:
                labels[begin : begin + encoded[i][1] - 1] = IGNORE  # the last of these predicts a token of the prompt
                owner += [indices[i]] * (len(encoded[i][0]) - encoded[i][1])
                begin += len(encoded[i][0])
        yield tokens, np.array(owner)


def arg_max_hits(model: "PreTrainedModel", tokens: "Tokens") -> "np.ndarray":
    """For each label, in order: is it the most likely token? bool [labels]."""
    from undo.lm.read import head, hidden_states
    from undo.losses.linear import most_likely

    likely = most_likely(tokens.at_labels(hidden_states(model, tokens)), head(model))
    return (likely == tokens.at_labels(tokens.labels)).cpu().numpy()
