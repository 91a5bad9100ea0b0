"""The worker: the process that a job starts. It executes runs of one stage, one after the other.

python -m undo.experiments.worker undo.unlearn.stage RUN...
"""

import atexit
import errno
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final, NoReturn

from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.launch.nanny import die_with_parent, watch_parent
from undo.runs import ranks
from undo.runs.directory import INTERRUPTED, Diverged, Interrupted
from undo.runs.run import Follower, Run
from undo.train.stage import Stage

LONGEST: Final = 300  # characters of a reason; the log has the rest
UNWRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str]) -> int:
    """arguments: the module that holds the stage, then the runs' folders. Returns the exit status of `work`."""
    module, *folders = arguments
    return work(import_module(module).STAGE, [Path(folder) for folder in folders])


def work(stage: Stage, folders: Sequence[Path]) -> int:
    """Execute runs one after the other. A run that fails is recorded as failed, and the next one starts.

    For a run on several devices each process does this, but only the leader writes to the run's folder.
    """
    Run.stop_on_signals()
    status = 0
    for folder in folders:
        run = Run.at(folder) if ranks.leads() else Follower.at(folder)
        with run.lock(wait=True):
            if ranks.of_the_leader(run.done):
                continue
            _write_to(run.log, quiet=not run.leads)
            try:
                config = validate(stage.schema, run.config, str(folder / "config.yaml"))
                run.open(config)
                stage.execute(config, run)
            except Interrupted:
                print("interrupted; the next start goes on from here")
                return INTERRUPTED
            except Exception as error:
                if ranks.count() > 1 and run.stop_requested:  # another rank has left already and closed its connection
                    print(f"interrupted while waiting for another process: {error}", file=sys.stderr)
                    return INTERRUPTED
                traceback.print_exc()
                run.fail(reason(error), diverged=error.step if isinstance(error, Diverged) else None)
                status = 1
        if run.stop_requested:
            return INTERRUPTED
    return status


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


def _write_to(log: Path, quiet: bool) -> None:
    """Send this process's output, and that of its libraries, to the log of the run in hand; if quiet, errors only."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY) if quiet else file, 1)
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
