"""What benchmarks stand on: their processes, and the arithmetic behind their tables."""

import os
import subprocess
import sys

import demo
import equality
import measure
import pytest

from tests.conftest import HANGS, ROOT
from undo.losses.targets import UniformKL
from undo.runs.ranks import this_process


@pytest.fixture
def small() -> equality.Asked:
    device = this_process().device
    assert device is not None
    return equality.Asked(device, small=True, vocabulary=500, tokens=40)


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


@pytest.mark.parametrize("name", equality.CHECKS)
def test_the_fast_paths_of_this_device_equal_the_formulas(name, small):
    line = equality.check(name, small)
    assert "failed" not in line
    assert line["relative_errors"]
    assert line["too_large"] == []


def test_what_is_not_equal_is_named(small, monkeypatch):
    exact = UniformKL.pull

    def wrong(*asked):
        loss, gradient = exact(*asked)
        return loss * 1.001, gradient

    monkeypatch.setattr(UniformKL, "pull", wrong)
    assert set(equality.check("losses", small)["too_large"]) == {"maxent/fp32/loss", "maxent/fp32/evaluated"}


def test_a_check_that_breaks_says_so_and_is_not_passed(small, monkeypatch):
    def broken(asked):
        yield "one", 0.0, 1.0
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(equality.CHECKS, "losses", broken)
    line = equality.check("losses", small)
    assert (line["failed"], line["relative_errors"]) == ("RuntimeError: no kernel image", {"one": 0.0})


def run(name, seconds, stepping, evaluation_seconds, flops, evaluation_flops):
    facts = {"name": name, "seconds": seconds, "evaluation_seconds": evaluation_seconds, "flops": flops}
    return facts | {"evaluation_flops": evaluation_flops, "tokens": 1000 * stepping, "tokens_per_second": 1000.0}


def test_where_the_demo_s_time_went_by_hand():
    """Two cores of 10 FLOP/s, 50 s of wall: 100 core seconds, 90 of them at work. T = (400 + 60) / 20 = 23 s."""
    runs = [
        {"name": "prepare/data", "seconds": 6.0},
        run("pretrain/a", 30.0, 22, 4.0, 200, 20),
        run("pretrain/b", 29.0, 21, 5.0, 200, 40),
    ]
    found = demo.account(runs, wall=50.0, cpu=90.0, cores=2, peak=10.0)
    assert found.limit == pytest.approx(23)
    assert [*found.parts.values()] == pytest.approx([40, 3, 6, 3, 7, 6, 25, 10])
    assert sum(found.parts.values()) == pytest.approx(100)
    assert "**wall / T = 2.17**" in (text := demo.page(found, runs, [10.0], 0.0, "demo.py"))
    assert "| pretrain | 2 | 0.0 | 93% | 59 | 73% | 15% |" in text


def test_finished_runs_say_what_the_account_asks(undisturbed):
    runs = demo.finished(undisturbed / "demo")
    found = demo.account(runs, wall=1000.0, cpu=900.0, cores=2, peak=1e9)
    assert sum(found.parts.values()) == pytest.approx(2000)
    assert 0 < found.parts["the rest of evaluation"] + found.parts["the arithmetic of evaluation, at the peak"] < 900


def test_a_step_that_fails_on_a_card_loses_nothing(tmp_path):
    """The real script with a Python that only says what it is asked, and fails in the second step."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "asked $*"\ncase "$*" in *card.py*) exit 3 ;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "check", "--small"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert ended.returncode == 1, ended.stderr
    log = (tmp_path / "out/check.log").read_text()
    assert "asked benchmarks/equality.py --small" in log
    assert [line.partition(",")[0] for line in log.splitlines()[-3:]] == [
        "equality: status 0",
        "parts: status 3",
        "tests: status 0",
    ]
