"""The house: imports run down only, no module stands in a circle, and each says in its first line what it is about."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "src/undo"
FLOORS = (  # from the ground up; rooms of one floor do not know each other
    ("config",),
    ("lm", "runs", "corrupt"),
    ("losses", "data", "launch"),
    ("evaluate",),
    ("train", "results"),
    ("prepare_data", "prepare_models", "unlearn", "distill", "attacks", "experiments", "report"),
    ("settings",),
    ("api",),
    ("__init__", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEUTRAL = ("settings", "prepare_data", "evaluate", "report")  # whoever else knows a setting by its name
LONGEST = 400  # lines


def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """All modules of the package that a file imports: at its top, in its functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
        else:
            continue
        for name in names:
            while name.startswith("undo.") and name not in MODULES:
                name = name.rpartition(".")[0]
            if name.startswith("undo."):
                yield name


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module):
    assert room(module) in FLOOR, f"{module} is in no room of FLOORS"
    for other in imported(MODULES[module]):
        if room(other) != room(module):
            assert FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other}, which is not below it"


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_module_stands_in_a_circle():
    found = circle({module: set(imported(path)) - {module} for module, path in MODULES.items()})
    assert found is None, " -> ".join(found or ())
    assert circle({"a": {"b"}, "b": {"a"}, "c": set()}) is not None  # what it would say


@pytest.mark.parametrize("module", MODULES)
def test_a_file_has_one_subject_and_says_it(module):
    text = MODULES[module].read_text()
    first = ast.get_docstring(ast.parse(text)) or ""
    holds = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    says = first or (ast.get_docstring(holds[0]) if holds else "")
    assert says, f"{module} does not say what it is about"
    assert len(text.splitlines()) <= LONGEST, f"{module} is longer than {LONGEST} lines"
    assert MODULES[module].stem not in ("utils", "helpers", "common", "base", "misc")


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) not in NEUTRAL])
def test_settings_are_known_at_the_top_only(module):
    """In code and in what it prints; docstrings and comments may say where a value comes from."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""  # a docstring
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("command", "Stage"):
            node.args = []  # the name of a script, in a message; the example that a stage's --help prints
    code = ast.unparse(tree).lower().replace("undo_paper_wmdp", "")  # a preset: the paper's values
    for word in ("korean", "wmdp", "tofu"):
        assert word not in code, f"{module} knows {word!r}"


@pytest.mark.parametrize("script", sorted(ROOT.glob("run_*.py")), ids=lambda path: path.name)
def test_a_script_is_a_docstring_and_a_call(script):
    docstring, *rest = ast.parse(script.read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert [type(node) for node in rest] == [ast.ImportFrom, ast.If]


def test_the_command_line_imports_no_torch():
    heavy = ("torch", "transformers", "datasets", "matplotlib", "numpy", "rich")
    code = f"""
import sys
from undo.settings.command import STAGES
from undo.settings import publish, whole, wmdp
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
