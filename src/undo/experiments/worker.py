"""The worker: the process that a job starts. It executes runs of one stage, one after the other or some side by side.

python -m undo.experiments.worker [--together=N] undo.unlearn.stage RUN...
"""

import atexit
import errno
import os
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, NoReturn

from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.launch.nanny import die_with_parent, watch_parent
from undo.runs import ranks
from undo.runs.company import Company
from undo.runs.directory import INTERRUPTED, Diverged, Interrupted
from undo.runs.run import Follower, Run
from undo.train.stage import Stage

TOGETHER: Final = "--together="
LONGEST: Final = 300  # characters of a reason; the log has the rest
UNWRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str]) -> int:
    """arguments: how many runs go side by side, where that is not one; the module that holds the stage; the runs'
    folders. Returns the exit status of `work`."""
    together, rest = 1, list(arguments)
    if rest[0].startswith(TOGETHER):
        together = int(rest.pop(0).removeprefix(TOGETHER))
    module, *folders = rest
    return work(import_module(module).STAGE, [Path(folder) for folder in folders], together)


def work(stage: Stage, folders: Sequence[Path], together: int = 1) -> int:
    """Execute runs, `together` at a time. One that fails is recorded as failed, and the others go on.

    For a run on several devices each process does this, but only the leader writes to the run's folder.
    """
    Run.stop_on_signals()
    status, company = 0, Company()
    for start in range(0, len(folders), together):
        status = max(status, side_by_side(stage, folders[start : start + together], company))
        if status == INTERRUPTED:
            break
    return status


@dataclass(eq=False)
class Attempt:
    """A run between its turns. Its step is -1 before the first one, and None while there is no room for it."""

    turns: Generator[int | None, None, int]
    step: int | None = -1


def side_by_side(stage: Stage, folders: Sequence[Path], company: Company) -> int:
    """Execute runs in turns, always the one at the lowest step -> their highest exit status.

    In order of their names, so that two processes that want the same runs do not wait for each other.
    """
    attempts, status = [Attempt(attempt(stage, folder, company)) for folder in sorted(folders)], 0
    while attempts:
        if all(other.step is None for other in attempts):  # there is room again
            for waiting in attempts:
                waiting.step = -1
        step, now = min((a.step, i) for i, a in enumerate(attempts) if a.step is not None)
        begun = [i for i, a in enumerate(attempts) if a.step is not None and a.step >= 0]
        company.step, company.beside = step, len([i for i in begun if i != now])
        company.followers = sum(a.step == step for a in attempts) - 1
        try:
            attempts[now].step = next(attempts[now].turns)
        except StopIteration as end:
            status = max(status, end.value)
            del attempts[now]
        if Run.stopping():  # those that have not begun do not; the others save a checkpoint at their next turn
            status = INTERRUPTED
            for unbegun in [a for a in attempts if a.step in (-1, None)]:
                unbegun.turns.close()
                attempts.remove(unbegun)
    return status


def attempt(stage: Stage, folder: Path, company: Company) -> Generator[int | None, None, int]:
    """Execute a run, turn by turn -> its exit status."""
    run = Run.at(folder) if ranks.leads() else Follower.at(folder)
    with run.lock(wait=True):
        if ranks.of_the_leader(run.done):
            return 0
        _write_to(run, company)
        try:
            config = validate(stage.schema, run.config, str(folder / "config.yaml"))
            run.open(config, company)
            for step in stage.execute(config, run) or ():
                with run.paused():
                    yield step
                _write_to(run, company)
        except Interrupted:
            print("interrupted; the next start goes on from here")
            return INTERRUPTED
        except Exception as error:
            if ranks.count() > 1 and run.stop_requested:  # another rank has left already and closed its connection
                print(f"interrupted while waiting for another process: {error}", file=sys.stderr)
                return INTERRUPTED
            traceback.print_exc()
            run.fail(reason(error), diverged=error.step if isinstance(error, Diverged) else None)
            return 1
    return 0


def reason(error: Exception) -> str:
    """Why a run failed, for the launcher's table."""
    if isinstance(error, ConfigError):
        return str(error)
    said = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]  # a library may give its reason in line two
    if isinstance(error, OSError) and error.errno in UNWRITABLE and isinstance(error.filename, str | Path):
        place = Path(error.filename).absolute()
        if name := next((name for name, folder in library_folders() if folder in place.parents), None):
            said += f"\nset {name} to a folder that can be written"
    return said


def library_folders() -> list[tuple[str, Path]]:
    """Folders outside the runs that libraries write to, and the variables that move them."""
    home, temporary = Path(os.path.expanduser("~")), os.environ.get("TMPDIR")
    folders = [("HF_HOME", Path(os.environ.get("HF_HOME") or home / ".cache/huggingface").absolute())]
    folders += [("TMPDIR", Path(temporary))] if temporary else []
    return folders + [("HOME", home / name) for name in (".cache", ".config", ".triton")]


def _write_to(run: Run, company: Company) -> None:
    """Send this process's output, and that of its libraries, to the run's log; a follower's errors only."""
    if company.in_hand is run:
        return
    company.in_hand = run
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(run.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY) if not run.leads else file, 1)
    os.close(file)


def leave(status: int) -> NoReturn:
    """End the process as Python does, but do not take torch and transformers apart object by object: that is 2 s."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # waits for threads, as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    die_with_parent() if sys.platform == "linux" else watch_parent()  # torchrun's ranks would outlive it
    status = main(sys.argv[1:])
    sys.exit(status) if ranks.count() > 1 else leave(status)
