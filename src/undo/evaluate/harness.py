"""The lm-evaluation-harness on a model in memory: its prompts, tokens, verdicts and sums.

The forward passes are ours: `likelihoods.py`.
"""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import aggregate_subtask_metrics
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import env as templates
from transformers import AutoTokenizer

from undo.config.mistakes import ConfigError
from undo.data.ends import Ends, family_ends, recorded_ends
from undo.evaluate.likelihoods import Encoded, Plan, Score, plan, score
from undo.evaluate.questions import Questions
from undo.evaluate.tasks import build
from undo.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    class HFLM(TemplateLM):  # the decorator that registers it hides its type
        _model: PreTrainedModel | None
        model: PreTrainedModel
        max_length: int
        eot_token_id: int  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]: ...
else:
    from lm_eval.models.huggingface import HFLM

SHOT_SEED: Final = 1234  # the command line's own, for tasks that draw their shots


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness' progress bars and remarks. Errors are still shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def compiled_once() -> Iterator[None]:
    """Compile each template once. The harness does so for every question and shot, which takes most of the time."""
    templates.from_string = cache(templates.from_string)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del templates.from_string


# --- the harness' language model -------------------------------------------------------------------------------------


class InMemory(HFLM):
    """`--model hf` for a model in memory, with the harness' own tokenisation and context length.

    A prompt begins as the documents of the model's data do; by default that is what the tokenizer does by itself.
    It can be passed to `lm_eval.evaluate`. `Benchmark` uses it directly, to render and tokenise once and measure often.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        model: "PreTrainedModel | None" = None,
        rows: int = 16,
        ends: Ends | None = None,
    ) -> None:
        TemplateLM.__init__(self)  # HFLM's own wants to load a model
        self.tokenizer, self.backend, self.add_bos_token, self.custom_prefix_token_id = tokenizer, "causal", None, None
        self._model, self._max_length, self.rows = model, None, rows
        self._bos = (ends or family_ends(tokenizer)).bos
        self._known: dict[str, list[int]] = {}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if add_special_tokens is False or self._begins(string):
            return super().tok_encode(string, False, **options)
        if string in self._known and not options:
            return self._known[string]
        return self._begun(super().tok_encode(string, False, **options))

    def _begins(self, text: str) -> bool:
        """Whether a text has the token of a beginning itself."""
        return self._bos is not None and has_bos_prefix(text, self.tokenizer.decode(self._bos))

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if self._bos is None else [self._bos, *ids]

    def encode(self, requests: Sequence[Instance]) -> list[Encoded]:
        """Like TemplateLM.loglikelihood, but with all texts at once, so that a fast tokenizer uses all cores."""
        pairs = [cast(tuple[str, str], request.args) for request in requests]
        texts = {text for context, choice in pairs if context for text in (context, context + choice)}
        plain = sorted(text for text in texts if not self._begins(text))
        encoded = self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else []
        self._known = {text: self._begun(ids) for text, ids in zip(plain, encoded, strict=True)}
        try:
            return [self._encode(*pair) for pair in pairs]
        finally:
            self._known = {}

    def _encode(self, context: str, continuation: str) -> Encoded:
        if context:
            return Encoded(*self._encode_pair(context, continuation))
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return Encoded(ids[:1], ids[1:]) if ids[0] == self.prefix_token_id else Encoded([self.prefix_token_id], ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        encoded = [
            Encoded(context[-(self.max_length + 1 - len(continuation)) :], continuation)  # HFLM's truncation
            for context, continuation in self.encode(requests)
        ]
        by_task: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            by_task.setdefault(request.task_name, []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for indices in by_task.values():
            scores = score(self.model, plan([encoded[index] for index in indices], self.rows))
            answers |= dict(zip(indices, scores, strict=True))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("only choices are measured")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("only choices are measured")

    def get_model_info(self) -> dict[str, Any]:
        return {}  # HFLM's asks the hub


class Asked(NamedTuple):
    """A question in the harness' form: its row, and its choices as requests."""

    task: ConfigurableTask
    doc: Mapping[str, Any]
    requests: tuple[Encoded, ...]


class Answered(NamedTuple):
    """The accuracy as the harness computes it, and for each question the chosen index and the number of choices."""

    accuracy: float
    hits: list[float]  # 1 for a right answer, 0 for a wrong one
    chosen: list[int]
    choices: list[int]
    scores: list[list[Score]]  # of each question's choices
    tokens: int  # that went through the model


class Benchmark:
    """Questions, rendered and tokenised once, that can be asked any number of times."""

    def __init__(
        self,
        questions: Questions,
        tokenizer: "PreTrainedTokenizerBase",
        rows: int = 16,
        reuse: bool = True,
        ends: Ends | None = None,
    ) -> None:
        """ends: of the documents that the model was trained on; None: as the tokenizer's family has them."""
        self.questions, self.tokenizer, self.rows, self.reuse = questions, tokenizer, rows, reuse
        self.asked: list[Asked] = []
        self._plans: dict[tuple[int, ...], list[tuple[list[int], Plan]]] = {}
        with quiet(), compiled_once():
            self.group, self.tasks = build(questions)
            for task in self.tasks:
                task.set_fewshot_seed(SHOT_SEED)
                chosen = None  # a local task holds its sample only
                if questions.task is not None and questions.share < 1:
                    chosen = questions.sample(task.task_name, len(task.eval_docs))
                task.build_all_requests(samples=chosen)
                instances = task.instances
                encoded = InMemory(tokenizer, ends=ends).encode(instances)
                if not all(request.continuation for request in encoded):
                    raise ConfigError(f"{questions.label}: the tokenizer has no token for a choice")
                by_doc: dict[int | None, list[int]] = {}
                for index, instance in enumerate(instances):
                    by_doc.setdefault(instance.doc_id, []).append(index)
                self.asked += [
                    Asked(task, instances[indices[0]].doc, tuple(encoded[index] for index in indices))
                    for indices in by_doc.values()
                ]
                task._instances = None  # the texts of some 10,000 prompts with their shots

    def __len__(self) -> int:
        return len(self.asked)

    @cached_property
    def longest(self) -> tuple[int, Asked]:
        """Tokens of the longest input, and the question that it belongs to."""
        sizes = [max(len(r.context) + len(r.continuation) - 1 for r in asked.requests) for asked in self.asked]
        return max(sizes), self.asked[sizes.index(max(sizes))]

    def fits(self, model: "PreTrainedModel") -> None:
        """Raises ConfigError if a prompt is longer than the model's context; the harness would cut it on the left."""
        most, (longest, asked) = InMemory(self.tokenizer, model).max_length, self.longest
        if longest > most:
            begin = str(asked.doc.get("question") or asked.task.doc_to_text(asked.doc)).strip()[:60]
            raise ConfigError(
                f"{self.questions.label}: the question {begin!r} with its {self.questions.shots} "
                f"shots has {longest} tokens, the model reads {most}\nuse fewer shots, or leave it out"
            )

    def ask(self, model: "PreTrainedModel", indices: Sequence[int] | None = None) -> Answered:
        """Ask those questions, or all of them."""
        indices = range(len(self)) if indices is None else indices
        scores: dict[int, list[Score]] = {}
        tokens = 0
        for numbers, planned in self._planned(tuple(indices)):
            answers = iter(score(model, planned))
            for number in numbers:
                scores[number] = [next(answers) for _ in self.asked[number].requests]
            tokens += planned.tokens
        return self._add_up(indices, [scores[index] for index in indices], tokens)

    def _planned(self, indices: tuple[int, ...]) -> list[tuple[list[int], Plan]]:
        """The numbers of each task's questions and the forward passes that answer them. Made once."""
        if indices not in self._plans:
            by_task: dict[int, list[int]] = {}
            for index in indices:
                by_task.setdefault(id(self.asked[index].task), []).append(index)
            self._plans[indices] = [
                (numbers, plan([r for n in numbers for r in self.asked[n].requests], self.rows, self.reuse))
                for numbers in by_task.values()
            ]
        return self._plans[indices]

    def _add_up(self, indices: Sequence[int], scores: list[list[Score]], tokens: int) -> Answered:
        """By the tasks' own process_results, and their group's aggregate."""
        hits: dict[str, list[float]] = {}
        chosen, choices, right = [], [], list[float]()
        for index, answers in zip(indices, scores, strict=True):
            task, doc, _ = self.asked[index]
            right.append(float(task.process_results(doc, answers)["acc"]))
            hits.setdefault(task.task_name, []).append(right[-1])
            number = len(task.doc_to_choice(doc))
            chosen.append(int(np.argmax([answer.loglikelihood for answer in answers[:number]])))
            choices.append(number)
        metrics: dict[str, Any] = {
            task.task_name: {
                "acc,none": task.aggregation()["acc"](hits[task.task_name]),
                "sample_len": len(hits[task.task_name]),
            }
            for task in self.tasks
            if task.task_name in hits
        }
        with quiet():
            if self.group is not None:
                accuracy = cast(dict[str, Any], self.group.aggregate(metrics))["acc,none"]
            elif len(metrics) == 1:
                accuracy = next(iter(metrics.values()))["acc,none"]
            else:
                accuracy = aggregate_subtask_metrics(
                    [m["acc,none"] for m in metrics.values()], [m["sample_len"] for m in metrics.values()]
                )
        return Answered(accuracy, right, chosen, choices, scores, tokens)


@lru_cache(maxsize=4)
def benchmark(questions: Questions, data: Path, rows: int) -> Benchmark:
    """The benchmark as a prepare run's folder has it. Runs of one process share it: questions are rendered once."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    return Benchmark(questions, tokenizer, rows, ends=recorded_ends(RunDirectory.at(data), tokenizer))
