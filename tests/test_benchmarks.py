"""What benchmarks stand on: their processes, and the arithmetic behind their tables."""

import os
import sys

import measure


def test_a_side_finds_this_code_and_what_its_parent_finds(tmp_path, monkeypatch):
    """A real process: on a machine where packages are only on PYTHONPATH, it must not be lost."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "carried_along.py").write_text("VALUE = 7\n")
    script = tmp_path / "side.py"
    script.write_text(
        "import json, sys, carried_along, undo.config.files\n"
        "for line in ['noise', '@measure {\"ready\": 1}']: print(line)\n"
        "for _ in sys.stdin: print('@measure', json.dumps({'value': carried_along.VALUE}), flush=True)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with measure._worker("case", "ours", measure.Side(ours=True)) as worker:
        assert measure._ask(worker) == {"value": 7}
