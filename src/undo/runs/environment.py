"""Where and with what a run was executed: device, threads, peak memory, versions, git revision."""

import platform
import resource
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from undo.config.checkout import CHECKOUT
from undo.runs import precision, ranks


def environment() -> dict[str, Any]:
    """Where and with what a run was executed. Peak memory is that of the process, including earlier runs in it;
    with several devices it is the leader's."""
    device, peak = precision.cpu()["name"], None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "device": device,
        "cpu": precision.cpu(),  # rounding, and so every number after it, depends on its instruction sets
        "devices": ranks.count(),
        "threads": torch.get_num_threads() if torch is not None else 1,
        "peak_rss_bytes": rss,
        "peak_device_bytes": peak,
        "git_revision": git_revision(),
        "versions": {
            "python": platform.python_version(),
            "undo": own_version(),
            **{package: version(package) for package in ("torch", "transformers")},
        },
    }


@cache
def own_version() -> str:
    """The version of this code: that of the installed package, or of the checkout where none is installed."""
    try:
        return version("undo")
    except PackageNotFoundError:
        if CHECKOUT is None:  # a folder that was copied from somewhere
            return "unknown"
        return tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@cache
def git_revision() -> str | None:
    """The git revision of this code, with a + if tracked files have changed; None outside a checkout."""
    if CHECKOUT is None:
        return None
    try:
        git = ["git", "-C", str(CHECKOUT)]
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changed else "")
