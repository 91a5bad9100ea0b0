"""The installed package: the wheel holds stages and settings, and the command `undo` does what the scripts do."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_script
from undo.prepare_data.write_questions.options import parser
from undo.settings.command import BESIDE, usage
from undo.settings.stages import STAGES


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, unpacked: what an installer would put into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def undo(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m undo` as it is in the wheel, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-m", "undo", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_wheel_holds_every_setting_and_says_that_it_is_typed(installed):
    ours, theirs = (
        {path.relative_to(folder) for path in folder.rglob("*.yaml")}
        for folder in (ROOT / "configs", installed / "undo/configs")
    )
    assert ours == theirs
    assert (installed / "undo/py.typed").exists()
    entry = next(installed.glob("undo-*.dist-info")) / "entry_points.txt"
    assert "undo = undo.settings.command:main" in entry.read_text()


def test_it_plans_as_the_script_of_the_checkout_does(installed, tmp_path):
    here = run_script("run_all.py", "demo", "--dry-run", "--runs", str(tmp_path))
    there = undo(installed, tmp_path, "all", "demo", "--dry-run", "--runs", str(tmp_path))
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout
    assert "37 runs" in there.stdout


def test_it_makes_a_run_and_names_itself_in_what_it_says(installed, tmp_path):
    done = undo(installed, tmp_path, "prepare", "demo", "world.problems=800")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/demo/prepare/data/run.json").exists()
    refused = undo(installed, tmp_path, "unlearn", "demo")
    assert refused.returncode == 2
    assert "undo pretrain demo --only reference-seed_0" in refused.stderr
    assert "usage: undo unlearn " in undo(installed, tmp_path, "unlearn", "--help").stdout


def test_its_help_lists_every_stage_and_a_wrong_name_is_refused(tmp_path):
    listed = run_script("-m", "undo", "--help", cwd=tmp_path)
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.strip().startswith(tuple(STAGES))] == [
        *STAGES
    ]
    wrong = run_script("-m", "undo", "unlaern", "demo", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "there is no 'unlaern'" in wrong.stderr


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_script(name):
    assert f'call("{name}")' in (ROOT / f"run_{name}.py").read_text()


def test_help_names_every_command_line():
    source = ROOT / "src"
    mains = {".".join(path.parent.relative_to(source).parts) for path in source.rglob("__main__.py")}
    assert mains == {"undo", *BESIDE}
    assert all(f"python -m {module}" in usage() for module in BESIDE)
    assert parser().format_usage().startswith("usage: python -m undo.prepare_data.write_questions ")
