"""One process imports what the jobs need, and forks each of them: a job starts in milliseconds, not after seconds.

    python -m undo.launch.template SOCKET LAUNCHER BLANK NAME...

The launcher asks for a job over the socket, with its standard input, its log and the locks of its devices as
descriptors. The template forks a nanny, which becomes the launcher's own child, as one that it had started itself. The
nanny forks the job when the launcher says that it knows it. So a template may die at any moment: it takes nothing with
it, and what was not begun is started afresh.

A forked job is as a fresh one: the template has the environment of its jobs but for the devices that they see, and ends
itself if an import has started a thread or touched a GPU. Linux only.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import IO, Final, NoReturn

from undo.launch import nanny

DEVICES: Final = "CUDA_VISIBLE_DEVICES"
CARDS: Final = ("/dev/nvidia", "/dev/nvmap", "/dev/kfd", "/dev/dri", "/dev/dxg")
BYTES, FILES = 1 << 20, 253  # of one request: more than the kernel takes
ROOM: Final = 4096  # bytes of a job's command line that ps can show
LOST: Final = 256  # instead of a status: the job was not begun. No process ends with it


# --- the launcher's end --------------------------------------------------------------------------------------------


class Forked:
    """The nanny of a job that was asked for, like a subprocess.Popen. Our own child as soon as its id is known."""

    def __init__(self, template: "Template", stdin: int) -> None:
        self.stdin: IO[bytes] = os.fdopen(stdin, "wb", buffering=0)
        self.returncode: int | None = None
        self._template = template
        self._child: nanny.Child | None = None

    def poll(self) -> int | None:
        """Its status, LOST if it will never be one, None as long as neither is known."""
        if self._child is None:
            self._template.look()
        if self._child is not None:
            self.returncode = self._child.poll()
        elif not self._template.alive:
            self.returncode = LOST
        return self.returncode

    def wait(self) -> int:
        while (status := self.poll()) is None:
            self._template.wait(0.05)
        return status

    def terminate(self) -> None:
        if self._child is not None:
            self._child.terminate()

    def begin(self, pid: int) -> None:
        """Let it fork its job. Raises ChildProcessError if it is not ours; it ends when its standard input closes."""
        child = nanny.Child(pid)
        child.poll()
        self._child = child
        with suppress(BrokenPipeError):  # it was killed
            self.stdin.write(b"\n")


class Template:
    """A template as the launcher sees it. Without names to import there is none, and nothing is alive."""

    def __init__(self, names: Collection[str], environment: Mapping[str, str]) -> None:
        self._names, self._environment = frozenset(names), without_devices(environment)
        self._asked = dict[int, Forked]()  # of which we have heard nothing yet
        self._number = 0
        self.alive = bool(names)
        if not names:
            return
        nanny.adopt_orphans()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid()), " " * ROOM, *names],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what fails here fails again in a fresh process, which has a log
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def serves(self, names: Collection[str], environment: Mapping[str, str]) -> bool:
        """Whether it can fork a process that needs these names, in this environment."""
        return self.alive and self._names.issuperset(names) and self._environment == without_devices(environment)

    @property
    def idle(self) -> bool:
        """Whether it has done all that it was asked for."""
        return not self._asked

    def fork(self, command: Sequence[str], names: Sequence[str], devices: str, files: Sequence[int]) -> Forked:
        """Ask for `python -m MODULE ...`. `files`: its log, and the locks of its devices.

        Raises OSError if that is too much for one request, or the template gone.
        """
        stdin, ours = os.pipe()
        forked = Forked(self, ours)
        self._number += 1
        request = json.dumps([self._number, command, devices, names]).encode()
        try:
            socket.send_fds(self._socket, [request], [stdin, *files])
        except OSError:
            forked.stdin.close()
            raise
        finally:
            os.close(stdin)
        self._asked[self._number] = forked
        return forked

    def look(self) -> None:
        """Hear what has been forked."""
        try:
            while self.alive and (answer := self._socket.recv(BYTES)):
                number, pid = json.loads(answer)
                self._asked.pop(number).begin(pid)
        except BlockingIOError:
            return
        except (ChildProcessError, ConnectionError):  # the kernel gives orphans to another; it is gone
            pass
        self.close()

    def wait(self, seconds: float) -> None:
        """Sleep, but wake when a job has been forked."""
        select.select([self._socket] if self.alive and self._asked else [], [], [], seconds)

    def close(self) -> None:
        """End it, at once. Nothing that it has forked ends with it."""
        if self.alive:
            self.alive = False
            self._process.kill()
            self._process.wait()
            self._socket.close()
            nanny.adopt_orphans(False)


def without_devices(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != DEVICES}


# --- the process itself --------------------------------------------------------------------------------------------


def main(descriptor: str, launcher: str, _: str, *names: str) -> NoReturn:
    nanny.die_with_parent(int(launcher))
    serve(socket.socket(fileno=int(descriptor)), list(names))


def serve(launcher: socket.socket, missing: list[str]) -> NoReturn:
    """Import one name after the other, and fork each job when it has its own. Whatever fails ends the template."""
    gc.disable()  # importing takes a sixth less
    waiting = list[Request]()
    while True:
        if missing:
            resolve_name(missing.pop(0))
        for request in [request for request in waiting if not request.names.intersection(missing)]:
            waiting.remove(request)
            fork(request, launcher, [file for other in waiting for file in other.files])
        waiting += received(launcher, wait=not missing)


@dataclass(frozen=True)
class Request:
    number: int
    command: list[str]
    devices: str
    names: frozenset[str]
    files: list[int]  # standard input, log, locks


def received(launcher: socket.socket, wait: bool) -> list[Request]:
    """The next request, if there is one."""
    if not wait and not select.select([launcher], [], [], 0)[0]:
        return []
    text, files, _, _ = socket.recv_fds(launcher, BYTES, FILES, socket.MSG_CMSG_CLOEXEC)
    if not text:  # the launcher has gone
        os._exit(0)
    number, command, devices, names = json.loads(text)
    return [Request(number, command, devices, frozenset(names), files)]


def fork(request: Request, launcher: socket.socket, others: Sequence[int]) -> None:
    """Fork a nanny whose parent, a process in between, ends, so that it becomes the launcher's child; tell its id.

    `others`: descriptors of other jobs, which this one must not hold.
    """
    reader, writer = os.pipe()
    gc.freeze()
    between = os.fork()
    if not between:
        pid = os.fork()
        if pid:
            os.write(writer, b"%d" % pid)
            os._exit(has_touched_a_gpu())
        for file in (launcher.fileno(), reader, writer, *others):
            os.close(file)
        watch_over(request)
    for file in (writer, *request.files):
        os.close(file)
    _, status = os.waitpid(between, 0)
    if status or len(os.listdir("/proc/self/task")) > 1:
        os._exit(1)
    launcher.send(json.dumps([request.number, int(os.read(reader, 20))]).encode())
    os.close(reader)


def has_touched_a_gpu() -> bool:
    """Whether the parent of this process has, after which no CUDA works in it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        return True
    files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return any(os.path.realpath(file).startswith(CARDS) for file in files)


def watch_over(request: Request) -> NoReturn:
    """Be the job's nanny."""
    os.setsid()
    stdin, log, *locks = request.files
    for file, number in ((stdin, 0), (log, 1), (log, 2)):
        os.dup2(file, number)
    os.close(stdin)
    os.close(log)
    rename([sys.executable, nanny.__file__, *request.command])
    if not os.read(0, 1):  # the launcher never knew of us
        os._exit(0)
    os._exit(nanny.watch(lambda: fork_job(request, locks)))


def fork_job(request: Request, locks: Sequence[int]) -> nanny.Child:
    """Returns in the nanny. The job ends as any program does, by an exception that nothing here stops."""
    me = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the nanny's handler is not the job's
    pid = os.fork()
    if not pid:
        nanny.die_with_parent(me)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        for lock in locks:
            os.close(lock)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.environ[DEVICES] = request.devices
        run(request.command)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    return nanny.Child(pid)


def run(command: Sequence[str]) -> NoReturn:
    """Do what a fresh process does with this command line, `python -m MODULE ...`."""
    rename(command)
    gc.enable()
    atexit.register(gc.unfreeze)  # else libraries complain at the end of what they take for leaks
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed()  # each process draws its own, and only Python sees to that by itself
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    _, _, module, *arguments = command
    sys.argv = ["-m", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


def rename(command: Sequence[str]) -> None:
    """Let ps show this command line, as far as that of the template has room: it lies in memory of our own."""
    with open("/proc/self/stat", "rb") as file:
        start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])  # arg_start and arg_end of proc(5)
    text = b"\0".join(map(os.fsencode, command))
    if start:
        ctypes.memmove(start, text[: end - start - 1].ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
