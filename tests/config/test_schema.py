"""From YAML and overrides to typed configs: what is read, what is refused, and with which words."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from undo.config.mistakes import ConfigError
from undo.config.schema import StageConfig, as_raw, differences, validate
from undo.config.sweep import expand, parse_overrides, read_yaml
from undo.experiments import cli
from undo.experiments.check import check
from undo.experiments.plan import find_configs, plan, sources
from undo.experiments.points import FILE
from undo.prepare_data.prepare import Prepare
from undo.prepare_models.pretrain import Pretrain
from undo.results.selection import RANKS
from undo.settings import whole as run_all
from undo.settings.command import WHOLE, call
from undo.settings.stages import STAGES
from undo.unlearn.stage import Unlearn

DEMO = ROOT / "configs" / "demo"
NESTED = "nested too deeply|nesting depth|flow level"  # PyYAML says so itself from 6.0.4 on
SETTINGS = sorted({path.parent for path in (ROOT / "configs").glob("*/*.yaml")})


def runs_of(stage: str, *overrides: str, path=None) -> list[StageConfig]:
    path = path or DEMO / f"{stage}.yaml"
    schema = STAGES[stage].schema
    return [validate(schema, raw, path.name) for raw in expand(read_yaml(path), parse_overrides(overrides), path.name)]


def refusal(*overrides: str, stage: str = "pretrain", setting: str = "demo") -> str:
    with pytest.raises(ConfigError) as error:
        runs_of(stage, *overrides, path=ROOT / f"configs/{setting}/{stage}.yaml")
    return str(error.value)


@pytest.mark.parametrize("folder", SETTINGS, ids=lambda p: p.name)
def test_every_config_is_valid_and_every_parent_exists(folder, tmp_path):
    ranks = {rank: {"alpha": 0.5, "learning_rate": 1e-3} for rank in RANKS}  # as if a search had chosen them
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / FILE).write_text(json.dumps({"maxent": ranks, "rmu": ranks}))
    planned = [
        run
        for name in STAGES
        if (folder / f"{name}.yaml").exists()
        for run in plan(STAGES[name], sources(folder, name), {}, tmp_path)
    ]
    names = [run.name for run in planned]
    assert len(set(names)) == len(names)
    for run in planned:
        assert set(run.config.parents()) <= set(names)
        assert all(names.index(parent) < names.index(run.name) for parent in run.config.parents())


def test_numbers_that_pyyaml_would_read_as_text():
    for text in ("3e-5", "1e3", "4E-4"):
        (run,) = runs_of("pretrain", f"training.learning_rate={text}", "training.min_learning_rate=0")[:1]
        assert run.training.learning_rate == float(text)


def test_override_beats_variant_and_sweep_and_keeps_the_other_axes():
    runs = runs_of("relearn", "training.learning_rate=3e-5", "sweep.seed=[0,1]", "mixture={forget: 1.0}")
    assert {run.training.learning_rate for run in runs} == {3e-5}
    assert {run.seed for run in runs} == {0, 1}
    assert len({run.name for run in runs}) == len(runs)


def test_a_variant_s_own_sweep_replaces_the_common_one_and_yields_to_the_command_line():
    raw = {
        "name": "{variant}-a_{a}-b_{b}",
        "sweep": {"a": [1, 2], "b": [3]},
        "variants": {"x": {}, "y": {"sweep": {"a": [7], "c.d": [8, 9]}, "name": "{variant}-{a}-{b}-{c.d}"}},
    }
    assert [run["name"] for run in expand(raw, {}, "test")] == ["x-a_1-b_3", "x-a_2-b_3", "y-7-3-8", "y-7-3-9"]
    asked = [run["name"] for run in expand(raw, {"sweep.a": [5]}, "test")]
    assert asked == ["x-a_5-b_3", "y-5-3-8", "y-5-3-9"]
    assert [run["name"] for run in expand(raw, {"a": 6, "c.d": 0}, "test")] == ["x-a_6-b_3", "y-6-3-0"]
    with pytest.raises(ConfigError, match=r"sweep\.a must be a list"):
        expand({**raw, "variants": {"z": {"sweep": {"a": 1}}}}, {}, "test")


def test_a_sweep_on_the_command_line_reaches_into_a_block_that_is_given_there():
    raw = {"name": "{method.name}-{method.rho}", "variants": {"sam": {"method": {"name": "sam", "rho": 0.1}}}}
    runs = expand(raw, {"variant": "mine", "method": {"name": "uam"}, "sweep.method.rho": [1.0, 2.0]}, "made.yaml")
    assert [run["name"] for run in runs] == ["uam-1.0", "uam-2.0"]


def test_adversaries_are_crossed_with_the_variants():
    raw = {
        "name": "{variant}-{adversary}-{rate}",
        "variants": {"sam": {"model": 1}, "undo": {"model": 2, "sweep": {"rate": [9]}}},
        "adversaries": {"short": {"data": "a"}, "long": {"data": "b", "sweep": {"rate": [3, 4]}}},
        "sweep": {"rate": [1, 2]},
    }
    found = {(r["variant"], r["adversary"], r["data"], r["model"], r["rate"]) for r in expand(raw, {}, "made.yaml")}
    sam = {("sam", a, d, 1, r) for a, d, rates in (("short", "a", (1, 2)), ("long", "b", (3, 4))) for r in rates}
    undo = {("undo", "short", "a", 2, 9), ("undo", "long", "b", 2, 3), ("undo", "long", "b", 2, 4)}
    assert found == sam | undo
    with pytest.raises(ConfigError, match="cannot be set"):
        expand(raw, {"adversaries.short.data": "c"}, "made.yaml")


def test_an_override_of_one_variant_beats_the_others_and_its_sweep():
    raw = {
        "name": "{variant}-{a}",
        "b": {"c": 0},
        "variants": {"x": {"b": {"d": 1}}, "x.2": None},
        "sweep": {"a": [1, 2]},
    }
    changed = expand(raw, {"b.c": 5, "variants.x.b.c": 6, "variants.x.2.a": 9}, "made.yaml")
    assert [(run["name"], run["b"]) for run in changed] == [
        ("x-1", {"c": 6, "d": 1}),
        ("x-2", {"c": 6, "d": 1}),
        ("x.2-9", {"c": 5}),
    ]
    mine = expand(raw, {"variant": "mine", "variants.mine.b.c": 7}, "made.yaml")
    assert [run["b"]["c"] for run in mine] == [7, 7]
    with pytest.raises(ConfigError, match=r"'variants\.y\.b' does not name one of its variants: x, x\.2"):
        expand(raw, {"variants.y.b": 1}, "made.yaml")
    for key in ("variants.x", "variants.x.sweep.a", "variants.x.points.best"):
        with pytest.raises(ConfigError, match="cannot be set"):
            expand(raw, {key: 1}, "made.yaml")


def prepared(setting: str, *overrides: str) -> dict[str, Prepare]:
    """Variant -> config, as `run_prepare.py` plans them."""
    found = sources(ROOT / "configs" / setting, "prepare")
    planned = plan(STAGES["prepare"], found, parse_overrides(overrides), ROOT / "runs")
    return {run.config.variant: run.config for run in planned if isinstance(run.config, Prepare)}


@pytest.mark.parametrize("setting", ["wmdp_bio", "wmdp_cyber", "wmdp_small"])
def test_files_of_one_s_own_go_into_the_variant_that_is_named(setting):
    before, after = prepared(setting), prepared(setting, "variants.qa.data.forget.path=mine.jsonl")
    assert after["qa"].data["forget"].path == "mine.jsonl"
    assert {name: c for name, c in after.items() if name != "qa"} == {n: c for n, c in before.items() if n != "qa"}
    with pytest.raises(ConfigError, match=r"data\.retain is missing.*applies to every variant, mixture too"):
        prepared(setting, "data.forget.path=mine.jsonl")


def test_a_part_of_the_mixture_can_be_left_out():
    mixture = "variants.mixture.data.auxiliary"
    left_out = f"{mixture}.parts.wikipedia_questions.proportion=0"
    made = prepared("wmdp_bio", left_out, f"{mixture}.renormalise=true")["mixture"]
    assert "parts.wikipedia_questions." not in made.data["auxiliary"].places
    made.check()  # and so asks for no file
    with pytest.raises(ConfigError, match=r"add up to 0\.99"):
        prepared("wmdp_bio", left_out)


@pytest.mark.parametrize(("variant", "missing"), [("corpora", 1), ("qa", 2), ("mixture", 1)])
def test_the_remedy_for_a_missing_file_is_one(variant, missing, tmp_path, monkeypatch):
    """What the message says mends what it complains of."""
    for number in range(missing):
        texts = ({"text": f"{number}: the document {i}"} for i in range(2000))
        (tmp_path / f"mine{number}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    overrides: list[str] = []
    for number in range(missing):
        with pytest.raises(ConfigError) as error:
            prepared("wmdp_bio", *overrides)[variant].check()
        assert len(str(error.value).splitlines()) <= 3
        overrides += [
            f"{key}=mine{number}.jsonl" for key in re.findall(r"with prepare\.(\S+)=\.\.\.", str(error.value))
        ]
    assert all(text.startswith(f"variants.{variant}.") for text in overrides)
    prepared("wmdp_bio", *overrides)[variant].check()


def test_a_variant_of_another_yaml_of_the_stage_is_no_mistake(tmp_path):
    """--only and --with choose among the files; an override of what is not chosen changes nothing."""
    stage, found = STAGES["unlearn"], sources(DEMO, "unlearn")
    change = {"variants.sam.method.rho": 0.5}
    main, as_it_is = plan(stage, found[:1], change, tmp_path), plan(stage, found[:1], {}, tmp_path)
    assert [run.config for run in main] == [run.config for run in as_it_is]
    sam = [run.config for run in plan(stage, found, change, tmp_path) if run.config.variant == "sam"]
    assert {as_raw(config)["method"]["rho"] for config in sam} == {0.5}
    with pytest.raises(ConfigError, match="does not name one of its variants"):
        plan(stage, found[:1], {"variants.sma.method.rho": 0.5}, tmp_path)


def test_points_are_filled_in_as_the_numbers_they_are():
    raw = {"name": "a", "points": {"maxent": {"best": {"alpha": 0.3, "rate": 2e-5}}}, "x": "{points.maxent.best.rate}"}
    assert expand(raw, {}, "made.yaml") == [{"name": "a", "variant": "", "x": 2e-5}]
    with pytest.raises(ConfigError, match=r"cannot fill in '\{points\.rmu\.best\.rate\}'"):
        expand({**raw, "x": "{points.rmu.best.rate}"}, {}, "made.yaml")


@pytest.mark.parametrize("path", ["[v2] korpus/a.jsonl", "*.jsonl", "{{x}}.jsonl", "~/x.jsonl", "a: b", "a #b", "2024"])
def test_a_path_is_read_as_it_is_typed(path):
    assert parse_overrides([f"data.retain.path={path}", f"p_path='{path}'"]) == {
        "data.retain.path": path,
        "p_path": path,
    }
    assert parse_overrides(["data.retain.path=null"]) == {"data.retain.path": None}


def test_a_brace_that_stands_for_itself_is_written_twice():
    raw = {"name": "a", "path": "korpus {{x}}/{name}.jsonl"}
    assert expand(raw, {}, "made.yaml")[0]["path"] == "korpus {x}/a.jsonl"
    with pytest.raises(ConfigError, match=r"cannot fill in 'korpus \{x\}': .*\n.* is written twice: \{\{ or \}\}"):
        expand({**raw, "path": "korpus {x}"}, {}, "made.yaml")


def test_let_is_filled_in_and_is_no_key_of_a_run():
    raw = {
        "name": "{variant}-s_{seed}",
        "seed": 0,
        "model": "undo/x-alpha_{let.alpha}",
        "variants": {"undo_{let.alpha}": {"sweep": {"let.alpha": [0.2, 0.4]}}},
    }
    runs = expand(raw, {}, "test")
    assert [run["model"] for run in runs] == ["undo/x-alpha_0.2", "undo/x-alpha_0.4"]
    assert [run["variant"] for run in runs] == ["undo_0.2", "undo_0.4"]
    assert [run["name"] for run in runs] == ["undo_0.2-s_0", "undo_0.4-s_0"]
    assert not any("let" in run for run in runs)


def test_another_method_does_not_inherit_the_values_of_the_first():
    """RMU has alpha 1200, GradDiff 1: after a switch by override or by variant, each has its own default."""
    base = {"name": "x", "method": {"name": "rmu", "layer": 1, "trained_layers": [0], "alpha": 7.0}}
    (switched,) = expand(base, parse_overrides(["method.name=graddiff"]), "test")
    assert switched["method"] == {"name": "graddiff"}
    (by_variant,) = expand(base | {"variants": {"gd": {"method": {"name": "graddiff", "alpha": 2.0}}}}, {}, "test")
    assert by_variant["method"] == {"name": "graddiff", "alpha": 2.0}
    (same,) = expand(base, parse_overrides(["method.alpha=9.0"]), "test")
    assert same["method"] == base["method"] | {"alpha": 9.0}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learnign_rate=1e-3", ["unknown key 'training.learnign_rate'", "learning_rate"]),
        ("trainin.steps=3", ["unknown key 'trainin'", "training"]),
        ("training.steps=many", ["training.steps", "integer", "'many'"]),
        ("training.steps=0", ["training.steps", "greater than 0", "0"]),
        ("training.steps=2.5", ["training.steps", "2.5"]),
        ("training.learning_rate=-1", ["training.learning_rate", "greater than 0"]),
        ("training.learning_rate=nan", ["training.learning_rate"]),
        ("training.precision=fp8", ["training.precision", "fp32", "bf16"]),
        ("training.min_learning_rate=1", ["training", "min_learning_rate 1 is above"]),
        ("mixture.retain=0.9", ["mixture", "add up to 1"]),
        ("mixture={retain: 0.5, korean: 0.5}", ["mixture", "korean", "retain"]),
        ("data=somewhere else", ["data", "<stage>/<name>"]),
        ("model.layers=null", ["model.layers", "integer"]),
        ("seed=-1", ["seed", "greater than or equal to 0"]),
        ("seeds={order: -3}", ["seeds.order", "greater than or equal to 0"]),
        ("seed=1e30", ["seed"]),
        ("model.heads=3", ["model", "hidden_size 80 is not a multiple of heads 3"]),
        ("model.hidden_size=81", ["model", "hidden_size 81 is not a multiple of heads 4"]),
        ("model.head_dim=15", ["model", "head_dim 15 is odd"]),
        ("model.kv_heads=3", ["model", "heads 4 is not a multiple of kv_heads 3"]),
        ("sweep.seed=3", ["sweep.seed", "list"]),
        ("sweep.seed=[]", ["sweep.seed", "at least one"]),
        ("sweep.training.steps=[1,2]", ["two runs are named", "put every swept key into `name`"]),
        ('name="{nothing}"', ["nothing", "no such key"]),
        ("seed", ["key=value"]),
        ("training.steps=[1", ["not valid YAML"]),
    ],
)
def test_refusals_name_the_key_and_the_fix(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 3


def test_an_override_that_makes_variants_the_same_is_refused_and_one_that_is_in_the_name_is_not():
    """undo_0.8 with alpha 0.5 would be a name that lies."""
    raw = {"name": "{variant}", "noise": {"beta": 0.1}}
    raw["variants"] = {"undo_0.8": {"noise": {"alpha": 0.8}}, "undo_0.6": {"noise": {"alpha": 0.6}}}
    with pytest.raises(ConfigError) as error:
        expand(raw, {"noise.alpha": 0.5}, "mine.yaml")
    assert str(error.value) == (
        "mine.yaml: with noise.alpha=0.5, undo_0.8 and undo_0.6 are the same run under two names\n"
        "name your own with variant=<name> noise.alpha=0.5, or change one alone with variants.<name>.<key>=<value>"
    )
    assert len(expand(raw, {"noise.beta": 0.5}, "mine.yaml")) == 2
    assert [run["name"] for run in expand(raw, {"noise.alpha": 0.5, "variant": "mine"}, "mine.yaml")] == ["mine"]
    assert [run.name for run in runs_of("undo", "noise.alpha=0.5")] == ["undo_0.5-seed_0"]
    with pytest.raises(ConfigError, match="reference-lr_4e-03-seed_0 and oracle-lr_4e-03-seed_0 are the same run"):
        runs_of("relearn", "model=undo/mine")


def test_an_override_of_a_stage_that_the_setting_lacks_is_refused(tmp_path):
    args = cli.parser("", "").parse_intermixed_args(["demo", "base.model=x", "--runs", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"base\.model: demo has no stage base; its stages: prepare, pretrain"):
        run_all.planned(args)


@pytest.mark.parametrize("name", [*STAGES, *WHOLE])
def test_the_example_of_every_help_runs_as_printed(name, tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"run_{name}.py", *arguments])
        with pytest.raises(SystemExit) as end:
            call(name)
        return end.value.code

    assert run("--help") == 0
    (example,) = re.findall(r"^example: (.*)$", capsys.readouterr().out, re.MULTILINE) or [None]
    if example is None:
        assert name == "figures"  # of runs that are done
        return
    script, *arguments = shlex.split(example)
    assert (script, run(*arguments, "--runs", str(tmp_path))) == (f"run_{name}.py", 0), capsys.readouterr().err


def test_refusals_of_methods_name_the_key_without_the_union_s_tags():
    message = refusal("method.beta=1", stage="unlearn")
    assert "unknown key 'method.beta'" in message
    assert "variant=" in refusal("method={name: maxemt}", stage="unlearn")  # all variants have become the same run
    message = refusal("variant=mine", "method={name: maxemt}", stage="unlearn")
    assert "method: there is no maxemt; there are graddiff, maxent, rmu" in message
    message = refusal("variant=mine", "method={name: rmu, layer: 0, trained_layers: [0, 1]}", stage="unlearn")
    assert "method: trained_layers must name blocks up to layer 0" in message


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("{name: sam, rhoo: 1}", "unknown key 'method.rhoo'; did you mean 'method.rho'?"),
        ("{name: uam, gama: 1}", "did you mean 'method.gamma'?"),
        ("{name: sam, base: {name: maxent, alhpa: 1}}", "'method.base.alhpa'; did you mean 'method.base.alpha'?"),
        ("{name: sam, on: total}", "unknown key 'method.true' (YAML reads on and yes as true, off and no as false)"),
        ("{name: repnoise, alpha: 1}", "keys of method: preset, base, name, noise_weight, ascent_weight"),
        ("{name: rmu, preset: offical}", "method: there is no preset 'offical'; presets of this method: faithful"),
        ("{name: sam, base: {name: rmu, preset: x}}", "method.base: there is no preset 'x'"),
        ("{name: rmu, preset: [official]}", "method.preset: input should be a valid string"),
    ],
)
def test_a_mistyped_key_of_a_method_is_looked_for_in_that_method(method, words):
    assert words in refusal("variant=mine", f"method={method}", stage="unlearn")


def test_a_mistyped_key_of_a_source_is_looked_for_in_a_source():
    message = refusal("data.forget.pth=x", stage="prepare", setting="language_small")
    assert "unknown key 'data.forget.pth'; did you mean 'data.forget.path'?" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"- a\n", "is empty or not a mapping"),
        (b"a: [1\n", "not valid YAML"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a: 1\na: 2\n", "not valid YAML"),
        (b"a: ${b}\n", "not valid YAML"),
    ],
)
def test_unreadable_yaml(tmp_path, content, words):
    path = tmp_path / "pretrain.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_yaml(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("variants: {a: null, b: 3}", r"mine\.yaml: variants\.b, and a sweep in it, must be a mapping, got 3"),
        ("variants: {a: {sweep: 3}}", r"variants\.a, and a sweep in it, must be a mapping"),
        ("adversaries: {a: 3}", r"adversaries\.a, .* must be a mapping"),
        ("variants: [a]", "`variants` must be a mapping"),
        ("a: " + "[" * 5000 + "]" * 5000, NESTED),
        ("a: " + "{a: " * 5000 + "1" + "}" * 5000, NESTED),
        ('name: "{variant:>9999999999}"', r"cannot fill in .*variant:>9999999999"),
        ('name: "{variant.__class__}"', "no such key or format"),
        ('name: "{variant!r}"', "no such key or format"),
        ('name: "{seed.x}"\nseed: 3', "no such key or format"),
        ('name: "{"', r"is written twice: \{\{ or \}\}"),
        ('name: "{seed:d}"\nseed: x', "no such key or format"),
        ("name: x\nsweep: {seed: 3}", r"sweep\.seed must be a list"),
        ("name: x\nlet: ${oc.env:HOME}", r"mine\.yaml: \$\{oc\.env:HOME\}: look-ups are not taken"),
        ("name: x\nlet: ${oc.env:HOME,${seed}}\nseed: 1", "look-ups are not taken"),
        ("name: ${nothing}", "'nothing' not found"),
        ("name: !!binary aGVsbG8=", "a value is binary"),
    ],
)
def test_yaml_that_means_nothing_is_one_line(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        expand(read_yaml(path), {}, str(path))
    assert len(str(error.value).splitlines()) <= 2


def test_an_override_reads_no_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    with pytest.raises(ConfigError, match=r"name: \$\{oc\.env:HF_TOKEN\}: look-ups are not taken"):
        parse_overrides(["name=${oc.env:HF_TOKEN}"])
    with pytest.raises(ConfigError, match=NESTED):
        parse_overrides(["a=" + "[" * 3000 + "]" * 3000])


def test_a_brace_of_a_path_is_written_twice():
    (run,) = expand({"name": "a", "path": "data/{{x}}-{seed}.jsonl", "seed": 3}, {}, "mine.yaml")
    assert run["path"] == "data/{x}-3.jsonl"


def test_missing_file_names_the_settings_there_are():
    with pytest.raises(ConfigError, match="demo"):
        find_configs("dmeo", "pretrain")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(DEMO / "nothing.yaml")


def test_frozen():
    run = runs_of("pretrain")[0]
    with pytest.raises(ValueError, match="frozen"):
        run.training.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_parents_are_the_run_names():
    relearn = runs_of("relearn")[0]
    assert relearn.parents() == ("prepare/data", relearn.model)
    assert runs_of("pretrain")[0].parents() == ("prepare/data",)


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
)
def test_differences_are_none_only_between_equals(a, b):
    assert (differences({"x": a}, {"x": b}) == []) == (a == b)


def test_seeds_are_independent_by_stage_and_concern_and_can_be_set():
    pretrain = runs_of("pretrain", "seeds={order: 7}")[0]
    unlearn = runs_of("unlearn")[0]
    assert isinstance(pretrain, Pretrain)
    assert isinstance(unlearn, Unlearn)
    drawn = [pretrain.seed_for("init"), pretrain.seed_for("noise"), unlearn.seed_for("init"), unlearn.seed_for("order")]
    assert len(set(drawn)) == 4
    assert pretrain.seed_for("order") == 7


@pytest.mark.parametrize(
    "arguments", [["run_pretrain.py", "--help"], ["run_all.py", "demo", "--dry-run"], ["run_unlearn.py", "demo", "x=1"]]
)
def test_no_torch_before_a_run_starts(arguments):
    """--help, --dry-run and a refusal never import torch or transformers."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}; sys.path.insert(0, '.')\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'heavy import'"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_experiments_beside_the_main_one(tmp_path, monkeypatch):
    """<stage>_<name>.yaml: left out, taken with --with, found by --only; one name stands for one run."""
    folder = tmp_path / "configs/mine"
    shutil.copytree(DEMO, folder)

    def planned(*arguments: str) -> set[str]:
        args = cli.parser("", "").parse_intermixed_args([str(folder), *arguments])
        args.runs = tmp_path
        return {run.name for run in run_all.planned(args)[0]}

    main, robust = planned(), planned("--with", "robust")
    assert main < robust
    assert "unlearn/sam-lr_2e-03-seed_0" in robust - main
    assert planned("--only", "relearn/*") == {name for name in main if name in planned("--only", "relearn/*")}
    picked = planned("--only", "relearn/sam-*")
    assert {name.partition("/")[0] for name in picked} == {"prepare", "pretrain", "unlearn", "relearn"}
    uam = [name for name in planned("--only", "unlearn/*uam*") if "uam" in name]
    assert uam == ["unlearn/uam-lr_3e-02-seed_0"]  # the first file that has one: not the search's
    assert len([name for name in planned("--only", "relearn/sam_0.0?-*") if "relearn" in name]) == 12  # Table 8's
    with pytest.raises(ConfigError, match=r"no <stage>_robst\.yaml; there is: attacks, robust, search, tables"):
        planned("--with", "robst")
    shutil.copy(folder / "unlearn.yaml", folder / "unlearn_again.yaml")
    with pytest.raises(ConfigError, match=r"is a run of .*unlearn\.yaml already"):
        planned("--with", "again")


def test_seeds_of_a_whole_setting_are_those_of_training(tmp_path):
    """The README's way to three seeds: the data are prepared once, with their own seed."""
    args = cli.parser("", "").parse_intermixed_args(["demo", "sweep.seed=[0,1,2]", "--runs", str(tmp_path)])
    runs, _ = run_all.planned(args)
    assert [run.name for run in runs if run.stage.name == "prepare"] == ["prepare/data"]
    one = run_all.planned(cli.parser("", "").parse_intermixed_args(["demo", "--runs", str(tmp_path)]))[0]
    assert len(runs) == 3 * (len(one) - 1) + 1
    assert run_all.route({"seed": 7})["prepare"] == {}


def test_text_that_is_not_there_is_said_before_anything_starts(tmp_path):
    """Once, and not as the failure of all that stands on it."""
    stage = STAGES["prepare"]
    path = {"data.retain.path": str(tmp_path / "*.txt")}
    planned = plan(stage, sources(ROOT / "configs/language_small", "prepare"), path, tmp_path)
    with pytest.raises(ConfigError) as error:
        check(planned, force=False)
    assert str(error.value).splitlines() == [
        f"data.retain: {tmp_path}/*.txt: there is no such file",
        "give your own files with prepare.data.retain.path=... (run_prepare.py: without `prepare.`)",
    ]
    assert not planned[0].directory.folder.exists()
