"""Multiple choice is what the harness' own command line says, at less cost; and bad files are named."""

import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import HANGS, ROOT, SHAPE, lively, training
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.evaluate import MultipleChoice, TokenCrossEntropy
from undo.evaluate.harness import Benchmark, Encoded, InMemory, plan, quiet
from undo.evaluate.multiple_choice import describe
from undo.evaluate.questions import Questions, read
from undo.evaluate.tasks import build, write_task
from undo.lm.disk import save
from undo.lm.place import place
from undo.runs.directory import RunDirectory
from undo.train.stage import TrainingStage

WORDS = [
    "the",
    "of",
    "river",
    "stone",
    "cell",
    "bond",
    "king",
    "law",
    "tree",
    "acid",
    "light",
    "map",
    "field",
    "gene",
    "salt",
]
CPU = torch.device("cpu")


def questions(size: int, seed: int, choices=(4,), subjects=("sea_life", "law")) -> list[dict]:
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = []
    for number in range(size):
        offered = int(rng.choice(choices))
        row = {
            "question": f"{words(3, 14)} {number}? ",
            "choices": [words(1, 4) for _ in range(offered)],
            "answer": int(rng.integers(offered)),
        }
        rows.append(row | ({"subject": subjects[number % len(subjects)]} if subjects else {}))
    return rows


def put(path: Path, rows: list) -> str:
    """The rows as a file of the kind that its name says."""
    match path.suffix:
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".json":
            path.write_text(json.dumps(rows))
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level, with <bos> in front as Gemma's; 260 tokens leave no merges, so that " A" is two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [f"{' '.join(WORDS)} Answer: A B C D E\nA. B. C. D. E. multiple choice questions (with answers) about"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(400)


@pytest.fixture(scope="module")
def gemma():
    """Weights so large that the answers depend on the question: with smaller ones it says one letter always."""
    model, rng = SHAPE.build(0), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) * (0.7 if weight.ndim > 1 else 0.3))
    return place(model, CPU).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    return {
        "test": put(folder / "test.parquet", questions(48, 0)),
        "dev": put(folder / "dev.jsonl", questions(14, 1)),
        "zero": put(folder / "zero.json", questions(21, 2, subjects=())),
        "mixed": put(folder / "mixed.jsonl", questions(30, 4, choices=(2, 3, 4, 5))),
    }


@pytest.fixture(scope="module")
def asked(files):
    return {
        "retain": Questions(path=files["test"], shots=5, shots_path=files["dev"], share=0.8, seed=3),
        "forget": Questions(path=files["zero"], subject="cell biology"),
    }


@pytest.fixture(scope="module")
def world(data, tokenizer, tmp_path_factory):
    """A prepare run's folder with this file's tokenizer."""
    run = RunDirectory(tmp_path_factory.mktemp("runs"), "tiny", "prepare/data")
    shutil.copytree(data.folder / "validation", run.folder / "validation")
    tokenizer.save_pretrained(run.folder / "tokenizer")
    return run


@pytest.fixture(scope="module")
def said_by_command_line(gemma, world, asked, tmp_path_factory):
    """`lm_eval` in a process of its own, on the saved model and the exported folders, without a network."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save(gemma, world.folder / "tokenizer", folder / "model")
    for name, what in asked.items():
        include = write_task(what, folder / "tasks", name)[:2]
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "http_proxy": nowhere, "https_proxy": nowhere}
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--device", "cpu", "--log_samples"]
    command += ["--model_args", f"pretrained={folder / 'model'},dtype=float32", *include, "--tasks", "retain,forget"]
    command += ["--output_path", str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text())["results"]
    samples = {}
    for path in (folder / "out").rglob("samples_*.jsonl"):
        task = re.fullmatch(r"samples_(.+)_[^_]+\.jsonl", path.name)[1]
        samples[task] = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda s: s["doc_id"])
    return results, samples


def likelihoods(answered) -> np.ndarray:
    return np.array([[score.loglikelihood for score in scores] for scores in answered.scores])


def test_equals_the_command_line_to_the_last_digit(said_by_command_line, gemma, world, asked):
    results, samples = said_by_command_line
    with torch.no_grad():
        measured = MultipleChoice(**asked, rows=5).load(world, CPU)(gemma, True).values
    assert measured["retain"] == results["retain"]["acc,none"]
    assert measured["forget"] == results["forget"]["acc,none"]
    assert 0 < measured["retain"] < 1
    for name, what in asked.items():
        ours = Benchmark(what, make_tokenizer(400)).ask(gemma)
        tasks = sorted(task for task in samples if task.startswith(name))
        theirs = [sample for task in tasks for sample in samples[task]]
        lls = np.array([[float(resp[0][0]) for resp in sample["resps"]] for sample in theirs])
        assert likelihoods(ours) == pytest.approx(lls, abs=1e-4)  # as printed
        assert ours.chosen == lls.argmax(1).tolist()
        assert len(set(ours.chosen)) >= 3  # or the test would say little


@pytest.mark.parametrize("kind", ["gemma", "short_window", "gpt2", "mamba"])
def test_equals_the_harness_own_model_and_reuse_changes_nothing(kind, tokenizer, asked, files):
    """Keys and values are shared where a model has them; a recurrent state is not. No model here has a pad token."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    match kind:
        case "gemma":
            model = place(lively(SHAPE.build(0)), CPU)
        case "short_window":  # the shots are longer than every other layer looks back
            model = lively(SHAPE.model_copy(update={"sliding_window": 24}).build(0))
        case "gpt2":
            model = lively(GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2)))
        case "mamba":
            model = lively(MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=2)))
    model.train()
    what = asked["retain"].model_copy(update={"share": 0.3})
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    attention = model.config._attn_implementation
    shared, alone = (Benchmark(what, tokenizer, rows=4, reuse=reuse).ask(model) for reuse in (True, False))
    assert model.config._attn_implementation == attention
    assert model.training
    assert "forward" not in vars(model.get_output_embeddings())
    hook.remove()
    assert likelihoods(shared) == pytest.approx(likelihoods(alone), abs=1e-5)
    assert shared.chosen == alone.chosen
    assert shared.accuracy == alone.accuracy
    if kind != "mamba":
        assert sum(seen) == shared.tokens + alone.tokens
        assert shared.tokens < alone.tokens / 2
    answers = {}
    for lm in (HFLM(model, tokenizer=tokenizer, batch_size=3), InMemory(tokenizer, model, rows=4)):
        with quiet():
            group, _ = build(what)
            said = evaluate(lm, {"tasks": {t.task_name: t for t in group.get_all_tasks()}}, bootstrap_iters=0)
        answers[type(lm)] = [
            [(float(ll), greedy) for ((ll, greedy),) in sample["resps"]]
            for task in said["samples"].values()
            for sample in task
        ]
    for theirs in answers.values():
        assert np.array(theirs)[..., 0] == pytest.approx(likelihoods(shared), abs=2e-5)
        assert [[greedy for _, greedy in row] for row in theirs] == [[s.greedy for s in row] for row in shared.scores]


def test_the_rows_of_a_question_are_read_once(tokenizer, files):
    """Four letters of one token are one row; where they are two tokens, still one, as they differ in the last."""
    what = Questions(path=files["zero"])
    for tokens in (400, 260):
        benchmark = Benchmark(what, make_tokenizer(tokens), rows=100)
        requests = [request for asked in benchmark.asked for request in asked.requests]
        assert {len(request.continuation) for request in requests} == {1 if tokens == 400 else 2}
        (batch,) = plan(requests, 100).batches
        assert len(requests) == 4 * 21
        assert len(batch.ids) == 21
    inside = [Encoded([1, 2, 3], [4]), Encoded([1, 2, 3], [4, 5, 6]), Encoded([1, 2, 9], [4, 5, 7])]
    assert plan(inside, 9).prefix == (1, 2)
    assert plan(inside, 9).batches[0].ids.tolist() == [[3, 4, 5], [9, 4, 5]]  # the first lies within the second


def test_long_questions_are_asked_few_at_a_time(monkeypatch):
    """Batches are bounded by tokens, padding included: one long question does not pad fifteen short ones to it."""
    monkeypatch.setattr("undo.evaluate.likelihoods.TOKENS_AT_ONCE", 60)
    sizes = (3, 3, 4, 20, 29, 5, 100)
    requests = [Encoded([100 + number, *range(size)], [1]) for number, size in enumerate(sizes)]
    shapes = [tuple(batch.ids.shape) for batch in plan(requests, 4, reuse=False).batches]
    assert shapes == [(4, 6), (2, 30), (1, 101)]


def test_a_byte_order_mark_and_packed_files_are_read(tmp_path):
    line = json.dumps(ROW).encode() + b"\n"
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + line)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(line))
    for name in ("q.jsonl", "q.jsonl.gz"):
        assert [question.question for question in read(str(tmp_path / name))] == ["why?"]


@pytest.mark.parametrize("tokens", [400, 260])
def test_any_number_of_choices_and_answers_of_several_tokens(tokens, files, gemma):
    """Against one forward pass per choice, of the whole text."""
    tokenizer = make_tokenizer(tokens)
    answered = Benchmark(Questions(path=files["mixed"]), tokenizer).ask(gemma)
    rows = [json.loads(line) for line in Path(files["mixed"]).read_text().splitlines()]
    rows = [row for subject in ("sea_life", "law") for row in rows if row["subject"] == subject]
    assert sorted(set(answered.choices)) == [2, 3, 4, 5]
    right = 0
    for row, scores, chosen in zip(rows, answered.scores, answered.chosen, strict=True):
        options = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCDE", row["choices"], strict=False))
        about = row["subject"].replace("_", " ")
        prompt = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        prompt += f"{row['question'].strip()}\n{options}Answer:"
        expected = []
        for letter in "ABCDE"[: len(row["choices"])]:
            before, ids = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {letter}")["input_ids"]
            with torch.no_grad():
                logs = gemma(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(logs[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
        assert [score.loglikelihood for score in scores] == pytest.approx(expected, abs=1e-5)
        assert chosen == int(np.argmax(expected))
        right += chosen == row["answer"]
    assert sum(answered.hits) == right
    assert answered.accuracy == pytest.approx(right / len(rows), rel=1e-12)


def test_prompts_are_those_of_the_harness_mmlu(tmp_path):
    import lm_eval
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    names = {}
    for path in folder.glob("mmlu_*.yaml"):
        config = yaml.safe_load(path.read_text())
        names[config["dataset_name"]] = config["description"]
    assert len(names) == 57
    test, dev = questions(6, 4, subjects=("us_foreign_policy",)), questions(5, 5, subjects=("us_foreign_policy",))
    config = yaml.safe_load((folder / "_default_template_yaml").read_text())
    splits = DatasetDict({"test": Dataset.from_list(test), "dev": Dataset.from_list(dev)})
    config |= {"description": names["us_foreign_policy"], "task": "theirs", "num_fewshot": 5}
    what = Questions(path=put(tmp_path / "t.jsonl", test), shots=5, shots_path=put(tmp_path / "d.jsonl", dev))
    with quiet():
        theirs, (_, (ours,)) = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits}), build(what)
        for task in (theirs, ours):
            task.set_fewshot_seed(1)
            task.build_all_requests()
    assert [request.args for request in ours.instances] == [request.args for request in theirs.instances]
    for subject, description in names.items():
        assert description == ours.resolve_field({"subject": subject}, ours.config.description)


def test_a_seeded_share_of_each_subject(files):
    every, some, same, other = (
        Questions(path=files["test"], share=share, seed=seed).by_subject()
        for share, seed in ((1.0, 0), (0.5, 0), (0.5, 0), (0.5, 1))
    )
    assert some == same
    assert some != other
    for subject in ("sea_life", "law"):
        whole, part = every[subject][0], some[subject][0]
        assert len(part) == len(whole) / 2 == 12
        assert part != whole[:12]
        assert part == [question for question in whole if question in part]  # in the file's order
    assert [len(asked) for asked, _ in Questions(path=files["test"], share=0.001).by_subject().values()] == [1, 1]


def test_letters_chance_and_interval_by_hand():
    said = describe(chosen=[0, 0, 0, 2, 1, 0, 0, 0, 3, 0], choices=[4, 4, 4, 4, 2, 2, 4, 4, 5, 5], right=4)
    assert said.pop("chance") == pytest.approx((6 / 4 + 2 / 2 + 2 / 5) / 10)
    assert said.pop("low") == pytest.approx(0.16818, abs=1e-5)
    assert said.pop("high") == pytest.approx(0.68733, abs=1e-5)
    assert said == {"questions": 10, "says_A": 0.7, "says_B": 0.1, "says_C": 0.1, "says_D": 0.1, "says_E": 0.0}
    assert describe([0], [2], 1)["high"] == 1.0
    assert describe([0], [2], 0)["low"] == 0.0


def test_a_subset_for_periodic_evaluations(gemma, world, asked):
    with torch.no_grad():
        evaluate = MultipleChoice(**asked, subset=7).load(world, CPU)
        part, again, whole = (evaluate(gemma, full) for full in (False, False, True))
        assert whole == MultipleChoice(**asked).load(world, CPU)(gemma, True)
    assert part == again
    assert part.values["retain/questions"] == part.values["forget/questions"] == 7
    total = whole.values["retain/questions"] + whole.values["forget/questions"]
    assert total == 38 + 21
    assert part.values["validation_share"] == pytest.approx(14 / total)
    assert "validation_share" not in whole.values
    everything = Benchmark(asked["forget"], make_tokenizer(400)).ask(gemma)
    assert part.values["forget/says_A"] == [everything.chosen[i] for i in range(0, 21, 3)].count(0) / 7
    assert part.tokens < whole.tokens / 2


def test_beside_the_losses_in_full_evaluations(gemma, world, asked):
    choices = MultipleChoice(**asked)
    with torch.no_grad():
        alone = choices.load(world, CPU)(gemma, True)
        losses = TokenCrossEntropy(subset=2).load(world, CPU)(gemma, True)
        both = TokenCrossEntropy(choices=choices, subset=2).load(world, CPU)
        full, part = both(gemma, True), both(gemma, False)
    assert full.values == losses.values | {f"accuracy/{name}": value for name, value in alone.values.items()}
    assert {"accuracy/retain", "accuracy/forget/says_D", "accuracy/retain/chance"} <= full.values.keys()
    assert full.tokens == losses.tokens + alone.tokens
    assert not any(name.startswith("accuracy/") for name in part.values)


def test_close_choices_do_not_become_ties_under_autocast(gemma, tokenizer, asked):
    with torch.autocast("cpu", torch.bfloat16):
        answered = Benchmark(asked["retain"], tokenizer).ask(gemma)
    assert all(len(set(row)) == 4 for row in likelihoods(answered).tolist())


def test_nothing_is_fetched(gemma, world, asked, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with torch.no_grad():
        assert MultipleChoice(**asked, rows=3).load(world, CPU)(gemma, True).tokens > 0


def test_read_without_torch_and_exported_by_a_command(files, tmp_path):
    code = (
        "import sys; from undo.evaluate.multiple_choice import *; from undo.evaluate import Evaluation\n"
        f"Questions(path={files['test']!r}, shots=5, shots_path={files['dev']!r}).check()\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "from undo.evaluate.__main__ import main\n"
        f"assert main(['export', 'x', 'path={files['dev']}', 'shots=1']) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: export: 1 shots need `shots_path`, the file to take them from\n"


ROW = {"question": "why?", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("q.jsonl", [ROW, ROW | {"answer": 2}], "q.jsonl line 2: answer 2 is not an index into its 2 choices (0 to 1)"),
        ("q.parquet", [ROW, ROW, ROW | {"answer": -1}], "q.parquet row 2: answer -1 is not an index"),
        ("q.jsonl", [ROW | {"answer": "B"}], "answer 'B' is not an index"),
        ("q.parquet", [{"question": "why?", "answer": 0}], "q.parquet row 0: has no column 'choices'; it has answer"),
        ("q.json", [ROW | {"choices": ["a"], "answer": 0}], "q.json entry 0: has 1 choices; a question needs 2 to 26"),
        ("q.json", [ROW | {"choices": [1, 2]}], "column 'choices' must be a list of texts"),
        ("q.json", [ROW | {"question": " "}], "the question is empty"),
        ("q.json", [ROW | {"question": 3}], "column 'question' holds 3, not text"),
        ("q.json", ["why?"], "q.json entry 0: is not an object"),
        ("q.jsonl", [], "q.jsonl: is empty"),
        ("q.json", [], "q.json: holds no questions"),
        ("q.json", [ROW | {"choices": ["a"] * 4}], "q.json entry 0: its 4 choices are all 'a'"),
        ("q.json", [ROW | {"choices": [str(i) for i in range(500)]}], "has 500 choices; a question needs 2 to 26"),
        ("q.json", [ROW | {"question": "why \ud83d?"}], "column 'question' holds half a surrogate pair (\\ud83d)"),
        ("q.csv", [ROW], "q.csv: unknown kind of file; give one of .parquet, .jsonl, .json"),
    ],
)
def test_bad_files(tmp_path, name, rows, message):
    path = put(tmp_path / name, rows)
    with pytest.raises(ConfigError) as caught:
        Questions(path=path).check()
    assert message in str(caught.value)
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.parquet", b"no parquet at all", "is not a parquet file, or is damaged"),
        ("q.jsonl", json.dumps(ROW).encode() + b"\nnonsense\n", "q.jsonl line 2: is not JSON"),
        ("q.json", b"[1, 2", "q.json: is not JSON"),
        ("q.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("elsewhere.jsonl", b"", "q.jsonl: there is no such file"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    wanted = tmp_path / name.replace("elsewhere", "q")
    with pytest.raises(ConfigError, match=re.escape(message)):
        Questions(path=str(wanted)).check()


def test_too_few_shots_are_said_before_a_run_starts(files, tmp_path):
    few = put(tmp_path / "few.jsonl", questions(7, 1))  # 4 on sea life, 3 on law
    evaluation = {"name": "multiple_choice", "retain": {"path": files["test"], "shots": 4, "shots_path": few}}
    evaluation |= {"forget": {"path": files["zero"]}}
    blocks = {"name": "x", "data": "prepare/data", "training": training().model_dump(), "evaluation": evaluation}
    with pytest.raises(ConfigError) as caught:
        validate(TrainingStage, blocks, "x.yaml").check()
    assert str(caught.value).startswith(f"evaluation.retain: {few}: holds 3 questions on 'law', fewer than the 4 shots")
    blocks["evaluation"] = {"name": "cross_entropy", "choices": evaluation}
    with pytest.raises(ConfigError, match=r"^evaluation\.choices\.retain: "):
        validate(TrainingStage, blocks, "x.yaml").check()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"task": "mmlu", "path": "x"}, "give one of `task`"),
        ({}, "give one of `task`"),
        ({"task": "mmlu", "shots_path": "x"}, "`shots_path`, `subject` and `subjects` go with `path`"),
        ({"path": "x", "shots": 1}, "1 shots need `shots_path`"),
        ({"path": "x", "share": 0.0}, "share: input should be greater than 0"),
        ({"path": "x", "share": 1.5}, "share: input should be less than or equal to 1"),
        ({"path": "x", "shots": -1}, "shots: input should be greater than or equal to 0"),
    ],
)
def test_bad_blocks(block, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(Questions, block, "x.yaml")


def test_a_prompt_longer_than_the_context_is_refused_not_cut(tokenizer, world, asked):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(ConfigError, match=r"the question 'river .*' with its 5 shots has \d+ tokens, the model reads"):
        MultipleChoice(**asked).load(world, CPU)(model, True)


def test_tasks_that_the_harness_knows(files, tokenizer, tmp_path, monkeypatch):
    """Found by name, here in a folder of our own: indexing the harness' own thousands takes long."""
    import datasets
    import lm_eval.tasks

    what = Questions(path=files["test"], shots=5, shots_path=files["dev"])
    write_task(what, tmp_path / "tasks", "known")
    write_task(Questions(path=files["zero"]), tmp_path / "tasks", "zero")
    known = partial(lm_eval.tasks.TaskManager, include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", known)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    by_path, by_name = Benchmark(what, tokenizer), Benchmark(Questions(task="known", shots=5), tokenizer)
    assert [asked.requests for asked in by_name.asked] == [asked.requests for asked in by_path.asked]
    some = Benchmark(Questions(task="known", shots=5, share=0.5), tokenizer)
    assert len(some) == len(by_path) / 2
    assert [asked.requests for asked in some.asked] != [asked.requests for asked in by_name.asked[: len(some)]]
    with pytest.raises(ConfigError, match="zero is made for 0 shots, not 2"):
        build(Questions(task="zero", shots=2))
    with pytest.raises(ConfigError, match="'no_such_task' is not a task of the harness"):
        build(Questions(task="no_such_task"))
    (tmp_path / "tasks" / "zero.test.jsonl").unlink()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ConfigError, match="could not get the data of zero"):
        build(Questions(task="zero"))


def test_some_subjects_of_a_file_that_has_more(tmp_path):
    rows = [
        {"question": f"{s} {i}?", "choices": ["a", "b"], "answer": 0, "subject": s} for s in "xyz" for i in range(4)
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = Questions(path=str(tmp_path / "all.jsonl"), subjects=("z", "x")).by_subject()
    assert {subject: len(questions) for subject, (questions, _) in asked.items()} == {"z": 4, "x": 4}
    with pytest.raises(ConfigError, match="holds no question on 'w'; it has x, y, z"):
        Questions(path=str(tmp_path / "all.jsonl"), subjects=("w",)).check()
    with pytest.raises(ValueError, match="go with `path`"):
        Questions(task="mmlu", subjects=("x",))
