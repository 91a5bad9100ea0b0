"""Tables and figures of runs that are partly damaged, and of runs where nothing can be written."""

import pytest

from tests.made_up import World
from undo.config.mistakes import ConfigError
from undo.settings.publish import publish


@pytest.fixture
def world(tmp_path) -> World:
    world = World(tmp_path / "runs", setting="demo")
    world.run("pretrain/reference-seed_0", "reference")
    for seed in range(4):
        world.model(f"unlearn/maxent-seed_{seed}", "unlearned", 0.8, seed=seed, method={"name": "maxent"})
    return world


def test_damaged_runs_are_left_out_and_named_and_the_rest_is_drawn(world, tmp_path, capsys):
    runs = world.folder / "demo"
    (runs / "unlearn/maxent-seed_1/run.json").write_text("{")
    (runs / "unlearn/maxent-seed_2/config.yaml").write_text("\t")
    with open(runs / "relearn/unlearned-3/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": \n')
    with open(runs / "pretrain/reference-seed_0/metrics.jsonl", "a") as file:
        file.write("\0" * 40 + "\n")
    (tmp_path / "demo").mkdir()
    publish(tmp_path / "demo", world.folder)
    printed, report = capsys.readouterr().out, (runs / "report.md").read_text()
    left_out = [line for line in printed.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 4
    for damaged in (
        "unlearn/maxent-seed_1/run.json: is damaged",
        "unlearn/maxent-seed_2/config.yaml: is damaged",
        "relearn/unlearned-3/metrics.jsonl line 5: is damaged",
        "pretrain/reference-seed_0/metrics.jsonl line 2: is damaged",
    ):
        assert any(str(runs / damaged) in line for line in left_out), damaged
        assert str(runs / damaged) in report
    assert [line.split(",")[:2] for line in (runs / "summary.csv").read_text().splitlines()[1:]] == [["unlearned", "0"]]
    (runs / "unlearn/maxent-seed_0/run.json").write_text("")
    for seed in range(4):
        (runs / f"relearn/unlearned-{seed}/run.json").write_text("null")
    (runs / "unlearn/maxent-seed_3/run.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no finished run; 9 cannot be read, as"):
        publish(tmp_path / "demo", world.folder)


@pytest.mark.parametrize("where", [None, "out"])
def test_what_cannot_be_written_asks_for_another_place(world, tmp_path, where):
    place = world.folder / "demo" if where is None else tmp_path / where
    place.mkdir(exist_ok=True)
    (place / "summary.csv.partial").mkdir()  # as in a folder that is read-only; root may write everywhere
    (tmp_path / "demo").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be written .*\nchoose another place with --out"):
        publish(tmp_path / "demo", world.folder, out=None if where is None else place)
    publish(tmp_path / "demo", world.folder, out=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/report.md").exists()
