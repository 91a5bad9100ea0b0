"""The options of `python -m undo.prepare_data.write_questions`."""

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from undo.prepare_data.write_questions.passages import SHORTEST


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m undo.prepare_data.write_questions",
        description="Questions and answers from corpora, written by a model (D.2.2). Killed, the same command goes on.",
        epilog="example: %(prog)s --corpus data/cyber-forget-corpus.parquet --out qa/cyber_forget.jsonl "
        "--endpoint http://localhost:8000/v1 --model NAME --questions 5000 --dry-run",
    )
    add = arguments.add_argument
    add("--corpus", required=True, metavar="GLOB", help="a file or a glob of files: jsonl, json, parquet, txt")
    add("--column", default="text", metavar="NAME", help="of the corpus (default: text)")
    add("--out", required=True, type=Path, metavar="FILE.jsonl", help="a question a line, column text")
    add("--endpoint", metavar="URL", help="OpenAI-compatible, such as http://localhost:8000/v1")
    add("--model", metavar="NAME", help="as the endpoint calls it")
    add("--local-model", metavar="FOLDER", help="instead of an endpoint: a model folder or hub id, on this machine")
    add("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the key, if any")
    add(
        "--questions",
        type=_count,
        metavar="N",
        default=1000,
        help="how many to keep, at least (default: 1000); can be raised",
    )
    add("--per-passage", type=_count, metavar="N", default=5, help="questions asked for in one request (default: 5)")
    add("--passage-characters", type=_passage, metavar="N", default=3000, help="at most (default: 3000)")
    add("--seed", type=int, metavar="N", default=0, help="of the sample of passages (default: 0)")
    add("--temperature", type=_amount, metavar="T", help="default: the server's")
    add("--max-tokens", type=_whole, metavar="N", default=2048, help="of a reply (default: 2048; 0: the server's)")
    add("--json-mode", action="store_true", help="send response_format json_object; not every server knows it")
    add("--requests-per-minute", type=_positive, metavar="N", help="default: no limit")
    add("--concurrency", type=_count, metavar="N", default=4, help="requests at a time (default: 4)")
    add("--timeout", type=_positive, metavar="S", default=120.0, help="seconds of one request, in all (default: 120)")
    add("--retries", type=_whole, metavar="N", default=5, help="of a request that failed (default: 5)")
    add(
        "--backoff",
        type=_amount,
        metavar="S",
        default=1.0,
        help="seconds before the first retry; doubles to a minute (default: 1)",
    )
    add("--price-in", type=_amount, metavar="P", help="of a million prompt tokens, to show the cost")
    add("--price-out", type=_amount, metavar="P", help="of a million completion tokens")
    add("--dry-run", action="store_true", help="passages, tokens and cost, without a request")
    return arguments


def _whole(text: str) -> int:
    return _checked(int, text, lambda value: value >= 0, "a whole number, 0 or more")


def _count(text: str) -> int:
    return _checked(int, text, lambda value: value > 0, "a whole number above 0")


def _passage(text: str) -> int:
    return _checked(int, text, lambda value: value >= SHORTEST, f"a whole number, {SHORTEST} or more")


def _amount(text: str) -> float:
    return _checked(float, text, lambda value: 0 <= value < math.inf, "a number, 0 or more")


def _positive(text: str) -> float:
    return _checked(float, text, lambda value: 0 < value < math.inf, "a number above 0")


def _checked(make: Callable[[str], Any], text: str, holds: Callable[[Any], bool], what: str) -> Any:
    with suppress(ValueError):
        if holds(value := make(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
