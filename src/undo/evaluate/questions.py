"""Files of multiple-choice questions: read, checked row by row, and sampled. Imports neither torch nor the harness."""

import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Final, NamedTuple, Self

from pydantic import Field, model_validator

from undo.config.mistakes import ConfigError
from undo.data.files import check_surrogates, find_files, read_rows
from undo.data.hub import HubDataset

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FORMATS: Final = (".parquet", ".jsonl", ".json")


class Question(NamedTuple):
    """One row of a benchmark's file. `answer` is an index into `choices`; `subject` is "" where there is none."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str


class Questions(HubDataset):
    """The questions to ask: a task of the harness, or a file or a dataset of the hub with the benchmark's columns."""

    task: str | None = None  # a name that the harness knows: mmlu, wmdp_bio, ...
    split: str = "test"  # of the hub's dataset
    shots_split: str | None = None  # of the same dataset: where the shots come from
    path: str | None = None  # a file or a glob, .parquet, .jsonl or .json; it beats `hub`. Columns: see `read`
    subject: str | None = None  # of all questions of a file that has no such column; it stands in the prompt
    subjects: tuple[str, ...] | None = None  # of a file that has more of them: only these
    shots: Annotated[int, Field(ge=0)] = 0  # solved examples before each question; 0: as the task has it
    shots_path: str | None = None  # where they come from: the first ones of the question's subject, in order
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of each subject, drawn at random; the authors take the first
    seed: int = 0  # of that draw

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.path is None and self.hub is None):
            raise ValueError("give one of `task` (a name that the harness knows), `path` (your own file) and `hub`")
        if self.task is not None and (self.shots_path or self.subject or self.subjects):
            raise ValueError("`shots_path`, `subject` and `subjects` go with `path`; a task brings its own")
        if self.task is None and self.shots > 0 and self.shots_path is None:
            if self.path is not None:
                raise ValueError(f"{self.shots} shots need `shots_path`, the file to take them from")
            if self.shots_split is None:
                raise ValueError(f"{self.shots} shots need `shots_split`, the split to take them from")
        return self

    def check(self) -> None:
        """Raises ConfigError for any mistake in the files. A dataset is fetched when it is needed."""
        if self.path is not None or self.stand_in() is not None:
            self.by_subject()

    @property
    def label(self) -> str:
        return self.task or self.path or self.dataset

    def _read(self, path: str | None, split: str | None) -> list[Question]:
        """The questions of a file, or of a split of the dataset."""
        if local := path or self.stand_in(split):
            return read(local, self.subject)
        rows = enumerate(self.rows(split))
        return [_question(row, self.subject or "", f"{self.dataset} {split} row {number}") for number, row in rows]

    def by_subject(self) -> dict[str, tuple[list[Question], list[Question]]]:
        """The sample of the questions, and the shots before each of them, by subject. Not for a `task`."""
        groups = _by_subject(self._read(self.path, self.split))
        if self.subjects is not None:
            for subject in self.subjects:
                if subject not in groups:
                    raise ConfigError(f"{self.label}: holds no question on {subject!r}; it has {', '.join(groups)}")
            groups = {subject: groups[subject] for subject in self.subjects}
        shots: dict[str, list[Question]] = {}
        if self.shots:
            shots = _by_subject(self._read(self.shots_path, self.shots_split))
        for subject in groups:
            where = self.shots_path or f"{self.label} {self.shots_split}"
            if (found := len(shots.get(subject, ()))) < self.shots:
                raise ConfigError(
                    f"{where}: holds {found} questions on {subject!r}, fewer than the {self.shots} shots\n"
                    f"lower `shots`, or give a file with more of them"
                )
        return {
            subject: ([group[i] for i in self.sample(subject, len(group))], shots.get(subject, [])[: self.shots])
            for subject, group in groups.items()
        }

    def sample(self, name: str, size: int) -> list[int]:
        """The sorted indices of a subject's (or task's) share; the same for the same seed, another for each name."""
        import numpy as np

        if self.share == 1:
            return list(range(size))
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return sorted(rng.choice(size, max(1, round(self.share * size)), replace=False).tolist())


def read(pattern: str, subject: str | None = None) -> list[Question]:
    """All questions of a file, or of the files that a glob matches, in order. `subject` where the file names none.

    Columns: question, choices, answer (an index), and subject where there are several.
    Raises ConfigError that names the file, the place in it and what is wrong.
    """
    questions: list[Question] = []
    for file in find_files(pattern, FORMATS):
        found = [_question(row, subject or "", where) for where, row in read_rows(file)]
        if not found:
            raise ConfigError(f"{file}: holds no questions")
        questions += found
    return questions


def _question(row: Any, subject: str, where: str) -> Question:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is not an object with the columns question, choices and answer")
    for column in ("question", "choices", "answer"):
        if column not in row:
            raise ConfigError(f"{where}: has no column {column!r}; it has {', '.join(sorted(map(str, row)))}")
    question, choices, answer = row["question"], row["choices"], row["answer"]
    subject = row.get("subject") or subject
    for column, value in (("question", question), ("subject", subject)):
        if not isinstance(value, str):
            raise ConfigError(f"{where}: column {column!r} holds {value!r}, not text")
        check_surrogates(value, f"{where}: column {column!r}")
    if not question.strip():
        raise ConfigError(f"{where}: the question is empty")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ConfigError(f"{where}: column 'choices' must be a list of texts, got {choices!r}")
    for choice in choices:
        check_surrogates(choice, f"{where}: column 'choices'")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ConfigError(f"{where}: has {len(choices)} choices; a question needs 2 to {len(LETTERS)}")
    if len(set(choices)) == 1:
        raise ConfigError(f"{where}: its {len(choices)} choices are all {choices[0]!r}: no answer is better")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{where}: answer {answer!r} is not an index into its {len(choices)} choices (0 to {len(choices) - 1})"
        )
    return Question(question, tuple(choices), answer, subject)


def _by_subject(questions: Sequence[Question]) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.subject, []).append(question)
    return groups
