"""bf16 is taken where the machine multiplies it fast; elsewhere a run takes fp32 and says so."""

from pathlib import Path

import pytest

from tests.conftest import SHAPE, training
from undo.config.schema import as_raw
from undo.experiments import cli
from undo.experiments.plan import PlannedRun
from undo.prepare_models.pretrain import STAGE, Pretrain
from undo.runs import precision
from undo.runs.run import Run

EPYC_7002 = "vendor_id : AuthenticAMD\nmodel name\t: AMD EPYC 7B12\nflags\t\t: fpu sse2 fma avx2 sha_ni\n\n"
SAPPHIRE_RAPIDS = "model name\t: Xeon 8480\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n\n"
GRAVITON_3 = "processor : 0\nFeatures\t: fp asimd sve bf16\n\n"


@pytest.fixture
def machine(monkeypatch):
    """A machine whose /proc/cpuinfo is the text; None: there is none."""

    def pretend(text: str | None):
        def read(path):
            if text is None:
                raise OSError
            return text * 2  # two cores

        precision.cpu.cache_clear()
        monkeypatch.setattr(Path, "read_text", read)
        try:
            return precision.cpu()
        finally:
            monkeypatch.undo()

    yield pretend
    precision.cpu.cache_clear()


def test_a_cpu_is_recorded_by_its_name_and_what_changes_its_results(machine):
    assert machine(EPYC_7002) == {"name": "AMD EPYC 7B12", "features": ["avx2"]}
    assert precision.taken("bf16") == precision.taken("fp32") == "fp32"
    assert machine(SAPPHIRE_RAPIDS)["features"] == ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    assert precision.taken("bf16") == "bf16"
    assert machine(GRAVITON_3)["features"] == ["asimd", "sve", "bf16"]
    assert precision.taken("bf16") == "fp32"
    assert machine(None)["features"] == []
    assert precision.taken("bf16") == "fp32"


def test_a_run_takes_fp32_and_says_so_in_one_line_and_in_its_record(data, machine, capsys):
    machine(EPYC_7002)
    weights, said = {}, {}
    for asked in ("fp32", "bf16"):
        config = Pretrain.model_validate(
            {
                "name": f"precision_{asked}",
                "data": "prepare/data",
                "model": as_raw(SHAPE),
                "mixture": {"retain": 1.0},
                "training": as_raw(training(steps=2, precision=asked)),
                "evaluation": {"name": "cross_entropy"},
            },
            strict=False,
        )
        run = Run(data.runs, data.setting, f"pretrain/{config.name}")
        run.claim(config)
        run.open(config)
        list(STAGE.execute(config, run) or ())
        weights[asked] = (run.model / "model.safetensors").read_bytes()
        said[asked] = [line for line in capsys.readouterr().out.splitlines() if "precision" in line]
        assert run.config["training"]["precision"] == asked
        assert run.facts["precision"] == "fp32"
        assert run.facts["cpu"]["name"] == "AMD EPYC 7B12"
        assert cli.precision_note([PlannedRun(STAGE, config, run)]) == (said[asked] or [None])[0]
    assert weights["bf16"] == weights["fp32"]
    assert said["fp32"] == []
    assert len(said["bf16"]) == 1
    assert "AVX512-BF16" in said["bf16"][0]
