"""The documentation holds: its example of a new method runs, and its links, commands, paths and Python blocks exist."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SMALL, run_script
from undo.experiments.plan import sources

PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = "src/undo/unlearn/gradascent.py"  # the file that a reader of adding-a-method.md makes
WHOLE = ("all", "wmdp", "figures")  # what is no stage, and so needs no YAML of its own


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    """Targets of links and images, without those to other sites; code is no place for links."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http:", "https:", "#"))]


def commands(path: Path) -> list[tuple[str, str]]:
    """Every `uv run run_NAME.py SETTING` and `undo NAME SETTING` -> (NAME, SETTING)."""
    script, installed = r"\buv run run_(?=\w+\.py)", r"(?<![\w./-])undo "
    return re.findall(rf"(?:{script}|{installed})(\w+)(?:\.py)? ([a-z]\w*)\b(?![./])", path.read_text())


def paths(path: Path) -> list[str]:
    """Every file or folder of the repository that a page names from the root; one with a <placeholder> is none."""
    named_ones = re.findall(
        r"(?<![\w./-])(?:src/undo|tests|benchmarks|configs|tokens)/[\w./*<>-]*|\brun_\w+\.py\b", path.read_text()
    )
    return [name.rstrip(".") for name in named_ones if not set("<>*") & set(name)]


def test_a_new_method_is_one_file_and_one_name(undisturbed, tmp_path):
    blocks = python_blocks(ROOT / "docs/adding-a-method.md")
    (example,) = [block for block in blocks if "class GradAscent(Method)" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    package = tmp_path / "src/undo"
    shutil.copytree(ROOT / "src/undo", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / EXAMPLE).write_text(example)
    union = package / "unlearn/plain.py"
    text = union.read_text()
    union.write_text(
        text.replace("GradDiff | MaxEnt", "GradAscent | GradDiff | MaxEnt").replace(
            "from undo.unlearn.graddiff", "from undo.unlearn.gradascent import GradAscent\nfrom undo.unlearn.graddiff"
        )
    )
    environment = {"PYTHONPATH": str(package.parent)}
    files = [str(ROOT / "tests" / name) for name in ("unlearn/test_methods.py", "train/test_steps.py")]
    properties = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-k", "GradAscent", *files],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert properties.returncode == 0, properties.stdout
    assert re.search(r"\b20 passed", properties.stdout), properties.stdout

    runs = tmp_path / "runs"
    for name in ("prepare/data", "pretrain/reference-seed_0"):
        shutil.copytree(undisturbed / "demo" / name, runs / "demo" / name)
    small = [text.removeprefix("unlearn.") for text in SMALL if text.startswith("unlearn.")]
    only = ["--only", "*lr_1e-03*", "sweep.seed=[0]"]
    command = ["run_unlearn.py", "demo", "method.name=gradascent", 'variant="gradascent"', *small, *only]
    done = run_script(*command, "--runs", str(runs), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = (runs / "demo/unlearn/gradascent-lr_1e-03-seed_0/metrics.jsonl").read_text()
    assert '"loss/forget": -' in records


def test_a_new_attack_is_one_file_and_one_name(undisturbed, tmp_path):
    (example,) = [block for block in python_blocks(ROOT / "docs/attacks.md") if "class Scale(Attack)" in block]
    package = tmp_path / "src/undo"
    shutil.copytree(ROOT / "src/undo", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "attacks/scale.py").write_text(example)
    union = package / "attacks/__init__.py"
    text = union.read_text().replace("Quantise | Prune", "Quantise | Scale | Prune")
    union.write_text(text.replace("import Quantise\n", "import Quantise\nfrom undo.attacks.scale import Scale\n"))
    environment = {"PYTHONPATH": str(package.parent)}
    properties = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-k", "scaled", str(ROOT / "tests/attacks/test_attacks.py")],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert properties.returncode == 0, properties.stdout
    assert re.search(r"\b4 passed", properties.stdout), properties.stdout

    runs, setting = tmp_path / "runs", tmp_path / "demo"
    for name in ("prepare/data", "undo/undo_0.6-seed_0"):
        shutil.copytree(undisturbed / "demo" / name, runs / "demo" / name)
    setting.mkdir()
    (setting / "attack.yaml").write_text(
        "name: mine\ndata: prepare/data\nmodel: undo/undo_0.6-seed_0\nevaluation: {name: accuracy}\n"
        "before: [{name: scale, factor: 0.5}]\nattack: {name: scale, factor: 2.0}\n"
    )
    done = run_script("run_attack.py", str(setting), "--runs", str(runs), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    of = {
        name: json.loads((runs / "demo" / name / "run.json").read_text())
        for name in ("attack/mine", "undo/undo_0.6-seed_0")
    }
    assert of["attack/mine"]["attack"] == "scaled by 0.5 → scaled by 2"
    assert of["attack/mine"]["evaluation"] == of["undo/undo_0.6-seed_0"]["evaluation"]


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_python_blocks_compile(page):
    for block in python_blocks(page):
        compile(block, named(page), "exec")


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [*WRITTEN[:2], *PAGES], ids=named)
def test_links_lead_to_files(page):
    for link in links(page):
        file = page.parent / link.partition("#")[0]
        assert file.exists(), f"{named(page)} links to {link}, which is not there"
        if page in PAGES:
            assert (ROOT / "docs") in file.resolve().parents, f"{named(page)}: {link} leads out of the site"


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_commands_name_a_script_and_a_setting(page):
    for name, setting in commands(page):
        folder = ROOT / "configs" / setting
        assert (ROOT / f"run_{name}.py").is_file(), f"{named(page)} calls run_{name}.py, which is not there"
        assert folder.is_dir(), f"{named(page)} calls {name} {setting}, and there is no {folder}"
        if name not in WHOLE:
            assert sources(folder, name), f"{setting} has no stage {name}"
    for module in re.findall(r"python -m (undo[.\w]*)", page.read_text()):
        assert find_spec(module) is not None, f"{named(page)} calls {module}, which is not there"


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_paths_exist(page):
    for path in paths(page):
        assert (ROOT / path).exists() or path == EXAMPLE, f"{named(page)} names {path}, which is not there"


def test_every_page_is_in_the_menu():
    def pages(menu):
        return [menu] if isinstance(menu, str) else [p for item in menu for e in item.values() for p in pages(e)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(site["nav"])) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)


def test_what_these_tests_look_for_is_found():
    """A pattern that matches nothing would pass them all."""
    assert sum(len(python_blocks(page)) for page in WRITTEN) >= 1
    assert sum(len(links(page)) for page in WRITTEN) > 40
    found = {command for page in WRITTEN for command in commands(page)}
    assert {("all", "demo"), ("wmdp", "wmdp_cyber"), ("figures", "language_small"), ("unlearn", "demo")} <= found
    assert sum(len(paths(page)) for page in WRITTEN) > 60
