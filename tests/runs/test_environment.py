"""What run.json says of the code: also where the package is not installed, as on a borrowed machine."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import HANGS, ROOT

FINISH = """
import sys
from pathlib import Path
from undo.config.schema import StageConfig
from undo.runs.run import Run
run = Run(Path(sys.argv[1]), "tiny", "prepare/data")
config = StageConfig(name="data")
run.claim(config)
run.open(config)
run.finish()
"""


@pytest.fixture(scope="session")
def uninstalled(tmp_path_factory) -> Path:
    """A folder with all installed packages but this one, for a Python that looks nowhere else (-S)."""
    folder = tmp_path_factory.mktemp("packages")
    for key in ("platlib", "purelib"):
        for package in Path(sysconfig.get_path(key)).iterdir():
            link = folder / package.name
            if not link.exists() and "undo" not in package.name and package.suffix != ".pth":
                link.symlink_to(package)
    return folder


def test_a_run_ends_well_where_the_package_is_not_installed(tmp_path, uninstalled):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{uninstalled}"}
    command = [sys.executable, "-S", "-c"]
    absent = "from importlib.metadata import distributions; print({d.name for d in distributions()} & {'undo'})"
    asked = subprocess.run([*command, absent], env=environment, capture_output=True, text=True, timeout=HANGS)
    assert asked.stdout.strip() == "set()", asked.stderr
    ended = subprocess.run([*command, FINISH, tmp_path], env=environment, capture_output=True, text=True, timeout=HANGS)
    assert ended.returncode == 0, ended.stderr
    versions = json.loads((tmp_path / "tiny/prepare/data/run.json").read_text())["versions"]
    assert f'version = "{versions["undo"]}"' in (ROOT / "pyproject.toml").read_text().splitlines()
