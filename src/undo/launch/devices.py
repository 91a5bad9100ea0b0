"""The devices of this machine, and slots on them that several launchers share without overbooking."""

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from undo.config.mistakes import ConfigError
from undo.launch.jobs import DeviceShare


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES: indices, UUIDs or MIG names."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() and name.strip() != "-1"]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.split()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Slot:
    """A share of devices. It is held by one open lock file per device, and so by whoever inherits the descriptors."""

    def __init__(self, devices: Sequence[str], files: Sequence[int]) -> None:
        self.device = ",".join(dict.fromkeys(devices))  # as CUDA_VISIBLE_DEVICES has them, or cpu
        self.files = tuple(files)

    def release(self) -> None:
        for file in self.files:
            os.close(file)


def take_slot(share: DeviceShare, gpus: Sequence[str], folder: Path | None = None) -> Slot | None:
    """A free share of as many devices as are wanted, or None. All launchers of a user see the same lock files,
    so that they never overbook a device.

    A device takes one more run only if neither the newcomer's limit nor that of any run on it is exceeded.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"undo-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    limit = share.runs_per_gpu if gpus else max(1, cores() // share.threads)
    devices, files = list[str](), list[int]()
    with _alone(folder / "several.guard") if share.devices > 1 else contextlib.nullcontext():  # or two have half each
        for device in gpus or ["cpu"] * share.devices:
            with _alone(folder / f"{_file_name(device)}.guard"):
                file = _take_one_of(folder, device, limit)
            if file is not None:
                devices.append(device)
                files.append(file)
            if len(files) == share.devices:
                return Slot(devices, files)
        for file in files:
            os.close(file)
    return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with open(path, "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _take_one_of(folder: Path, device: str, limit: int) -> int | None:
    """The descriptor of a lock file of the device."""
    used, strictest, free = 0, limit, None
    present = len(list(folder.glob(f"{_file_name(device)}.slot-*")))  # another launcher may have allowed more of them
    for index in range(max(limit, present)):
        file = os.open(folder / f"{_file_name(device)}.slot-{index}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            used += 1
            strictest = min(strictest, int(os.pread(file, 16, 0) or b"1"))
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
    os.pwrite(free, str(limit).encode(), 0)
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
    if not gpus and share.devices * share.threads > cores():
        several = f"execution.devices={share.devices} with " * (share.devices > 1)
        raise ConfigError(f"{several}execution.threads={share.threads}, but this machine has {cores()} cores")
