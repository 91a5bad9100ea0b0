"""The prepare stage on texts: tokenizer, split by document, stores, and what it refuses."""

import json
import os
import signal
import sys
import unicodedata

import numpy as np
import pytest
from transformers import AutoTokenizer

from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.data.ends import family_ends
from undo.data.store import StoreWriter, TokenStore
from undo.lm.tokens import token_ids
from undo.prepare_data import documents as tokenising
from undo.prepare_data import split
from undo.prepare_data.prepare import Prepare, prepare
from undo.prepare_data.text import Source
from undo.runs.run import Run
from undo.unlearn import stage as run_unlearn

WORDS = {"retain": ["river", "stone", "light", "paper", "seven"], "forget": ["강물이", "돌", "빛", "종이를", "일곱"]}
DOCUMENTS = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two roles of documents, each beginning with a number of its own; every tenth has less than 50 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for role, words in WORDS.items():
        with open(folder / f"{role}.jsonl", "w") as file:
            for i in range(DOCUMENTS):
                count = 5 if i % 10 == 0 else int(rng.integers(60, 200))
                text = f"<{1000 + i}> " + " ".join(rng.choice(words, count))
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return folder


def make(folder, corpus, **changes) -> Run:
    raw = {
        "name": "data",
        "data": {role: {"path": str(corpus / f"{role}.jsonl")} for role in WORDS},
        "tokenizer": {"name": "byte_pairs", "vocab_size": 300},
        "length": 64,
        "validation_share": 0.2,
    }
    config = validate(Prepare, {**raw, **changes}, "test")
    run = Run(folder, "tiny", "prepare/data")
    run.claim(config)
    run.open(config)
    prepare(config, run)
    return run


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs"), corpus)


def texts(run, part, role) -> list[str]:
    """Whole documents, put together again from the pieces of the store."""
    tokenizer, store = AutoTokenizer.from_pretrained(run.folder / "tokenizer"), TokenStore(run.folder / part / role)
    return [tokenizer.decode(np.concatenate([*store[row]])) for row in range(len(store))]


def numbers(run, part, role) -> set[int]:
    joined = "".join(texts(run, part, role))
    return {n for n in range(1000, 1000 + DOCUMENTS) if f"<bos><{n}>" in joined}


PAIRS = [{"q": f"how to {n} a lock? ", "harm": f"take {n} picks", "safe": f"take {n} keys and wait"} for n in range(40)]


def test_of_pairs_the_tokens_are_marked_that_the_other_answer_does_not_have(tmp_path, corpus):
    rows = [{"forget": pair["q"] + pair["harm"], "safe": pair["q"] + pair["safe"]} for pair in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"path": str(tmp_path / "pairs.jsonl"), "column": "forget", "paired_with": "safe"}
    run = make(
        tmp_path,
        corpus,
        data={"retain": {"path": str(corpus / "retain.jsonl")}, "forget": pairs},
        shortest=5,
        tokenizer={"name": "byte_pairs", "vocab_size": 280},
    )
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    assert not TokenStore(run.folder / "train/retain").paired
    seen = 0
    for part in ("train", "validation"):
        store = TokenStore(run.folder / part / "forget")
        assert store.paired
        for batch in store.batches(range(len(store)), 8):
            for ids, document, marked in zip(batch.input_ids, batch.document, batch.marked, strict=True):
                for number in document.unique():
                    text = tokenizer.decode(ids[document == number], skip_special_tokens=True)
                    if not text.strip("<unk>"):
                        continue  # padding
                    pair = next(row for row in rows if row["forget"] == text)
                    one, two = (tokenizer(pair[key], add_special_tokens=False)["input_ids"] for key in pair)
                    one, two = [0, *one, -1], [0, *two, -1]  # as between <bos> and <eos>
                    expected = [i >= len(two) or one[i] != two[i] for i in range(len(one))]
                    assert marked[document == number].tolist() == expected
                    assert 0 < sum(expected) < len(expected) / 2 + 1
                    seen += 1
    assert seen == len(PAIRS)


def test_a_method_of_pairs_refuses_other_data_before_it_loads_a_model(prepared):
    raw = {"name": "x", "variant": "x", "seed": 0, "data": "prepare/data", "reference": "pretrain/none"}
    raw |= {"training": {"steps": 1, "batch_rows": 1, "learning_rate": 1e-3, "evaluate_every": 1}}
    raw |= {"evaluation": {"name": "cross_entropy", "rows": 1}, "method": {"name": "repnoise", "preset": "official"}}
    with pytest.raises(ConfigError, match=r"prepare/data are not pairs\n.*data\.forget\.paired_with"):
        list(run_unlearn.unlearn(validate(run_unlearn.Unlearn, raw, "test"), prepared))


def test_split_by_document_without_loss_or_overlap(prepared):
    for role in WORDS:
        train, validation = (numbers(prepared, part, role) for part in ("train", "validation"))
        long_enough = {1000 + i for i in range(DOCUMENTS) if i % 10}
        assert train | validation == long_enough
        assert not train & validation
        assert 8 <= len(validation) <= 40  # a fifth of 108
        stored = sum(TokenStore(prepared.folder / part / role).tokens for part in ("train", "validation"))
        tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")
        source = Source(path=prepared.config["data"][role]["path"]).texts()
        counted = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 for text in source]
        assert stored == sum(n for n in counted if n >= 50)


def test_decoding_the_made_tokenizer_is_exact_and_digits_stand_alone(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")
    for text in ("강물이 river 돌\n\n  3 + 47 = 50", "emoji 🙂 tab\t."):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("47", add_special_tokens=False)["input_ids"]) == ["4", "7"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


def test_frequent_numbers_can_be_one_token(corpus, tmp_path):
    text = "\n".join(f"{n} + 47 = 50" for n in range(300))
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps({"text": f"{i}\n{text}"}) + "\n" for i in range(20)))
    data = {role: {"path": str(file / f"{role}.jsonl")} for role, file in (("retain", tmp_path), ("forget", corpus))}
    tokenizer = {"name": "byte_pairs", "vocab_size": 300, "split_digits": False}
    run = make(tmp_path, corpus, data=data, tokenizer=tokenizer, validation_share=0.5)
    made = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    assert len(made(" 47", add_special_tokens=False)["input_ids"]) == 1


def test_control_tokens_that_are_spelled_in_a_document_are_text(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")
    spelled = [f"before {token} after" for token in tokenizer.all_special_tokens]
    assert len(spelled) == 4
    for text, ids in zip(spelled, token_ids(spelled, tokenizer), strict=True):
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer(spelled[0])["input_ids"] != token_ids(spelled, tokenizer)[0]  # the library's default is another


def test_a_long_document_is_tokenised_in_pieces_and_stays_one(prepared, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")
    texts = ["river stone light\npaper seven " * 40, "short", "x" * 300, ""]
    ends = family_ends(tokenizer)
    whole = [document.ids.tolist() for document in tokenising.documents(texts, tokenizer, ends, "x")]
    asked = []
    monkeypatch.setattr(tokenising, "PIECE", 100)
    monkeypatch.setattr(tokenising, "CHARACTERS_AT_ONCE", 500)
    monkeypatch.setattr(tokenising, "token_ids", lambda some, own: asked.append(some) or token_ids(some, own))
    cut = [document.ids.tolist() for document in tokenising.documents(texts, tokenizer, ends, "x")]
    assert cut[:2] + cut[3:] == whole[:2] + whole[3:]
    assert tokenizer.decode(cut[2][1:-1]) == texts[2]  # without a blank the seam is anywhere
    assert max(len(piece) for some in asked for piece in some) <= 100
    assert max(sum(map(len, some)) for some in asked) < 600


def write(file, texts) -> str:
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return str(file)


def test_copies_of_a_document_are_on_one_side(corpus, prepared, tmp_path, capsys):
    """Each document of one role twice; the other role stays as it is, byte by byte."""
    every = list(Source(path=str(corpus / "retain.jsonl")).texts())
    twice = write(tmp_path / "twice.jsonl", [*every, *(f" {text}\n" for text in every)])  # blanks around do not count
    data = {"retain": {"path": twice}, "forget": {"path": str(corpus / "forget.jsonl")}}
    run = make(tmp_path, corpus, data=data, tokenizer=str(prepared.folder / "tokenizer"))
    assert numbers(run, "validation", "retain") == numbers(prepared, "validation", "retain")
    assert not numbers(run, "validation", "retain") & numbers(run, "train", "retain")
    assert stored(run, "forget") == stored(prepared, "forget")
    held_out = len(numbers(run, "validation", "retain"))
    facts = run.facts["documents"]["retain"]
    assert facts == {"read": 240, "short": 24, "left_out": held_out, "apart": 0, "copies": 108 - held_out}
    assert f"{108 - held_out} of {2 * (108 - held_out)} documents are copies of others" in capsys.readouterr().out
    assert run.facts["documents"]["forget"] == {"read": 120, "short": 12, "left_out": 0, "apart": 0, "copies": 0}


def test_documents_of_two_roles_are_counted_and_equal_roles_refused(corpus, prepared, tmp_path, capsys):
    every = list(Source(path=str(corpus / "retain.jsonl")).texts())
    tokenizer = str(prepared.folder / "tokenizer")
    both = write(tmp_path / "both.jsonl", [*Source(path=str(corpus / "forget.jsonl")).texts(), *every[:31]])
    data = {"retain": {"path": str(corpus / "retain.jsonl")}, "forget": {"path": both}}
    run = make(tmp_path / "some", corpus, data=data, tokenizer=tokenizer)
    assert run.facts["shared"] == {"retain, forget": 27}  # of 31, without the short ones
    assert "27 documents are in retain (108) and in forget (135)" in capsys.readouterr().out
    assert not (run.folder / "fingerprints").exists()
    copied, reordered = write(tmp_path / "copied.jsonl", every), write(tmp_path / "reordered.jsonl", every[::-1])
    (tmp_path / "copied.jsonl").write_bytes((corpus / "retain.jsonl").read_bytes())
    for number, other in enumerate((str(corpus / "retain.jsonl"), copied, reordered)):
        data["forget"] = {"path": other}
        said = "hold the same 108 documents" if other == reordered else "are the same text"
        with pytest.raises(ConfigError, match=f"data.retain and data.forget {said}"):
            make(tmp_path / str(number), corpus, data=data, tokenizer=tokenizer)
        assert (tmp_path / f"{number}/tiny/prepare/data/tokenizer").exists() == (other == reordered)


def test_letters_taken_apart_are_said_with_their_share(corpus, prepared, tmp_path, capsys):
    texts = [unicodedata.normalize("NFD", text) for text in Source(path=str(corpus / "forget.jsonl")).texts()]
    data = {"retain": {"path": str(corpus / "retain.jsonl")}, "forget": {"path": write(tmp_path / "a.jsonl", texts)}}
    tokenizer = str(prepared.folder / "tokenizer")
    apart = make(tmp_path / "apart", corpus, data=data, tokenizer=tokenizer)
    said = "data.forget: 100% of the documents have letters taken apart"
    assert said in capsys.readouterr().out
    assert [note[: len(said)] for note in validate(Prepare, apart.config, "test").notes()] == [said]
    assert apart.facts["documents"]["forget"]["apart"] == DOCUMENTS
    data["forget"]["normalise"] = "NFC"
    together = make(tmp_path / "together", corpus, data=data, tokenizer=tokenizer)
    assert "taken apart" not in capsys.readouterr().out
    assert not list(validate(Prepare, together.config, "test").notes())
    assert stored(together, "forget") == stored(prepared, "forget")
    assert apart.facts["tokens"]["train/forget"] > 1.5 * together.facts["tokens"]["train/forget"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"column": "body"}, "data.forget: .* line 1: has no column 'body'; it has text"),
        ({"path": "there.csv"}, "data.forget: there.csv: is empty"),
        ({"path": "gone.jsonl"}, "data.forget: gone.jsonl: there is no such file\n.*prepare.data.forget.path="),
        ({"documents": 3}, "data.forget: no document of 50 tokens or more of 2 at most is left for validation"),
    ],
)
def test_the_last_role_is_refused_before_the_first_is_read(change, said, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("")
    monkeypatch.setattr("undo.prepare_data.prepare.make_tokenizer", lambda *_: pytest.fail("it has begun"))
    forget = {"path": str(corpus / "forget.jsonl"), **change}
    with pytest.raises(ConfigError, match=said):
        make(tmp_path, corpus, data={"retain": {"path": str(corpus / "retain.jsonl")}, "forget": forget})


def test_the_split_depends_on_the_seed_alone(corpus, prepared, tmp_path):
    again = make(tmp_path / "a", corpus)
    other = make(tmp_path / "b", corpus, seed=43)
    assert numbers(again, "validation", "retain") == numbers(prepared, "validation", "retain")
    assert numbers(other, "validation", "retain") != numbers(prepared, "validation", "retain")


def test_token_budgets_of_training_and_validation(corpus, tmp_path):
    data = {role: {"path": str(corpus / f"{role}.jsonl"), "tokens": 6000} for role in WORDS}
    run = make(tmp_path, corpus, data=data, validation_tokens=150)
    for role in WORDS:
        assert 6000 <= TokenStore(run.folder / "train" / role).tokens < 6000 + 1000  # the document that reaches it
        assert TokenStore(run.folder / "validation" / role).tokens == 150


def test_an_existing_tokenizer_and_english_beside_the_arithmetic_world(corpus, prepared, tmp_path):
    world = {"name": "arithmetic", "problems": 400, "largest_term": 8, "largest_factor": 5, "validation_per_cell": 4}
    run = make(
        tmp_path,
        corpus,
        world=world,
        data={"auxiliary": {"path": str(corpus / "retain.jsonl")}},
        tokenizer=str(prepared.folder / "tokenizer"),
    )
    assert set(run.facts["tokens"]) == {
        f"{p}/{r}" for p in ("train", "validation") for r in ("retain", "forget", "auxiliary")
    }
    assert len((run.folder / "problems.jsonl").read_text().splitlines()) == 32
    assert run.facts["vocab_size"] == 300
    assert any("=" in text for text in texts(run, "train", "forget"))


def stored(run, role="*") -> dict[str, bytes]:
    return {str(file.relative_to(run.folder)): file.read_bytes() for file in sorted(run.folder.glob(f"*/{role}/*"))}


@pytest.mark.parametrize("moment", ["reading", "budget reached", "between the stores"])
def test_killed_while_it_reads(corpus, tmp_path, monkeypatch, moment):
    """SIGKILL; then only what was not yet written is tokenised, and the stores are those of an undisturbed run."""
    monkeypatch.setattr("undo.data.store.WINDOW", 20)
    monkeypatch.setattr(tokenising, "TEXTS_AT_ONCE", 5)
    budget = {"tokens": 6000} if moment == "budget reached" else {}
    data = {role: {"path": str(corpus / f"{role}.jsonl"), **budget} for role in WORDS}
    undisturbed = stored(make(tmp_path / "undisturbed", corpus, data=data))
    if (child := os.fork()) == 0:
        if moment == "reading":
            reading = Source.texts

            def dying(source):
                for number, text in enumerate(reading(source)):
                    if number == 77 and sys._getframe(1).f_code.co_name == "batched":
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield text

            monkeypatch.setattr(Source, "texts", dying)
        elif moment == "budget reached":
            add = StoreWriter.add

            def dying_add(writer, documents, state):
                if not documents:
                    os.kill(os.getpid(), signal.SIGKILL)
                add(writer, documents, state)

            monkeypatch.setattr(StoreWriter, "add", dying_add)
        else:
            monkeypatch.setattr(StoreWriter, "finish", lambda writer: os.kill(os.getpid(), signal.SIGKILL))
        make(tmp_path / "killed", corpus, data=data)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list((tmp_path / "killed").rglob("train/*/store.json"))
    tokenised = []
    tokenise = split.documents

    def counting(texts, *rest):
        some = list(texts)
        tokenised.append(len(some))
        return tokenise(iter(some), *rest)

    monkeypatch.setattr(split, "documents", counting)
    assert stored(make(tmp_path / "killed", corpus, data=data)) == undisturbed
    if moment == "reading":  # three windows of 20 long documents, and a few short and held-out ones, had been written
        assert tokenised[0] < DOCUMENTS - 40
    else:  # the other role alone
        assert tokenised == [DOCUMENTS]


def test_text_that_changed_between_two_attempts_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("undo.data.store.WINDOW", 20)
    file = tmp_path / "retain.jsonl"
    lines = (corpus / "retain.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:80], "{broken\n", *lines[80:]]))
    data = {"retain": {"path": str(file)}, "forget": {"path": str(corpus / "forget.jsonl")}}
    tokenizer = str(make(tmp_path / "first", corpus).folder / "tokenizer")
    monkeypatch.setattr(tokenising, "TEXTS_AT_ONCE", 5)
    with pytest.raises(ConfigError, match=r"retain\.jsonl line 81: is not JSON"):
        make(tmp_path / "runs", corpus, data=data, tokenizer=tokenizer)
    file.write_text("".join(lines[10:]))
    with pytest.raises(ConfigError, match="the text has changed since it was read in part"):
        make(tmp_path / "runs", corpus, data=data, tokenizer=tokenizer)
    file.write_text("".join(lines))
    made = make(tmp_path / "runs", corpus, data=data, tokenizer=tokenizer)
    assert stored(made) == stored(make(tmp_path / "undisturbed", corpus, data=data, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {}}, "data.retain is missing"),
        ({"world": {"name": "arithmetic"}}, "but the world generates it"),
        ({"tokenizer": {"name": "words", "vocab_size": 300}}, "knows a world's own words only"),
        ({"tokenizer": "/nowhere/tokenizer"}, "neither a folder with a tokenizer nor a hub id"),
        ({"tokenizer": {"name": "byte_pairs", "vocab_size": 90_000}}, "tokens only; set tokenizer.vocab_size"),
        ({"tokenizer": "./nowhere"}, "hub id: there is no such folder"),
        ({"tokenizer": "."}, "hub id: it holds no tokenizer.json"),
        ({"validation_share": 0.0}, "validation_share: input should be greater than 0"),
        ({"validation_share": 1e-9}, "of 108 at most is left for validation"),
        ({"shortest": 5000}, "is left for training"),
        ({"length": 1}, "length: input should be greater than or equal to 2"),
    ],
)
def test_refusals(changes, said, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as error:
        make(tmp_path, corpus, **changes)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "tiny/prepare/data/run.json").exists()


def test_no_room_on_the_disk_is_said_before_anything_is_read(corpus, tmp_path, capsys):
    assert Source(path=str(corpus / "retain.jsonl"), tokens=10**15).bytes_of_tokens(2) < 10**6  # a small file
    data = {role: {"hub": f"someone/{role}", "tokens": 10**15} for role in WORDS}
    with pytest.raises(ConfigError, match="GB are free"):
        make(tmp_path, corpus, data=data)
    assert "needs at most about" in capsys.readouterr().out
