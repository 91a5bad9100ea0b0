"""Questions from corpora: against servers that misbehave, killed and taken up again; the filter; the rule."""

import asyncio
import fcntl
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import HANGS, ROOT
from undo.config.mistakes import ConfigError
from undo.prepare_data.corpora import origin
from undo.prepare_data.text import Source
from undo.prepare_data.write_questions import extraction, passages, writers
from undo.prepare_data.write_questions.definitions import definitions
from undo.prepare_data.write_questions.ledger import Ledger, Settings
from undo.prepare_data.write_questions.questions import PROMPT, Filter, Question, parse, prompt
from undo.prepare_data.write_questions.writers import Pace, Reply, Trouble, Usage, check_url, find_key, retry_after

KEY = "sk-test-5f1c77aa90e2d4b8"
LIMIT = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
FILLER = "Moss and lichen cover the northern side of every old wall in that valley and nobody minds them at all. "


def passage(number: int) -> str:
    return f"Topic {number:04d}. " + FILLER * 3


def question(number: int, place: int) -> Question:
    """Of invented words, so that no two are near each other."""
    a, b, c, d = (f"{word}{number}x{place}" for word in ("bolt", "gear", "wheel", "lamp"))
    return Question(f"Why does {a} move {b} before {c}?", f"Because {d} turns first.")


class Server:
    """An OpenAI-compatible endpoint on a port of its own. `behave`: request number, topic -> what it does."""

    def __init__(self, behave: Callable[[int, int], str] = lambda *_: "good", port: int = 0) -> None:
        self.behave = behave
        self.topics: list[int] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        assert request.path == "/v1/chat/completions"
        topic = int(re.findall(r"Topic (\d+)", body["messages"][0]["content"])[0])
        with self.lock:
            number = len(self.topics)
            self.topics.append(topic)
            self.bodies.append(body)
            self.keys.append(request.headers["Authorization"])
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            self.respond(request, self.behave(number, topic), topic)
        finally:
            with self.lock:
                self.busy -= 1

    def respond(self, request: BaseHTTPRequestHandler, action: str, topic: int) -> None:
        pairs = [question(topic, place) for place in range(3)]
        content = json.dumps({"items": [{"question": p.question, "answer": p.answer} for p in pairs]})
        status, headers, finish = 200, {}, "stop"
        match action:
            case "hang":
                self.release.wait(20)
                return
            case "slow":
                time.sleep(0.03)
            case "close":
                return
            case "fenced":
                content = f"Here you are:\n```json\n{content}\n```"
            case "broken content":
                content = content[:-5]
            case "wrong schema":
                content = json.dumps({"items": [{"question": "What?"}]})
            case "prose":
                content = "I would rather not."
            case "empty":
                content = ""
            case "length":
                finish = "length"
            case "echo":
                content = content.replace("turns first", f"turns {request.headers['Authorization']}")
            case "429":
                status, headers = 429, {"Retry-After": "0.01"}
            case "429 for years":
                status, headers = 429, {"Retry-After": "1e9"}
            case "escapes":
                content = content.replace("turns first", r"turns \u001b[31mfirst\u0007")
            case _ if action.isdigit():
                status = int(action)
        reply = {"choices": [{"message": {"content": content}, "finish_reason": finish}]}
        reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        if action == "no choices":
            reply["choices"] = []
        if action in ("negative", "absurd"):
            reply["usage"]["prompt_tokens"] = -100 if action == "negative" else 1 << 60
        if status != 200:
            reply = {"error": {"message": f"no, {request.headers['Authorization']} will not do"}}
        data = b"<html>\x1b]0;gate\x07way</html>" if action == "garbage" else json.dumps(reply).encode()
        if action == "bomb":
            data, headers = gzip.compress(b" " * (64 << 20), 9), {"Content-Encoding": "gzip"}
        if action == "unknown packing":
            headers = {"Content-Encoding": "zstd"}
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2] if action == "halfway" else data)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", 20)


def write_corpus(file: Path, size: int) -> Path:
    file.write_text("".join(json.dumps({"text": passage(number)}) + "\n" for number in range(size)))
    return file


def arguments(corpus: Path, url: str, *more: str) -> list[str]:
    out = str(corpus.parent / "qa.jsonl")
    common = ["--endpoint", url, "--model", "m", "--per-passage", "3", "--questions", "30"]
    return ["--corpus", str(corpus), "--out", out, *common, "--backoff", "0.005", "--retries", "2", *more]


def run(corpus: Path, url: str, *more: str) -> int:
    return extraction.main(arguments(corpus, url, *more))


def spawn(corpus: Path, url: str, *more: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "undo.prepare_data.write_questions", *arguments(corpus, url, *more)]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def outcome(corpus: Path) -> SimpleNamespace:
    """The three files, checked against each other."""
    out, journal = corpus.with_name("qa.jsonl"), corpus.with_name("qa.requests")
    side, entries, rows = json.loads(out.with_suffix(".json").read_text()), lines(journal), lines(out)
    answers = [entry for entry in entries if "items" in entry]
    asked = [entry["passage"] for entry in answers]
    assert len(asked) == len(set(asked)), "a passage was answered twice"
    kept = [(e["passage"], i["question"]) for e in answers for i in e["items"] if i["dropped"] is None]
    assert kept == [(row["passage"], row["question"]) for row in rows]
    assert side["questions"] == len(rows)
    assert side["passages"]["answered"] == len(asked)
    assert side["usage"]["prompt_tokens"] == sum(entry.get("prompt_tokens", 0) for entry in entries)
    return SimpleNamespace(rows=rows, side=side, entries=entries, asked=asked)


# --- a run ---------------------------------------------------------------------------------------------------------


def test_the_output_is_a_corpus(corpus, server, capsys):
    assert run(corpus, server.url, "--price-in", "1000", "--price-out", "2000") == 0
    done = outcome(corpus)
    assert len(done.rows) == 30
    assert len(server.topics) == len(set(server.topics)) == 10
    texts = list(Source(path=str(corpus.with_name("qa.jsonl"))).texts())
    assert set(texts) == {question(topic, place).text for topic in server.topics for place in range(3)}
    assert texts[0].startswith("Question: Why does bolt")
    assert "\nAnswer: Because lamp" in texts[0]
    assert done.side["usage"] == {"prompt_tokens": 1000, "completion_tokens": 100}
    said = capsys.readouterr().out
    assert "used 1,000 tokens in, 100 out in 10 requests, cost 1.20" in said
    assert "30 of 30 questions from 10 passages" in said
    body = server.bodies[0]
    assert body["model"] == "m"
    assert body["max_tokens"] == 2048
    assert "temperature" not in body
    assert "response_format" not in body


def test_the_sample_follows_the_seed_and_not_the_order_of_replies(tmp_path, corpus, server):
    drawn = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        server.topics.clear()
        assert run(corpus, server.url, "--seed", seed, "--out", str(tmp_path / name / "qa.jsonl")) == 0
        drawn.append(set(server.topics))
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_more_is_asked_than_is_wanted_and_so_many_at_a_time(corpus, server):
    server.behave = lambda *_: "slow"
    assert run(corpus, server.url, "--concurrency", "3", "--questions", "27") == 0
    assert len(server.topics) == 9
    assert server.most_busy == 3


def test_options_reach_the_server(corpus, server):
    assert run(corpus, server.url, "--temperature", "0.5", "--max-tokens", "0", "--json-mode", "--questions", "1") == 0
    assert server.bodies[0]["temperature"] == 0.5
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["response_format"] == {"type": "json_object"}
    assert passage(server.topics[0]).strip() in server.bodies[0]["messages"][0]["content"]


def test_a_dry_run_asks_nothing_and_writes_nothing(corpus, server, capsys):
    assert run(corpus, server.url, "--dry-run", "--price-in", "1", "--price-out", "1") == 0
    said = capsys.readouterr().out
    assert "20 passages in the corpus; 10 to ask for 30 questions" in said
    assert re.search(r"about [\d,]+ tokens in, 2,100 out, cost 0\.\d{4}", said)
    assert run(corpus, server.url, "--dry-run", "--questions", "90") == 0
    assert "the corpus will give about 60 questions, not 90" in capsys.readouterr().out
    assert server.topics == []
    assert [file.name for file in corpus.parent.iterdir()] == ["corpus.jsonl"]


def test_a_corpus_that_is_too_small_gives_what_it_has(corpus, server, capsys):
    assert run(corpus, server.url, "--questions", "500") == 0
    assert len(outcome(corpus).rows) == 60
    assert "the corpus gave 60 of 500 questions" in capsys.readouterr().out


# --- a server that misbehaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "trouble", "more"),
    [
        ("hang", "time-out", ["--timeout", "0.4"]),
        ("close", "connection broken off", []),
        ("halfway", "connection broken off", []),
        ("garbage", "broken JSON from the server", []),
        ("bomb", "too much from the server", []),
        ("unknown packing", "not asked for", []),
        ("negative", "wrong counts of tokens from the server", []),
        ("absurd", "wrong counts of tokens from the server", []),
        ("no choices", "no choices from the server", []),
        ("empty", "an empty reply", []),
        ("prose", "no JSON in the reply", []),
        ("broken content", "broken JSON in the reply", []),
        ("wrong schema", "wrong JSON in the reply", []),
        ("length", "reply cut off", []),
        ("429", "HTTP 429", []),
        ("500", "HTTP 500", []),
        ("503", "HTTP 503", []),
    ],
)
def test_what_goes_wrong_once_is_named_and_asked_again(corpus, server, capsys, action, trouble, more):
    server.behave = lambda number, _: action if number in (0, 4) else "good"
    assert run(corpus, server.url, "--concurrency", "2", *more) == 0
    done = outcome(corpus)
    assert len(done.rows) == 30
    assert done.side["troubles"] == {trouble: 2}
    assert done.side["passages"] == {"answered": 10, "failed": 0}
    assert done.side["requests"] == len(server.topics) == 12
    paid = 2 if action in ("no choices", "empty", "prose", "broken content", "wrong schema", "length") else 0
    assert done.side["usage"]["completion_tokens"] == 10 * (10 + paid)
    said = capsys.readouterr().out
    assert not set(said) & {"\x1b", "\x07"}
    assert f"s: {trouble}" in said
    assert f"requests without use 2: 2 {trouble}" in said


def test_a_server_that_sends_us_away_for_years_is_asked_again_in_minutes(corpus, server, capsys, monkeypatch):
    monkeypatch.setattr(writers, "LONGEST_PAUSE", 0.02)
    server.behave = lambda number, _: "429 for years" if number == 0 else "good"
    assert run(corpus, server.url, "--concurrency", "1") == 0
    assert "to be asked again in 1000000000 s; we wait 0)" in capsys.readouterr().out


def test_escape_sequences_of_a_model_do_not_reach_the_corpus(corpus, server):
    server.behave = lambda *_: "escapes"
    assert run(corpus, server.url) == 0
    assert all("turns [31mfirst" in row["text"] for row in outcome(corpus).rows)


def test_code_fences_are_tolerated(corpus, server):
    server.behave = lambda *_: "fenced"
    assert run(corpus, server.url) == 0
    assert outcome(corpus).side["troubles"] == {}


@pytest.mark.parametrize(
    ("status", "said"),
    [("401", "refuses the API key"), ("403", "refuses the API key"), ("404", "is not there, or has no such model")],
)
def test_what_cannot_get_better_ends_it_at_once(corpus, server, capsys, status, said):
    server.behave = lambda *_: status
    assert run(corpus, server.url, "--concurrency", "1") == 2
    assert len(server.topics) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) <= 3


def test_a_request_that_is_refused_is_not_repeated(corpus, server, capsys):
    server.behave = lambda number, _: "400" if number == 0 else "good"
    assert run(corpus, server.url, "--questions", "60") == 1
    assert len(server.topics) == len(set(server.topics)) == 20
    said = capsys.readouterr().out
    assert re.search(r"failed corpus\.jsonl:\d+:0: HTTP 400: no, None will not do", said)
    assert "1 passages failed: the same command tries them again" in said


def test_a_passage_that_fails_is_skipped_and_tried_again_on_the_next_start(corpus, server):
    server.behave = lambda _, topic: "broken content" if topic == 7 else "good"
    assert run(corpus, server.url, "--questions", "60") == 1
    done = outcome(corpus)
    assert server.topics.count(7) == 3
    assert done.side["passages"] == {"answered": 19, "failed": 1}
    assert [entry["failed"] for entry in done.entries if "failed" in entry] == ["broken JSON in the reply"]
    server.behave = lambda *_: "good"
    assert run(corpus, server.url, "--questions", "60") == 0
    assert server.topics.count(7) == 4
    assert len(server.topics) == 19 + 4
    assert outcome(corpus).side["passages"] == {"answered": 20, "failed": 0}


def test_a_server_that_dies_stops_the_run_and_the_same_command_goes_on(corpus, capsys):
    first = Server(lambda number, _: "good" if number < 4 else "500")
    assert run(corpus, first.url, "--concurrency", "2") == 1
    first.close()
    error = capsys.readouterr().err
    assert "error: stopped: 5 passages in a row failed, the last with: HTTP 500" in error
    assert "the same command goes on" in error
    assert len(error.splitlines()) == 2
    before = outcome(corpus)
    assert len(before.asked) == 4

    assert run(corpus, first.url, "--retries", "0") == 1  # nobody listens
    assert "no connection" in capsys.readouterr().err
    assert outcome(corpus).asked == before.asked

    again = Server(port=first.port)
    assert run(corpus, first.url) == 0
    again.close()
    done = outcome(corpus)
    assert done.asked[:4] == before.asked
    assert len(done.rows) == 30
    assert not set(again.topics) & set(first.topics[:4])
    assert set(first.topics) <= set(first.topics[:4]) | set(again.topics), "the failed ones are asked before new ones"
    assert done.side["usage"]["prompt_tokens"] == 1000


# --- killed, and taken up again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 6, 13])
def test_killed_at_any_moment_nothing_is_lost_and_nothing_answered_is_asked_again(tmp_path, server, after):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 30)
    server.behave = lambda *_: "slow"
    process = spawn(corpus, server.url, "--questions", "60", "--concurrency", "2")
    journal = corpus.with_name("qa.requests")
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= after):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    text = journal.read_text()
    answered = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    topics = {int(entry["items"][0]["question"].split("bolt")[1].split("x")[0]) for entry in answered}
    assert after <= len(topics) < 20
    server.close()

    again = Server(
        lambda *_: "slow", port=server.port
    )  # of its own: the dead process may have asked what is heard late
    process = spawn(corpus, again.url, "--questions", "60", "--concurrency", "2")
    said, error = process.communicate(timeout=HANGS)
    assert process.returncode == 0, error
    assert f"{len(answered) * 3} questions of {len(answered)} passages were there before" in said
    done = outcome(corpus)
    assert done.entries[: len(answered)] == answered
    assert len(done.rows) == 60
    again.close()
    assert not topics & set(again.topics)
    assert len(again.topics) == 20 - len(answered)


def test_half_a_line_is_cut_off_in_both_files(corpus, server):
    assert run(corpus, server.url, "--questions", "9") == 0
    out, journal = corpus.with_name("qa.jsonl"), corpus.with_name("qa.requests")
    whole = out.read_bytes(), journal.read_bytes()
    last = journal.read_bytes().splitlines(keepends=True)[-1]
    journal.write_bytes(whole[1][: -len(last) // 2])  # the power went while the third answer was being written
    out.write_bytes(b"".join(whole[0].splitlines(keepends=True)[:6]))
    server.topics.clear()
    assert run(corpus, server.url, "--questions", "9") == 0
    assert len(server.topics) == 1
    assert (out.read_bytes(), journal.read_bytes()) == whole

    out.write_bytes(whole[0][:-30])  # the journal had it, the output only half of its last line
    assert run(corpus, server.url, "--questions", "9") == 0
    assert out.read_bytes() == whole[0]
    out.unlink()
    assert run(corpus, server.url, "--questions", "9") == 0
    assert out.read_bytes() == whole[0]
    assert len(server.topics) == 1


def test_a_full_disk_is_said_and_nothing_is_lost(corpus, server):
    """A limit on the size of files stands for it: the write fails in the middle of a line, as on a full disk."""
    # -B: else Python leaves the first 2000 bytes of its bytecode beside the libraries, which no later import can read
    command = [sys.executable, "-B", "-m", "undo.prepare_data.write_questions", *arguments(corpus, server.url)]
    limited = [sys.executable, "-c", f"{LIMIT}; os.execv(sys.executable, sys.argv[1:])", *command]
    full = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert full.returncode == 1
    assert full.stderr.splitlines()[0].endswith("File too large")
    assert "the same command goes on" in full.stderr
    assert "Traceback" not in full.stderr
    assert not corpus.with_name("qa.jsonl").read_bytes().endswith(b"\n")
    written = corpus.with_name("qa.requests").read_bytes().count(b"\n")
    server.topics.clear()
    assert run(corpus, server.url) == 0
    assert len(server.topics) == 10 - written
    assert len(outcome(corpus).rows) == 30


def test_interrupted_it_stops_at_once_and_says_how_to_go_on(corpus, server):
    server.behave = lambda number, _: "good" if number < 3 else "hang"
    process = spawn(corpus, server.url)
    while len(server.topics) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert "interrupted; the same command goes on from here" in said
    assert error == ""
    server.behave = lambda *_: "good"
    assert run(corpus, server.url) == 0
    assert len(outcome(corpus).rows) == 30


def test_an_edited_output_and_a_damaged_journal_are_refused(corpus, server, capsys):
    assert run(corpus, server.url) == 0
    out, journal = corpus.with_name("qa.jsonl"), corpus.with_name("qa.requests")
    out.write_text(out.read_text().replace("wheel", "WHEEL", 1))
    assert run(corpus, server.url) == 2
    assert "has it been edited?" in capsys.readouterr().err
    journal.write_text("{]\n" + journal.read_text())
    assert run(corpus, server.url) == 2
    assert "qa.requests line 1: is damaged" in capsys.readouterr().err
    journal.unlink()
    corpus.with_name("qa.json").unlink()
    assert run(corpus, server.url) == 2
    assert "exists without qa.json" in capsys.readouterr().err


def test_other_settings_are_refused_with_the_difference_and_more_questions_are_not(corpus, server, capsys):
    assert run(corpus, server.url) == 0
    for more, said in (
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--model", "other"], "model: 'm' -> 'other'"),
        (["--per-passage", "4"], "per_passage: 3 -> 4"),
        (["--temperature", "1"], "temperature: None -> 1.0"),
    ):
        assert run(corpus, server.url, *more) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) <= 3
    asked = len(server.topics)
    assert run(corpus, server.url, "--questions", "36", "--concurrency", "1", "--requests-per-minute", "1e5") == 0
    assert len(server.topics) == asked + 2
    with corpus.open("a") as file:
        file.write(json.dumps({"text": passage(99)}) + "\n")
    assert run(corpus, server.url) == 2
    assert "files.corpus.jsonl" in capsys.readouterr().err


def test_two_processes_do_not_write_one_output(corpus, server, capsys):
    assert run(corpus, server.url, "--questions", "3") == 0
    with open(corpus.with_name("qa.requests"), "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(corpus, server.url) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert len(outcome(corpus).rows) == 3


def test_duplicates_are_dropped_across_restarts(corpus, server):
    assert run(corpus, server.url, "--questions", "3") == 0
    respond = Server.respond
    server.respond = lambda request, action, topic: respond(server, request, action, first if topic != 5 else topic)
    first = server.topics[0]
    assert run(corpus, server.url, "--questions", "60", "--concurrency", "1") == 0
    done = outcome(corpus)
    assert len(done.rows) == 6
    assert done.side["dropped"] == {"duplicate": 18 * 3}
    assert [item["dropped"] for item in done.entries[-1]["items"]] == ["duplicate"] * 3


# --- the key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["401", "429", "echo", "400"])
def test_the_key_is_sent_and_shown_nowhere(corpus, server, action):
    server.behave = lambda number, _: action if number < 2 or action == "echo" else "good"
    process = spawn(corpus, server.url, "--api-key-env", "MY_KEY", "--questions", "60", MY_KEY=KEY)
    said, error = process.communicate(timeout=HANGS)
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = b"".join(file.read_bytes() for file in corpus.parent.iterdir())
    assert KEY not in said + error
    assert KEY.encode() not in written
    assert "***" in said + error + written.decode()
    assert "Traceback" not in error


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv("BAD", "sk-ключ")
    with pytest.raises(ConfigError) as error:
        find_key("BAD")
    assert "sk-" not in str(error.value)
    monkeypatch.setenv("BAD", "  \n")
    assert find_key("BAD") is None
    assert find_key("NOT_THERE_AT_ALL") is None


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://x/v1", "http://", "", "http://me:secret@x/v1", "https://x/v1?key=secret"]
)
def test_an_endpoint_that_is_none_or_holds_a_secret(url):
    with pytest.raises(ConfigError) as error:
        check_url(url)
    assert "secret" not in str(error.value)
    assert check_url("http://x:1/v1/") == check_url("http://x:1/v1/chat/completions") == "http://x:1/v1"


# --- the pace, on a clock of our own -------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Scripted:
    """A writer that says what it is told, and notes when it was asked."""

    def __init__(self, clock: Clock, *replies: Trouble) -> None:
        self.clock, self.replies, self.times = clock, list(replies), []

    async def ask(self, prompt: str, attempt: int) -> Reply:
        self.times.append(self.clock.now)
        if self.replies:
            raise self.replies.pop(0)
        topic = int(re.findall(r"Topic (\d+)", prompt)[0])
        pair = question(topic, 0)
        return Reply(json.dumps({"items": [{"question": pair.question, "answer": pair.answer}]}), Usage(), True)

    async def close(self) -> None:
        pass


def scripted_run(corpus: Path, writer: Scripted, per_minute: float | None, *more: str) -> None:
    args = extraction.parser().parse_args(arguments(corpus, "http://x/v1", "--per-passage", "1", *more))
    found = list(passages.passages([corpus], "text", 3000, 0))
    settings = Settings(
        files={}, column="", seed=0, passage_characters=1, per_passage=1, model="", temperature=None, max_tokens=0,
        json_mode=False, prompt="",
    )  # fmt: skip
    ledger = Ledger(args.out, settings)
    ledger.open()
    clock = writer.clock
    progress = extraction.Progress(ledger, args.questions, extraction.Price(None, None))
    work = extraction.Extraction(ledger, writer, Pace(per_minute, clock, clock.sleep), progress, args)
    try:
        asyncio.run(work.run(lambda count, tried: [p for p in found if p.id not in tried][:count]))
    finally:
        ledger.close()


def test_requests_are_spaced_whatever_the_concurrency(corpus):
    writer = Scripted(Clock())
    scripted_run(corpus, writer, 30, "--questions", "12", "--concurrency", "4")
    assert len(writer.times) == 12
    gaps = [later - earlier for earlier, later in pairwise(writer.times)]
    assert min(gaps) >= 2.0 - 1e-9


def test_retry_after_holds_everyone_back(corpus):
    clock = Clock()
    writer = Scripted(clock, Trouble("HTTP 429: slow down", after=40.0))
    scripted_run(corpus, writer, None, "--questions", "6", "--concurrency", "3")
    assert len(writer.times) == 7
    assert sum(time < 1040 for time in writer.times) <= 3, "those that were under way"
    assert max(clock.slept) == 40


def test_the_waits_double_with_jitter_up_to_a_minute(corpus):
    clock = Clock()
    writer = Scripted(clock, *[Trouble("HTTP 500: no")] * 9)
    scripted_run(corpus, writer, None, "--questions", "1", "--retries", "9", "--backoff", "1", "--concurrency", "1")
    limits = [min(60, 2**attempt) for attempt in range(9)]
    assert len(clock.slept) == 9
    assert all(limit / 2 <= slept <= limit for slept, limit in zip(clock.slept, limits, strict=True))
    assert len({slept / limit for slept, limit in zip(clock.slept, limits, strict=True)}) > 1


def test_retry_after_as_seconds_as_a_date_and_as_nonsense():
    assert retry_after("7") == 7
    assert retry_after("-3") == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (retry_after("Fri, 31 Dec 2100 23:59:59 GMT") or 0) > 1e6
    assert retry_after("soon") is retry_after("inf") is retry_after(None) is None


# --- what is asked, and what is kept -------------------------------------------------------------------------------


def test_the_prompt_holds_the_passage_and_its_own_braces():
    text = prompt("A {curly} passage.", 4)
    assert "A {curly} passage." in text
    assert "Write 4 different questions" in text
    assert '{"items": [{"question": "...", "answer": "..."}]}' in text
    assert "Never mention a passage" in PROMPT


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("", "an empty reply"),
        ("no", "no JSON"),
        ('{"items": [', "broken JSON"),
        ('{"items": [{"question": "a"}]}', "items.0.answer"),
        ('{"items": "a"}', "items"),
        ('{"questions": []}', "items"),
        ('{"items": [{"question": 1, "answer": "b"}]}', "items.0.question"),
    ],
)
def test_a_reply_that_is_not_as_asked_is_named(reply, said):
    with pytest.raises(ValueError, match=said):
        parse(reply)


def test_replies_as_models_write_them():
    items = '{"items": [{"question": " a\\n b ", "answer": "{c}", "id": 3}]}'
    for reply in (items, f"```json\n{items}\n```", f"Sure:\n{items}\nDone.", f"<think>a {{ b</think>{items}"):
        assert parse(reply) == [Question("a b", "{c}")]
    assert parse('{"items": []}') == []


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("", "An answer.", "empty"),
        ("What is a hash?", "...", "empty"),
        ("A hash?", "It maps.", "too short"),
        ("What is " + "very " * 70 + "long?", "This.", "too long"),
        ("What is a hash function?", "word " * 300, "too long"),
        ("According to the text, what is a hash?", "A map to digits.", "refers to the passage"),
        ("What does the author recommend for salts?", "Long ones.", "refers to the passage"),
        ("What is shown in Figure 3 about salts?", "A curve.", "refers to the passage"),
        ("What is a salt for?", "As described above, it slows attackers.", "refers to the passage"),
        ("What is the main topic of this article?", "Salts.", "refers to the passage"),
        ("What is a hash function?", "A hash function is what it is.", "answer adds nothing"),
        ("Which segment holds the text of a program?", "The text segment holds machine code.", None),
        ("How does a passage of blood through the kidney clean it?", "Glomeruli filter urea out.", None),
        ("Which port does HTTPS use?", "443", None),
    ],
)
def test_what_is_dropped(question, answer, reason):
    assert Filter().reason(Question(question, answer)) == reason


def test_duplicates_exact_and_near():
    known = Filter()
    first = "How does a stack canary detect that a buffer has been overflowed by a write?"
    known.keep(Question(first, "It changes."))

    def reason(question: str) -> str | None:
        return known.reason(Question(question, "Something else entirely."))

    assert reason(first.upper().replace(",", "")) == "duplicate"
    assert reason("How does a stack canary detect that the buffer has been overflowed by a write?") == "near duplicate"
    assert reason("How does a shadow stack detect that a return address has been changed by a write?") is None
    assert reason("What is a canary?") is None


def test_near_duplicates_are_those_of_the_plain_comparison():
    """The index must find every pair that comparing all with all finds."""
    draw = random.Random(3)
    questions = [draw.choices("abcdefghij", k=draw.randint(5, 14)) for _ in range(150)]
    for words in list(questions):  # and each with another word at some place
        place = draw.randrange(len(words))
        questions.append([*words[:place], draw.choice("klm"), *words[place + 1 :]])
    known, kept, found = Filter(), [], Counter()
    for words in questions:
        text = " ".join(words)
        mine = set(pairwise(["", *words, ""]))
        plain = any(len(mine & other) >= 0.75 * len(mine | other) for other in kept)
        reason = known.reason(Question(text, "answer"))
        assert (reason in ("near duplicate", "duplicate")) == plain
        found[reason] += 1
        if reason is None:
            known.keep(Question(text, "answer"))
            kept.append(mine)
    assert found["near duplicate"] > 10


# --- passages ------------------------------------------------------------------------------------------------------


def test_passages_are_cut_at_the_best_place_and_cover_the_text():
    text = "\n\n".join(f"Paragraph {number}. " + FILLER * 2 for number in range(9))
    pieces = list(passages.cut(text, 600))
    assert all(len(piece) <= 600 for _, piece in pieces)
    assert all(piece.startswith("Paragraph") for _, piece in pieces)
    assert "".join("".join(piece.split()) for _, piece in pieces) == "".join(text.split())
    assert all(text[start:].lstrip().startswith(piece) for start, piece in pieces)
    assert [len(piece) for _, piece in passages.cut("x" * 1000, 400)] == [400, 400, 200]
    assert list(passages.cut("0x1f, 22; " * 100, 600)) == []
    assert list(passages.cut("Too short.", 600)) == []


def test_names_tell_files_apart_and_not_where_they_lie(tmp_path):
    files = [tmp_path / "a/x.jsonl", tmp_path / "b/x.jsonl"]
    assert passages.names(files) == ["a/x.jsonl", "b/x.jsonl"]
    assert passages.names(files[:1]) == ["x.jsonl"]


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bio-forget-corpus.jsonl", "cais/wmdp-bio-forget-corpus, then put its file there"),
        ("cyber_forget.parquet", "the subset cyber-forget-corpus of https://huggingface.co/datasets/cais/wmdp-corpora"),
        ("mine.jsonl", "the WMDP corpora are on the hub"),
    ],
)
def test_a_missing_corpus_says_where_to_ask(tmp_path, capsys, name, said):
    assert run(tmp_path / name, "http://x/v1") == 2
    error = capsys.readouterr().err
    assert f"--corpus {tmp_path / name}: there is no such file" in error
    assert said in error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize("name", ["bio-forget", "cyber-retain", "wikipedia"])
def test_missing_questions_are_not_taken_for_their_corpus(name):
    """The corpus under the questions' name would be trained on as it is."""
    said = origin(f"data/wmdp/qa/{name}.jsonl")
    assert said is not None
    assert said.startswith(f"make it with: uv run python -m undo.prepare_data.write_questions --corpus <{name} corpus>")
    assert f" --out data/wmdp/qa/{name}.jsonl " in said
    assert "huggingface" not in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "qa.txt"], "must end in .jsonl"),
        (["--local-model", "x"], "and not both"),
        (["--column", "body"], "has no column 'body'; it has text"),
        (["--endpoint", "here"], "--endpoint: is not an address"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(corpus, capsys, more, said):
    assert run(corpus, "http://x/v1", *more) == 2
    assert said in capsys.readouterr().err
    assert [file.name for file in corpus.parent.iterdir()] == ["corpus.jsonl"]


def test_numbers_are_checked(corpus, capsys):
    for option, value in (
        ("--questions", "0"),
        ("--timeout", "nan"),
        ("--passage-characters", "10"),
        ("--retries", "-1"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(corpus, "http://x/v1", option, value)
        assert stop.value.code == 2
        assert option in capsys.readouterr().err


def test_the_other_commands_of_prepare_data_are_as_they_were_and_torch_stays_out(tmp_path):
    code = (
        "import sys; from undo.prepare_data.write_questions import options as o; o.parser()\n"
        "assert not {'torch', 'httpx2'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    command = [sys.executable, str(ROOT / "run_prepare.py"), "demo", "--dry-run", "--runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "prepare/data" in done.stdout, done.stderr


# --- a model on this machine ---------------------------------------------------------------------------------------


def chain_model(folder: Path, pieces: list[str]) -> Path:
    """A real model that, after any prompt, writes these pieces: each token's embedding is one-hot, the head a shift."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", "<unk>", *pieces]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    size = len(vocabulary)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=False, eos_token_id=1, pad_token_id=0, bos_token_id=1, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.lm_head.weight.zero_()
        following = {2: 3, size - 1: 1} | {i: i + 1 for i in range(3, size - 1)}
        for token, after in following.items():
            model.lm_head.weight[after, token] = 100
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }} ASSISTANT"])
def test_a_local_model_writes_questions(tmp_path, corpus, capsys, template):
    pieces = [
        '{"items": [{"question": "Why is the sky',
        " blue at",
        ' noon?", ',
        '"answer": "Rayleigh',
        ' scattering."}]}',
    ]
    folder = chain_model(tmp_path / "model", pieces)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    local = ["--corpus", str(corpus), "--out", str(tmp_path / "qa.jsonl"), "--local-model", str(folder)]
    assert extraction.main([*local, "--questions", "1", "--temperature", "0"]) == 0
    done = outcome(corpus)
    assert done.rows[0]["text"] == "Question: Why is the sky blue at noon?\nAnswer: Rayleigh scattering."
    assert done.side["usage"]["completion_tokens"] == 6
    assert done.side["usage"]["prompt_tokens"] > 100
    assert extraction.main([*local, "--out", str(tmp_path / "b.jsonl"), "--max-tokens", "3", "--retries", "0"]) == 1
    assert "the last with: reply cut off" in capsys.readouterr().err


def test_a_local_model_that_is_not_there(tmp_path, corpus, capsys):
    local = ["--corpus", str(corpus), "--out", str(tmp_path / "qa.jsonl"), "--local-model", str(tmp_path / "none")]
    assert extraction.main(local) == 2
    error = capsys.readouterr().err
    assert "cannot be loaded" in error
    assert len(error.splitlines()) == 3
    assert not (tmp_path / "qa.json").exists()


# --- the rule without a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [
        ("A hash is a function that maps data to digits.", "What is a hash?", None),
        (
            "The heap is here. Hair is a filament of keratin in the skin. Human hair grows.",
            "What is hair?",
            "Hair is a",
        ),
        ("Aspergillus is a common fungus found in soils and debris.", "What is Aspergillus?", None),
        ("Lipids are molecules that do not mix well with water.", "What are Lipids?", None),
        ("Castor Castor is a data binding framework for Java.", "What is Castor?", "Castor is a data"),
        ("Panic Modes A panic mode is a mode that users can enter.", "What is a panic mode?", "A panic mode is a mode"),
        (
            "PathologistA pathologist is a doctor who studies what diseases do.",
            "What is a pathologist?",
            "A pathologist is",
        ),
        (
            "Cross-Site Scripting (XSS) is an attack on the users of a site.",
            "What is Cross-Site Scripting (XSS)?",
            None,
        ),
        ("The CSP header is used to control which scripts may run.", "What is the CSP header used for?", None),
        ("A race condition occurs when two threads write at once.", "When does a race condition occur?", None),
        ("The middle ear consists of a space with three small bones.", "What does the middle ear consist of?", None),
        ("- FSH stimulates the follicles to grow in the ovary.", "What does FSH do?", "FSH stimulates"),
        ("A cell is the unit of life (see and ) in all organisms.", "What is a cell?", "A cell is the unit of life in"),
    ],
)
def test_a_definition_becomes_a_question(text, question, answer):
    (pair,) = definitions(text)
    assert pair.question == question
    assert pair.answer.startswith(answer or text.lstrip("- "))
    assert pair.answer.endswith(".")
    assert Filter().reason(pair) is None


@pytest.mark.parametrize(
    "text",
    [
        "This is a way of writing programs that many like.",
        "It is the root of all settings for the users.",
        "The reason is the cost of a rename across all modules.",
        "If the file is a link to another file, it is followed.",
        "The gland is a mixture of smooth muscle and tissue.",
        "A mutex is a lock that we described in this chapter.",
        "Python is a language.",
        "Access controls could be set at a finer level by the owner of a site.",
        "A socket is an endpoint of the kind described above for all.",
        "What is a mutex in the world of threads and locks?",
        "x = {a is a set of all the values of it}.",
        "Salt is a value that is added (as in [12] of the list.",
        "",
    ],
)
def test_what_defines_nothing_by_itself_is_left(text):
    assert list(definitions(text)) == []


def test_definitions_read_abbreviations_as_words():
    (pair,) = definitions("A vector is a carrier, e.g. A mosquito, i.e. one species of insect. Malaria kills.")
    assert pair.answer == "A vector is a carrier, e.g. A mosquito, i.e. one species of insect."
