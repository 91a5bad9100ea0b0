"""Datasets of the hub, read over HTTP from a stand-in of it on this machine, and from the files that a mirror names."""

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from undo.config import mirror
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.evaluate.questions import Questions
from undo.prepare_data.preconditions import reach
from undo.prepare_data.prepare import Prepare, prepare
from undo.prepare_data.text import Source
from undo.prepare_models.pretrained import Base
from undo.runs.run import Run

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = [f"document {n} says that {n} and {n} are {2 * n}" for n in range(60)]
ASKED = [{"question": f"{n}?", "choices": ["a", "b"], "answer": n % 2, "subject": "letters"} for n in range(8)]


def table(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two datasets as the hub lays them out: <owner>/<name>/<subset>/<split>-00000-of-00001.parquet."""
    folder = tmp_path_factory.mktemp("hub")
    table(folder / "some/text/english/train-00000-of-00001.parquet", [{"text": text} for text in TEXTS])
    for split, rows in (("test", ASKED[2:]), ("dev", ASKED[:2])):
        table(folder / f"some/questions/all/{split}-00000-of-00001.parquet", rows)
    for name, subset, splits in (("text", "english", ["train"]), ("questions", "all", ["test", "dev"])):
        data_files = [{"split": split, "path": f"{subset}/{split}-*"} for split in splits]
        card = {"configs": [{"config_name": subset, "data_files": data_files}]}
        (folder / f"some/{name}/README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return folder


@pytest.fixture(scope="module")
def hub(files: Path):
    """What the library asks of the hub: a dataset's facts, its list of files, and the files, whole or in part."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            if length := int(self.headers.get("Content-Length", 0)):
                asked = self.rfile.read(length).decode()
            _, *parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).split("/")
            if parts[:1] == ["api"]:
                parts = parts[1:]
            repo = files.joinpath(*parts[1:3])
            if "gated" in parts:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            if parts[:1] != ["datasets"] or not repo.is_dir():
                return self.answer(401, b"{}", X_Error_Code="RepoNotFound")

            def entry(file: Path) -> dict:
                named = {"path": str(file.relative_to(repo)), "oid": f"{hash(file) % 2**64:040x}"}
                if file.is_dir():
                    return {"type": "directory", **named}
                return {"type": "file", "size": file.stat().st_size, **named}

            match parts[3:]:
                case ["resolve", _, *rest] if (file := repo.joinpath(*rest)).is_file():
                    body, etag = file.read_bytes(), f'"{file.name}"'
                    if (part := self.headers.get("Range")) and self.command != "HEAD":
                        first, _, last = part.removeprefix("bytes=").partition("-")
                        cut = body[int(first) : int(last or len(body) - 1) + 1]
                        span = f"bytes {first}-{int(first) + len(cut) - 1}/{len(body)}"
                        return self.answer(206, cut, ETag=etag, Content_Range=span)
                    return self.answer(200, body, ETag=etag)
                case [] | ["revision", _]:
                    names = [{"rfilename": str(file.relative_to(repo))} for file in repo.rglob("*.*")]
                    facts = {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": names, "tags": [], "private": False}
                    return self.answer(200, json.dumps(facts).encode())
                case ["tree", _, *rest] if (folder := repo.joinpath(*rest)).is_dir():
                    return self.answer(200, json.dumps([entry(file) for file in sorted(folder.iterdir())]).encode())
                case ["paths-info", _]:
                    names = (
                        urllib.parse.parse_qs(asked).get("paths", []) if "=" in asked else json.loads(asked)["paths"]
                    )
                    there = [entry(repo / name) for name in names if (repo / name).exists()]
                    return self.answer(200, json.dumps(there).encode())
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")

        do_HEAD = do_POST = do_GET  # noqa: N815

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


READ = """
import json, os, sys
from undo.config.mistakes import ConfigError
from undo.evaluate.questions import Questions
from undo.prepare_data.text import Source

def tried(read):
    try:
        return read()
    except ConfigError as error:
        return str(error)

def texts(**keys):
    return tried(lambda: list(Source(**keys).texts()))

asked = Questions(hub="some/questions", subset="all", shots=2, shots_split="dev")
print(json.dumps({
    "all": texts(hub="some/text", subset="english", revision=sys.argv[1]),
    "some": texts(hub="some/text", subset="english", share=0.5, documents=7),
    "questions": tried(asked.by_subject),
    "absent": texts(hub="some/thing"),
    "gated": texts(hub="some/gated"),
    "subset": texts(hub="some/text", subset="korean"),
    "split": texts(hub="some/text", subset="english", split="test"),
    "column": texts(hub="some/text", subset="english", column="body"),
}), flush=True)
os._exit(0)  # the library leaves threads behind that may abort an interpreter that ends
"""


def test_what_is_read_from_the_hub(hub, files, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", READ, COMMIT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    same = Source(path=str(files / "some/text/english/*"), share=0.5, documents=7)
    assert found["all"] == TEXTS
    assert found["some"] == list(same.texts())
    ((questions, shots),) = found["questions"].values()
    assert [q[0] for q in shots] == ["0?", "1?"]
    assert [q[2] for q in questions] == [0, 1, 0, 1, 0, 1]
    assert "there is no such dataset" in found["absent"]
    assert "is gated: ask for access at" in found["gated"]
    assert (
        found["subset"] == "some/text:korean: cannot be read: BuilderConfig 'korean' not found. Available: ['english']"
    )
    assert found["split"] == "some/text:english: cannot be read: Bad split: test. Available splits: ['train']"
    assert found["column"] == "some/text:english: has no column 'body'; it has text"


# --- the mirror ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mirrored(tmp_path, monkeypatch):
    """A function of a mirror's text: from then on it is used."""

    def write(text: str) -> Path:
        file = tmp_path / "mirror.yaml"
        file.write_text(text)
        monkeypatch.setenv(mirror.VARIABLE, str(file))
        mirror._read.cache_clear()
        mirror.use(None)
        return file

    monkeypatch.delenv(mirror.VARIABLE, raising=False)
    return write


def test_files_stand_for_a_dataset(mirrored, files, tmp_path):
    (tmp_path / "tofu").mkdir()
    (tmp_path / "tofu/forget10.jsonl").write_text('{"text": "an author"}\n')
    (tmp_path / "plain.txt").write_text("one\n\ntwo\n")
    mirrored(f"""
some/text: plain.txt
some/text:english: {files}/some/text/english/*.parquet
some/questions:all: {{test: {files}/some/questions/all/test-*, dev: {files}/some/questions/all/dev-*}}
some/authors: tofu
""")
    assert list(Source(hub="some/text", subset="english", split="anything").texts()) == TEXTS
    assert list(Source(hub="some/text", subset="other").texts()) == ["one\n", "two\n"]
    assert list(Source(hub="some/authors", subset="forget10").texts()) == ["an author"]
    assert Source(hub="some/text").label == "some/text (mirrored by plain.txt)"
    asked = Questions(hub="some/questions", subset="all", shots=2, shots_split="dev")
    asked.check()
    ((questions, shots),) = asked.by_subject().values()
    assert [question.question for question in (*shots, *questions)] == [f"{n}?" for n in range(8)]
    assert Source(hub="some/text", path=str(tmp_path / "tofu/*")).label.endswith("tofu/*")  # one's own files first
    with pytest.raises(ConfigError, match=r"mirror\.yaml: some/questions:all has no train; it has test, dev"):
        Source(hub="some/questions", subset="all").files()


def test_a_folder_stands_for_a_model_if_it_holds_one(mirrored, tmp_path):
    mirrored("google/tokenizer: tokenizer\ngoogle/model: model\n")
    for name in ("tokenizer", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert Base(name="base", model="google/model").place == str(tmp_path / "model")
    assert Base(name="base", model="google/tokenizer").place == "google/tokenizer"
    assert mirror.stand_in("google/tokenizer") == str(tmp_path / "tokenizer")
    assert mirror.stand_in("google/other") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a, b]", "empty or not a mapping"),
        ("fineweb: a.txt", r"'fineweb': a mirror's lines are owner/name: FILE"),
        ("some/text: [a.txt]", r"'some/text': a mirror's lines are"),
        ("some/text: {}", r"'some/text': a mirror's lines are"),
        ("some/text: {train: 3}", r"'some/text': a mirror's lines are"),
        ("some/text: a: b", "line 1 not valid YAML"),
    ],
)
def test_what_is_no_mirror_is_refused(mirrored, text, says):
    with pytest.raises(ConfigError, match=says):
        mirrored(text)


def test_where_the_hub_is_not_reached_both_ways_out_are_named(mirrored, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'some/text' on the Hub (LocalEntryNotFoundError)\nmore of it")

    def wordless(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for reads in (lambda: next(Source(hub="some/text").texts()), Questions(hub="some/text").by_subject):
        with pytest.raises(ConfigError) as error:
            reads()
        reason, way_out = str(error.value).splitlines()
        assert reason == "some/text: cannot be read: Couldn't reach 'some/text' on the Hub (LocalEntryNotFoundError)"
        assert "no network? --mirror FILE names local files" in way_out
    raw = {"name": "x", "data": {role: {"hub": f"some/{role}"} for role in ("retain", "forget")}, "length": 32}
    with pytest.raises(ConfigError) as error:
        reach(validate(Prepare, raw | {"tokenizer": {"name": "byte_pairs", "vocab_size": 280}}, "mine.yaml"))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("data.retain: some/retain: cannot be read: Couldn't reach")
    assert lines[2] == "give your own files with prepare.data.retain.path=... (run_prepare.py: without `prepare.`)"
    monkeypatch.setattr(datasets, "load_dataset", wordless)
    with pytest.raises(ConfigError, match="some/text: cannot be read: TimeoutError\n"):
        next(Source(hub="some/text").texts())
    file = mirrored("other/text: text.jsonl")
    with pytest.raises(ConfigError, match=rf"{file} has no entry for it"):
        next(Source(hub="some/text").texts())


def test_a_run_records_what_was_mirrored(mirrored, tmp_path):
    for role in ("english", "korean"):
        lines = (json.dumps({"text": f"{role}: {text} and so on"}) + "\n" for text in TEXTS)
        (tmp_path / f"{role}.jsonl").write_text("".join(lines))
    mirrored("some/english: english.jsonl\nsome/korean: {train: korean.jsonl}\n")
    raw = {
        "name": "data",
        "data": {"retain": {"hub": "some/english", "documents": 40}, "forget": {"hub": "some/korean"}},
        "tokenizer": {"name": "byte_pairs", "vocab_size": 280},
        "length": 32,
        "shortest": 2,
        "validation_share": 0.2,
    }
    config, run = validate(Prepare, raw, "mine.yaml"), Run(tmp_path / "runs", "mine", "prepare/data")
    run.claim(config)
    run.open(config)
    prepare(config, run)
    assert run.facts["sources"] == {
        "retain": "some/english (mirrored by english.jsonl)",
        "forget": "some/korean (mirrored by korean.jsonl)",
    }


def test_a_mirror_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(mirror.VARIABLE, "")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        mirror.use(tmp_path / "none.yaml")
