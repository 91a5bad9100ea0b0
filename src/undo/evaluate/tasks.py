"""Questions as tasks of the lm-evaluation-harness: its own by name, a file's in memory or written to a folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask

from undo.config.mistakes import ConfigError
from undo.evaluate.questions import LETTERS, Question, Questions

# Renders to what the harness' mmlu and wmdp tasks render to where there are four choices.
TEMPLATE: Final = {
    "output_type": "multiple_choice",
    "description": (
        "The following are multiple choice questions (with answers)"
        "{% if subject %} about {{subject|replace('_', ' ')}}{% endif %}.\n\n"
    ),
    "doc_to_text": (
        "{{question.strip()}}\n{% for choice in choices %}{{letters[loop.index0]}}. {{choice}}\n{% endfor %}Answer:"
    ),
    "doc_to_choice": "letters",
    "doc_to_target": "answer",
    "test_split": "test",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


class LocalTask(NamedTuple):
    """A task of the harness without its data, and the rows of its splits: `test`, and `dev` if it has shots."""

    config: dict[str, Any]
    splits: dict[str, list[dict[str, Any]]]


def local_tasks(questions: Questions, name: str) -> tuple[dict[str, Any] | None, list[LocalTask]]:
    """The tasks of our evaluation and of an exported folder: one task, or one for each subject and their group."""
    tasks = []
    subjects = questions.by_subject()
    for index, (subject, (asked, shots)) in enumerate(subjects.items()):
        own = name if len(subjects) == 1 else f"{name}_{index}_" + re.sub(r"\W+", "_", subject)
        config = TEMPLATE | {"task": own, "num_fewshot": questions.shots}
        splits = {"test": [_row(question) for question in asked]}
        if questions.shots:
            config |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
            splits["dev"] = [_row(shot) for shot in shots]
        tasks.append(LocalTask(config, splits))
    if len(tasks) == 1:
        return None, tasks
    group = {
        "group": name,
        "task": [task.config["task"] for task in tasks],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    return group, tasks


def _row(question: Question) -> dict[str, Any]:
    return question._asdict() | {
        "choices": list(question.choices),
        "letters": list(LETTERS[: len(question.choices)]),
    }


def write_task(questions: Questions, folder: Path, name: str = "questions") -> list[str]:
    """Write what `questions` asks as tasks of the harness -> the arguments of `lm_eval` that measure the same.

    The folder holds the sample itself as JSON lines, so that the command needs neither --samples nor --num_fewshot.
    """
    if questions.task is not None:
        raise ConfigError(f"{questions.task} is a task of the harness already: lm_eval --tasks {questions.task}")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    group, tasks = local_tasks(questions, name)
    for task in tasks:
        files = {}
        for split, rows in task.splits.items():
            path = folder / f"{task.config['task']}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = str(path)
        config = task.config | {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        (folder / f"{task.config['task']}.yaml").write_text(yaml.safe_dump(config))
    if group is not None:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return ["--include_path", str(folder), "--tasks", name]


def build(questions: Questions) -> tuple[Group | None, list[ConfigurableTask]]:
    """The harness' task objects, and the group that adds them up (None for a single task). Needs no network for files.

    Raises ConfigError for a task that the harness does not know, cannot get, or does not measure by accuracy.
    """
    if questions.task is None:
        config, locals_ = local_tasks(questions, "questions")
        tasks = [ConfigurableTask(config=task.config | {"custom_dataset": _in_memory(task)}) for task in locals_]
        if config is None:
            return None, tasks
        group = Group.from_config(config)
        for task in tasks:
            group.add(task)
        return group, tasks
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    if questions.task not in known.all_tasks:
        raise ConfigError(
            f"{questions.task!r} is not a task of the harness; `lm_eval ls tasks` lists them, or give `path`"
        )
    try:
        loaded = known.load([questions.task])
    except (OSError, ValueError) as error:  # not there, or no network
        raise ConfigError(
            f"could not get the data of {questions.task}: {(str(error) or type(error).__name__).splitlines()[0]}\n"
            f"get it once with network, or give your own file with `path`"
        ) from None
    tasks = cast(list[ConfigurableTask], list(loaded["tasks"].values()))
    for task in tasks:
        if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
            raise ConfigError(f"{task.task_name} is not multiple choice measured by accuracy")
        fixed = task.get_config("num_fewshot")
        if fixed == 0 and questions.shots:  # the command line would quietly ask without shots
            raise ConfigError(f"{task.task_name} is made for 0 shots, not {questions.shots}; leave `shots` out")
        if fixed is None or questions.shots:
            task.set_config("num_fewshot", questions.shots)
    root = loaded.get("groups", {}).get(cast(str, questions.task))
    return (root if root is not None and root.has_aggregation else None), tasks


def _in_memory(task: LocalTask) -> Callable[..., Any]:
    def dataset(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(rows) for split, rows in task.splits.items()})

    return dataset
