"""The devices of this machine, and slots on them that several launchers share without overbooking."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from undo.config.files import open_lock
from undo.config.mistakes import ConfigError
from undo.launch.jobs import DeviceShare

NONE: Final = ("-1", "NoDevFiles")  # the latter is Slurm's word
DRIVERS: Final = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvmap", "/dev/dxg", "/dev/kfd")  # NVIDIA, Jetson, WSL, AMD


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES: indices, UUIDs or MIG names."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", *NONE)]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.split()


def cores() -> Sequence[int]:
    """The numbers of the cores that this process may use: taskset, Slurm and Docker give each their own."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


class Slot:
    """A share of devices. It is held by one open lock file per device, and so by whoever inherits the descriptors."""

    def __init__(self, devices: Sequence[str], files: Sequence[int]) -> None:
        self.device = ",".join(dict.fromkeys(devices)) or "cpu"  # as CUDA_VISIBLE_DEVICES has them
        self.files = tuple(files)

    def release(self) -> None:
        for file in self.files:
            os.close(file)


def take_slot(share: DeviceShare, gpus: Sequence[str], folder: Path | None = None, holder: str = "") -> Slot | None:
    """A free share of as many devices as are wanted, or None. All launchers of a user see the same lock files,
    so that they never overbook a device. Without GPUs a device is `threads` cores, each of them this run's alone.

    A GPU takes one more run only if neither the newcomer's limit nor that of any run on it is exceeded. `holder` is
    what `taken` tells those who wait. Raises ConfigError where locks cannot be kept.
    """
    wanted, limit = (share.devices, share.runs_per_gpu) if gpus else (share.devices * share.threads, 1)
    if not wanted:
        return Slot([], [])
    places, files = list[str](), list[int]()
    with _locks(folder) as folder, _alone(folder / "several.guard", wanted > 1):  # or two have half each
        for place in _places(gpus):
            with _alone(folder / f"{_file_name(place)}.guard"):
                file = _take_one_of(folder, place, limit, holder)
            if file is not None:
                places.append(place)
                files.append(file)
            if len(files) == wanted:
                return Slot(places if gpus else [], files)
        for file in files:
            os.close(file)
    return None


def taken(gpus: Sequence[str], folder: Path | None = None) -> list[str]:
    """Which devices are in use, and who has them: "core 1 is taken by /runs/demo/pretrain/reference-seed_0"."""
    found = []
    with _locks(folder) as folder:
        for place in _places(gpus):
            for path in sorted(folder.glob(f"{_file_name(place)}.slot-*")):
                with open(path) as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        name = f"GPU {place}" if gpus else place.replace("-", " ")
                        found.append(f"{name} is taken by {file.read().partition(' ')[2]}")
    return found


def _places(gpus: Sequence[str]) -> Sequence[str]:
    return gpus or [f"core-{number}" for number in cores()]


@contextlib.contextmanager
def _locks(folder: Path | None) -> Iterator[Path]:
    """The folder of the lock files. Raises ConfigError, also for what goes wrong with them, with the way out."""
    try:
        folder = folder or Path(tempfile.gettempdir()) / f"undo-slots-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(errno.EACCES, "it belongs to another user")
        yield folder
    except OSError as error:
        raise ConfigError(
            f"{folder or 'the folder for temporary files'}: locks of devices cannot be kept there "
            f"({error.strerror or error})\nset TMPDIR to a folder of your own on a local disk"
        ) from None


@contextlib.contextmanager
def _alone(path: Path, needed: bool = True) -> Iterator[None]:
    if not needed:
        yield
        return
    with open_lock(path) as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _take_one_of(folder: Path, device: str, limit: int, holder: str) -> int | None:
    """The descriptor of a lock file of the device."""
    used, strictest, free = 0, limit, None
    present = len(list(folder.glob(f"{_file_name(device)}.slot-*")))  # another launcher may have allowed more of them
    for index in range(max(limit, present)):
        file = os.open(folder / f"{_file_name(device)}.slot-{index}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            used += 1
            strictest = min(strictest, int(os.pread(file, 16, 0).partition(b" ")[0] or b"1"))
            os.close(file)
            continue
        if free is None:
            free = file
        else:
            os.close(file)
    if free is None:
        return None
    if used >= strictest:
        os.close(free)
        return None
    os.truncate(free, 0)
    os.pwrite(free, f"{limit} {holder}".encode(errors="replace"), 0)
    return free


def _file_name(device: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in device)


def check_devices(share: DeviceShare) -> None:
    """Raises ConfigError if a run wants more devices than there are, since it would wait forever."""
    gpus = visible_gpus()
    if gpus and share.devices > len(gpus):
        raise ConfigError(
            f"execution.devices={share.devices}, but {len(gpus)} GPUs are visible: {', '.join(gpus)}\n"
            f"take fewer devices, or name more in CUDA_VISIBLE_DEVICES"
        )
    if not gpus and share.devices * share.threads > len(cores()):
        several = f"execution.devices={share.devices} with " * (share.devices > 1)
        raise ConfigError(f"{several}execution.threads={share.threads}, but it may use {len(cores())} cores")


def check_card() -> None:
    """Raises ConfigError if CUDA_VISIBLE_DEVICES names GPUs on a machine that has not even a driver for one."""
    if (named := visible_gpus()) and not shutil.which("nvidia-smi") and not any(map(os.path.exists, DRIVERS)):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={','.join(named)}, but this machine has no GPU\n"
            f"to compute on the CPU, set it to nothing: CUDA_VISIBLE_DEVICES="
        )
