"""What is known to be wrong is said by --dry-run, and refused by the command, before anything is written."""

import json
from pkgutil import resolve_name

import pytest

from tests.conftest import ROOT
from undo.config.mistakes import ConfigError
from undo.config.sweep import parse_overrides
from undo.experiments import cli
from undo.experiments.check import jobs, refusals
from undo.experiments.plan import plan, sources
from undo.runs.run import Run
from undo.settings import whole
from undo.settings.stages import STAGES


@pytest.fixture
def run_all(tmp_path, monkeypatch, capsys):
    """`run_all.py` with these arguments -> what it prints, or the reason why it refuses."""

    def called(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["run_all.py", *arguments, "--runs", str(tmp_path / "runs")])
        try:
            assert whole.main() == 0
        except ConfigError as error:
            return f"error: {error}"
        finally:
            assert not (tmp_path / "runs").exists()
        return capsys.readouterr().out

    return called


@pytest.fixture
def own(tmp_path):
    """Two files of text, and a folder with no more of a tokenizer than its vocabulary."""
    for name in ("one", "two"):
        lines = (json.dumps({"text": f"{name}: document {i}, " + "word " * 50}) + "\n" for i in range(400))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "tokenizer").mkdir()
    facts = {"model": {"vocab": {"a": 0, "b": 1, "<eos>": 2}}, "added_tokens": [{"content": "<eos>"}, {"content": "+"}]}
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(facts))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((), None),
        (("prepare.data.forget.path={own}/gone.jsonl",), "data.forget: {own}/gone.jsonl: there is no such file"),
        (("prepare.data.forget.path={own}",), "data.forget: {own}: is a folder; give its files, as in {own}/*.jsonl"),
        (("prepare.data.forget.path={own}/one.jsonl",), "data.retain and data.forget are the same text"),
        (("prepare.data.forget.column=body",), "data.forget: {own}/two.jsonl line 1: has no column 'body'"),
        (("prepare.validation_share=1e-6",), "data.retain: no document of 50 tokens or more of"),
        (("prepare.tokenizer={own}/none",), "tokenizer '{own}/none' is neither a folder with a tokenizer nor a hub id"),
        (
            ("prepare.tokenizer={own}/tokenizer", "pretrain.model.vocab_size=2"),
            "pretrain/reference-seed_0: prepare/data has a vocabulary of 3, the model only 2",
        ),
    ],
)
def test_a_dry_run_says_what_the_command_would_refuse(run_all, own, changes, said):
    data = [
        f"prepare.data.{role}={{path: '{own}/{name}.jsonl'}}" for role, name in (("retain", "one"), ("forget", "two"))
    ]
    asked = ["language_small", *data, *(change.format(own=own) for change in changes)]
    listed = run_all(*asked, "--dry-run")
    assert "prepare/data" in listed  # the runs are shown all the same
    if said is None:
        assert "would be refused" not in listed
    else:
        assert f"would be refused: {said.format(own=own)}" in listed
        assert f"error: {said.format(own=own)}" in run_all(*asked)


def test_a_dry_run_names_a_few_reasons_and_counts_the_others(run_all):
    listed = run_all("demo", "--dry-run", "pretrain.model.vocab_size=100")
    lines = [line for line in listed.splitlines() if line.startswith("would be refused: ")]
    assert len(lines) == 4
    assert lines[-1].endswith(" more")


def test_a_dry_run_knows_a_run_that_was_made_with_other_values(tmp_path, monkeypatch, capsys):
    """As after an upgrade that changed a default: what is done differs, and the first difference is named."""

    def asked(*arguments: str) -> list[str]:
        return ["demo", "--only", "pretrain/reference*", "--runs", str(tmp_path), *arguments]

    def says(*arguments: str) -> dict[str, str]:
        monkeypatch.setattr("sys.argv", ["run_all.py", *asked(*arguments), "--dry-run"])
        assert whole.main() == 0
        lines = capsys.readouterr().out.splitlines()
        states = {line.split()[0]: line for line in lines[1:3]}
        found = {name: next(s for s in ("done", "to do", "differs") if s in line) for name, line in states.items()}
        return found | {"refused": "\n".join(line for line in lines if "would be refused" in line)}

    assert says() == {"prepare/data": "to do", "pretrain/reference-seed_0": "to do", "refused": ""}
    runs, _ = whole.planned(cli.parser("", "").parse_intermixed_args(asked()))
    for run in runs:
        made = Run.at(run.directory.folder)
        made.claim(run.config)
        made.open(run.config)
        made.finish(vocab_size=448)
    assert says() == {"prepare/data": "done", "pretrain/reference-seed_0": "done", "refused": ""}
    other = says("pretrain.training.steps=7")
    assert other["pretrain/reference-seed_0"] == "differs"
    assert "exists with another config: training.steps: 500 -> 7" in other["refused"]
    assert says("pretrain.training.steps=7", "--force")["refused"] == ""
    older = says("prepare.length=16")
    assert (older["prepare/data"], older["pretrain/reference-seed_0"]) == ("differs", "done")
    facts = json.loads((tmp_path / "demo/prepare/data/run.json").read_text())
    (tmp_path / "demo/prepare/data/run.json").write_text(json.dumps(facts | {"identity": "made anew"}))
    assert says()["pretrain/reference-seed_0"] == "differs"


def test_what_a_process_of_a_stage_needs_can_be_imported_and_is_said_of_those_that_may_be_forked(tmp_path):
    """The launcher starts afresh what it can't fork, and says nothing: a wrong name would be seen in time alone."""
    for stage in STAGES.values():
        assert all(map(resolve_name, stage.imports))
    found = sources(ROOT / "configs/demo", "pretrain")
    for overrides, start, needs in (
        ({}, "fork", ("undo.prepare_models.pretrain", *STAGES["pretrain"].imports)),
        ({}, "fresh", ()),
        ({"execution.devices": 2}, "fork", ()),
    ):
        planned = plan(STAGES["pretrain"], found, overrides, tmp_path)
        assert [job.imports for job in jobs(planned, start)] == [needs] * 2


def test_runs_of_one_process_do_not_wait_for_each_other(tmp_path):
    """Prepare runs that share a tokenizer: the first of them makes it."""
    found = sources(ROOT / "configs/wmdp_small", "prepare")
    apart, together = (
        jobs(plan(STAGES["prepare"], found, {"execution.runs_per_process": count}, tmp_path)) for count in (1, 9)
    )
    assert [job.waits_for for job in apart if job.runs[0].name == "prepare/qa"] == [{"prepare/corpora"}]
    (job,) = together
    assert job.runs[0].name == "prepare/corpora"
    assert len(job.runs) == 5
    assert not job.waits_for


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (0, 3, 1, 4, 2, 5)])
def test_students_of_one_teacher_go_side_by_side_wherever_the_sweep_has_them(tmp_path, order):
    """The teacher follows the seed."""
    found = sources(ROOT / "configs/demo", "undo")[:1]

    def groups(**execution: int) -> list[list[list[str]]]:
        changes = {"sweep.seed": [0, 1], **{f"execution.{key}": value for key, value in execution.items()}}
        planned = plan(STAGES["undo"], found, changes, tmp_path)
        made = jobs([planned[i] for i in order])
        for job in made:
            options = [f"--together={job.together}"] if job.together > 1 else []
            assert [option for option in job.argv if "together" in option] == options
        return [[[run.folder.name for run in group] for group in job.groups] for job in made]

    def of(seed: int, *alphas: float) -> list[str]:
        return [f"undo_{alpha}-seed_{seed}" for alpha in alphas]

    assert groups() == [[of(i // 3, (0.8, 0.6, 0.4)[i % 3])] for i in order]
    assert groups(students=4) == [[of(0, 0.8, 0.6, 0.4)], [of(1, 0.8, 0.6, 0.4)]]
    assert groups(students=2) == [[of(seed, *alphas)] for seed in (0, 1) for alphas in ((0.8, 0.6), (0.4,))]
    assert groups(students=2, runs_per_process=2) == [[of(seed, 0.8, 0.6), of(seed, 0.4)] for seed in (0, 1)]


@pytest.mark.parametrize(
    "change",
    [
        "data=prepare/other",
        "mixture={retain: 0.5, forget: 0.5}",
        "training.batch_rows=16",
        "training.precision=bf16",
        "seed=1",
    ],
)
def test_students_that_read_something_else_go_apart(tmp_path, change):
    found = sources(ROOT / "configs/demo", "undo")[:1]
    changes = {"teacher": "unlearn/x", "execution.students": 4}
    one = plan(STAGES["undo"], found, changes, tmp_path)[0]
    other = plan(STAGES["undo"], found, {**changes, **parse_overrides([change])}, tmp_path)[1]
    assert len(jobs([one, other])) == 2
    same = plan(STAGES["undo"], found, {**changes, "training.steps": 7, "retain_threshold": None}, tmp_path)[1]
    assert len(jobs([one, same])) == 1


def test_students_without_a_teacher_are_refused(tmp_path):
    planned = plan(STAGES["pretrain"], sources(ROOT / "configs/demo", "pretrain"), {"execution.students": 4}, tmp_path)
    assert {str(error) for error in refusals(planned)} == {
        f"execution.students=4: {run.name} has no teacher; leave the key out" for run in planned
    }
