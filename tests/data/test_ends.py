"""How documents begin and end: the family's way, in the stores, in prompts and in the interface, unless told."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import undo
from tests.evaluate.test_multiple_choice import make_tokenizer, put, questions
from tests.foreign import TEXT, qwen, tokenizer_without_bos
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.data.ends import Ends, family_ends, recorded_ends
from undo.data.problems import Problem
from undo.data.store import TokenStore
from undo.evaluate.accuracy import encode
from undo.evaluate.harness import benchmark
from undo.evaluate.questions import Questions
from undo.prepare_data.prepare import Prepare, prepare
from undo.runs.run import Run


def with_unused_bos():
    """As GPT-2, Phi and SmolLM2: there is a token, and the tokenizer does not put it anywhere by itself."""
    tokenizer = tokenizer_without_bos()
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


@pytest.mark.parametrize(
    ("made", "ends"),
    [
        (tokenizer_without_bos, Ends(None, 297)),
        (with_unused_bos, Ends(None, 297)),
        (lambda: make_tokenizer(400), Ends(1, 2)),
    ],
    ids=["qwen", "phi", "gemma"],
)
def test_the_family_s_convention_is_what_its_tokenizer_does(made, ends):
    assert family_ends(made()) == ends


def test_documents_can_be_enclosed_otherwise():
    assert family_ends(with_unused_bos(), add_bos=True) == Ends(298, 297)
    assert family_ends(make_tokenizer(400), add_bos=False, add_eos=False) == Ends(None, None)
    with pytest.raises(ConfigError, match="add_bos=true, but the tokenizer has no token for the beginning"):
        family_ends(tokenizer_without_bos(), add_bos=True)
    assert Ends(None, None).enclose([5, 6]).tolist() == [5, 6]


def test_an_answer_is_found_without_a_beginning():
    tokenizer = tokenizer_without_bos()
    problem = Problem("addition", "equation", "The sea", " is")
    for ends, before in ((Ends(None, 297), 0), (Ends(298, 297), 1)):
        ids, start = encode(problem, tokenizer, ends)
        assert start == len(tokenizer("The sea")["input_ids"]) + before
        assert tokenizer.decode(ids[start:-1]) == " is"


@pytest.mark.parametrize("given", [{}, {"add_bos": True}, {"add_eos": False}], ids=["family", "bos", "no eos"])
def test_one_convention_for_stores_and_prompts(tmp_path, given):
    with_unused_bos().save_pretrained(tmp_path / "tokenizer")
    documents = {role: [f"{role} {i} {TEXT}" for i in range(40)] for role in ("retain", "forget")}
    for role, texts in documents.items():
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raw = {"name": "data", "data": {role: {"path": str(tmp_path / f"{role}.jsonl")} for role in documents}}
    raw |= {"tokenizer": str(tmp_path / "tokenizer"), "length": 128, "shortest": 5, "validation_share": 0.2}
    runs = {}
    for name, changes in (("data", given), ("more", {"tokenizer": None, "tokenizer_from": "prepare/data"})):
        config = validate(Prepare, {**raw, **changes, "name": name}, "test")
        run = runs[name] = Run(tmp_path, "tiny", f"prepare/{name}")
        run.claim(config)
        run.open(config)
        prepare(config, run)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ends = family_ends(tokenizer, **given)
    pieces = {}
    for name, run in runs.items():
        assert (run.facts["bos"], run.facts["eos"]) == recorded_ends(run, tokenizer) == ends
        store = TokenStore(run.folder / "train/retain")
        pieces[name] = [piece.tolist() for row in range(len(store)) for piece in store[row]]
        expected = [ends.enclose(tokenizer(text)["input_ids"]).tolist() for text in documents["retain"]]
        assert all(piece in expected for piece in pieces[name])
    assert pieces["data"] == pieces["more"]

    asked = Questions(path=put(tmp_path / "asked.jsonl", questions(6, 0)))
    for request in (r for a in benchmark(asked, runs["data"].folder, 4).asked for r in a.requests):
        assert (request.context[0] == 298) == (ends.bos is not None)
        assert 298 not in request.context[1:]


def test_the_interface_follows_the_family_too(tmp_path):
    model, tokenizer = qwen(tmp_path), tokenizer_without_bos()
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    mine = undo.evaluate(model, tokenizer, text=[TEXT])["text"]
    with torch.no_grad():
        theirs = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert np.isfinite(mine)
