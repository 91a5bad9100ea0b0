"""From planned runs to jobs. Whatever can be known to be wrong is reported before a process starts."""

import sys
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from undo.config.mistakes import ConfigError
from undo.config.secrets import check_token
from undo.experiments import worker
from undo.experiments.costs import Costs
from undo.experiments.plan import PlannedRun
from undo.experiments.remedy import command_for
from undo.launch.devices import check_card, check_devices
from undo.launch.jobs import DeviceShare, Job
from undo.train.stage import TrainingStage

Start = Literal["fork", "fresh"]  # how a process comes about


def check(planned: Sequence[PlannedRun], force: bool, kept: Collection[str] = (), costs: Costs | None = None) -> None:
    """Claim the runs' folders. Raises ConfigError for everything that can be known to be wrong before a process starts.

    `force` removes the runs first, except those whose names are in `kept`.
    """
    forced = {run.name for run in planned if force} - set(kept)
    for error in refusals(planned, costs, forced):
        raise error
    check_card()
    for run in planned:
        if run.name in forced and run.directory.is_held():
            raise ConfigError(f"{run.name} is being run by another launcher; --force would destroy its work")
    for run in planned:
        if run.name in forced:
            run.directory.remove()
        run.directory.claim(run.config)


def refusals(
    planned: Sequence[PlannedRun], costs: Costs | None = None, forced: Collection[str] = ()
) -> Iterator[ConfigError]:
    """Why the runs would be refused at once, one reason for each; nothing is written.

    With `costs`, which knows what they train, vocabularies are compared, too. `forced`: runs that --force makes anew.
    """
    names = {run.name for run in planned}
    for run in planned:
        try:
            _check(run, names)
            if run.name not in forced:
                check_made(run, forced)
            if costs is not None:
                check_vocabulary(run, costs)
        except ConfigError as error:
            yield error


def _check(run: PlannedRun, names: Collection[str]) -> None:
    execution = run.config.execution
    check_devices(share(run))
    if execution.devices > 1 and not isinstance(run.config, TrainingStage):
        raise ConfigError(f"execution.devices={execution.devices}: {run.name} trains nothing; leave the key out")
    if execution.students > 1 and common_teacher(run) is None:
        raise ConfigError(f"execution.students={execution.students}: {run.name} has no teacher; leave the key out")
    check_token(run.config)
    if not run.directory.done:
        run.config.check()
    for parent in run.config.parents():
        if parent not in names and not run.directory.sibling(parent).done:
            raise ConfigError(
                f"{run.name} needs {parent}, which is not done in {run.directory.runs / run.directory.setting}\n"
                f"make it with: {command_for(parent, run.directory.setting)}"
            )
        if parent not in names:
            run.directory.sibling(parent).identity()  # now, not when hours of training are to be recorded


def check_made(run: PlannedRun, forced: Collection[str] = ()) -> None:
    """Raises ConfigError if the folder holds a run of another config, or of a parent that is another now."""
    run.directory.check_claim(run.config)
    if not run.directory.done:
        return
    parent = run.directory.is_stale(run.config)
    if parent is not None and parent not in forced:
        raise ConfigError(
            f"{run.name} was made from a {parent} that has since been made anew with other settings\n"
            f"make it again with: {command_for(run.name, run.directory.setting)} --force"
        )


def check_vocabulary(run: PlannedRun, costs: Costs) -> None:
    """Raises ConfigError if the data of a run have tokens that its model does not know."""
    if run.directory.done or not isinstance(run.config, TrainingStage):
        return
    shape, vocabulary = costs.shape(run.name), costs.vocabulary(run.config.data)
    if shape is not None and vocabulary is not None and vocabulary > shape.vocab_size:
        raise ConfigError(
            f"{run.name}: {run.config.data} has a vocabulary of {vocabulary}, the model only {shape.vocab_size}\n"
            f"prepare the data with the model's tokenizer"
        )


def jobs(planned: Iterable[PlannedRun], start: Start = "fork") -> list[Job]:
    """The runs that are not done, grouped into jobs. Runs of a stage that start from the same models share a process.

    A run may need one that comes before it in its job: prepare runs that share a tokenizer do.
    A run on several devices does not share one, because an error of one rank leaves the others in the middle of a step.
    """
    todo = _with_their_like([p for p in planned if not p.directory.done])
    result = []
    for _, group in groupby(todo, key=_alike):
        members = list(group)
        execution, beside = members[0].config.execution, students(members[0])
        apiece = beside * (execution.runs_per_process if execution.devices == 1 else 1)
        options = () if beside == 1 else (f"{worker.TOGETHER}{beside}",)
        for first in range(0, len(members), apiece):
            part, stage = members[first : first + apiece], members[0].stage
            result.append(
                Job(
                    argv=(sys.executable, *starter(execution.devices), "-m", worker.__name__, *options, stage.module),
                    runs=tuple(p.directory for p in part),
                    waits_for=frozenset(parent for p in part for parent in p.config.parents()) - {p.name for p in part},
                    share=share(part[0]),
                    together=beside,
                    imports=(stage.module, *stage.imports) if start == "fork" and execution.devices == 1 else (),
                )
            )
    return result


def students(run: PlannedRun) -> int:
    """How many runs like this one go side by side in a process."""
    return run.config.execution.students if common_teacher(run) is not None else 1


def common_teacher(run: PlannedRun) -> Hashable:
    """What runs must have in common to learn from one teacher side by side; None where they are not to."""
    if run.config.execution.students == 1 or not isinstance(run.config, TrainingStage):
        return None
    return run.config.common_teacher


def _alike(run: PlannedRun) -> Any:
    return run.stage.name, models(run), run.config.execution, common_teacher(run)


def _with_their_like(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Students of one teacher behind the first of them, wherever the sweep has them; all others stay in order."""
    first = dict[Hashable, int]()
    places = [i if common_teacher(p) is None else first.setdefault(_alike(p), i) for i, p in enumerate(runs)]
    return [run for _, run in sorted(zip(places, runs, strict=True), key=lambda placed: placed[0])]


def starter(devices: int) -> tuple[str, ...]:
    """The part of the command line that starts a worker once for each device: torchrun, on a free port.

    Accelerate's launcher ends in the same code, but reads the user's own defaults, such as mixed precision, from a file
    in the home folder.
    """
    if devices == 1:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices))


def share(run: PlannedRun) -> DeviceShare:
    execution = run.config.execution
    return DeviceShare(execution.runs_per_gpu, execution.threads, execution.devices if run.stage.computes else 0)


def models(run: PlannedRun) -> tuple[str, ...]:
    """The parents of a run that are models, not data."""
    return tuple(parent for parent in run.config.parents() if not parent.startswith("prepare/"))
