"""A small process between the launcher and a job: no process of the job outlives the launcher.

    python -S -E nanny.py COMMAND...

The launcher holds the other end of standard input. When that closes (the launcher is done with the job, or is dead),
or on SIGTERM, the job gets SIGTERM and some time to write a checkpoint, which a further SIGTERM cuts short; then all of
its descendants are killed, also those that moved to a session of their own, as torchrun's ranks do. A nanny that is
killed takes the job with it. Standard library only: this starts in 20 ms. A nanny that was forked by a template
(`template.py`) forks its job, and watches over it in the same way.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE = float(os.environ.get("UNDO_GRACE_SECONDS", "30"))  # for a checkpoint, before SIGKILL


class Child:
    """A child process that was forked, as subprocess.Popen has one that runs a program."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, signum: int) -> None:
        if self.poll() is None:  # else its id may be another's by now
            os.kill(self.pid, signum)


def main(command: list[str]) -> int:
    def start() -> "subprocess.Popen[bytes]":
        me = os.getpid()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: die_with_parent(me))

    return watch(start)


def watch(start: "Callable[[], subprocess.Popen[bytes] | Child]") -> int:
    """Start the job and stay until it and all below it have ended -> its exit status, 128 + N for signal N."""
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business
    stopping = hurried = False

    def stop(*_: object) -> None:
        nonlocal stopping, hurried
        stopping, hurried = True, stopping

    signal.signal(signal.SIGTERM, stop)
    job = start()
    while job.poll() is None and not stopping:
        readable, _, _ = select.select([0], [], [], 0.1)
        stopping = stopping or bool(readable and not os.read(0, 1))
    if job.poll() is None:
        job.terminate()
        deadline = time.monotonic() + GRACE
        while job.poll() is None and not hurried and time.monotonic() < deadline:
            time.sleep(0.05)
        job.kill()
    status = job.wait()
    kill_descendants()
    assert status is not None
    return status if status >= 0 else 128 - status


def adopt_orphans(adopt: bool = True) -> None:
    """Grandchildren whose parent dies become ours (Linux's child subreaper) and can be found and killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def die_with_parent(parent: int | None = None) -> None:
    """From now on SIGKILL for this process when the one that started it dies; `parent`: its id, if it may have died.

    Linux does that itself, for the program that this process turns into, too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def watch_parent() -> None:
    """The same where only a look now and then can tell, for this process alone."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def kill_descendants() -> None:
    """Kill descendants until none is left, since a process may fork while we look for it."""
    if sys.platform != "linux":
        return  # without /proc only the job itself is ended
    while True:
        alive = descendants(os.getpid())
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not alive:
            return
        time.sleep(0.02)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def descendants(root: int) -> list[int]:
    """All living processes below `root`, zombies left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    state, parent = file.read().rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
