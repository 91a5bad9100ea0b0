"""The README's example of a new method, taken from the README, in a copy of the package: one file and one name."""

import os
import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT, run_script
from tests.settings.test_pipeline import SMALL


def test_a_new_method_is_one_file_and_one_name(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "class GradAscent(Method)" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    package = tmp_path / "src/undo"
    shutil.copytree(ROOT / "src/undo", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods/gradascent.py").write_text(example)
    union = package / "methods/__init__.py"
    text = union.read_text()
    union.write_text(
        text.replace("GradDiff | MaxEnt", "GradAscent | GradDiff | MaxEnt").replace(
            "from undo.unlearn.graddiff", "from undo.methods.gradascent import GradAscent\nfrom undo.methods.graddiff"
        )
    )
    environment = {"PYTHONPATH": str(package.parent)}
    files = [str(ROOT / "tests" / name) for name in ("test_methods.py", "test_steps.py")]
    properties = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-k", "GradAscent", *files],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert properties.returncode == 0, properties.stdout
    assert re.search(r"\b16 passed", properties.stdout), properties.stdout

    runs = tmp_path / "runs"
    reference = ["--only", "reference*"]
    assert run_script("run_all.py", "demo", *SMALL, "--runs", str(runs), *reference, **environment).returncode == 0
    small = [text.removeprefix("unlearn.") for text in SMALL if text.startswith("unlearn.")]
    only = ["--only", "*lr_1e-03*", "sweep.seed=[0]"]
    command = ["run_unlearn.py", "demo", "method.name=gradascent", 'variant="gradascent"', *small, *only]
    done = run_script(*command, "--runs", str(runs), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = (runs / "demo/unlearn/gradascent-lr_1e-03-seed_0/metrics.jsonl").read_text()
    assert '"loss/forget": -' in records
