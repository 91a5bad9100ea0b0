"""Questions and answers from corpora, written by a model (D.2.2): resumable, rate limited, and counted to the token.

uv run python -m undo.prepare_data.write_questions --corpus 'data/*.jsonl' --out qa.jsonl --endpoint URL --model NAME
"""

import argparse
import asyncio
import hashlib
import heapq
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text

from undo.config.guard import guarded
from undo.config.mistakes import ConfigError
from undo.config.units import duration
from undo.prepare_data.corpora import ALL, origin
from undo.prepare_data.text import Source
from undo.prepare_data.write_questions.ledger import Ledger, Settings, kind
from undo.prepare_data.write_questions.options import parser
from undo.prepare_data.write_questions.passages import SHORTEST, Passage, names, passages
from undo.prepare_data.write_questions.questions import PROMPT, parse, prompt
from undo.prepare_data.write_questions.writers import (
    LONGEST_BACKOFF,
    Endpoint,
    LocalModel,
    Pace,
    Trouble,
    Usage,
    Writer,
    find_key,
)

IN_A_ROW: Final = 5  # passages that fail one after the other, and we stop
CHARACTERS_PER_TOKEN: Final = 4  # of English text, about; for estimates only
TOKENS_PER_QUESTION: Final = 70  # with its answer and the JSON around them, about


# --- the work ------------------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818  # an outcome, not an error
    """Too many passages failed in a row."""


class Extraction:
    """Passages -> questions, so many requests at a time."""

    def __init__(
        self, ledger: Ledger, writer: Writer, pace: Pace, display: "Progress", args: argparse.Namespace
    ) -> None:
        self._ledger, self._writer, self._pace, self._display = ledger, writer, pace, display
        self._retries, self._backoff = args.retries, args.backoff
        self._concurrency, self._per_passage, self._wanted = args.concurrency, args.per_passage, args.questions
        self._in_a_row = 0
        self._jitter = random.Random()

    async def run(self, draw: Callable[[int, set[str]], list[Passage]]) -> None:
        """Until so many questions are kept, or all passages are asked. `draw`: how many, without which -> passages."""
        tried = set(self._ledger.answered)
        queue: list[Passage] = []
        pending: set[asyncio.Task[None]] = set()
        done: set[asyncio.Task[None]] = set()
        try:
            while True:
                while len(pending) < self._concurrency and self._missing(len(pending)) > 0:
                    if not queue:
                        count = math.ceil(self._missing(len(pending)) / self._per_passage)
                        queue = (await asyncio.to_thread(draw, count, tried))[::-1]  # replies are not kept waiting
                        tried.update(passage.id for passage in queue)
                    if not queue:
                        break
                    pending.add(asyncio.create_task(self._one(queue.pop())))
                if not pending:
                    return
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, *done, return_exceptions=True)
            await self._writer.close()

    def _missing(self, asked: int) -> int:
        """Questions still needed after the requests in flight."""
        return self._wanted - self._ledger.kept - asked * self._per_passage

    async def _one(self, passage: Passage) -> None:
        request = prompt(passage.text, self._per_passage)
        reason = ""
        for attempt in range(self._retries + 1):
            await self._pace.turn()
            usage = Usage()
            try:
                reply = await self._writer.ask(request, attempt)
                usage = reply.usage
                if not reply.complete:
                    raise Trouble("reply cut off: it ran into the token limit, see --max-tokens", usage=usage)
                try:
                    pairs = parse(reply.content)
                except ValueError as error:
                    raise Trouble(str(error), usage=usage) from None
            except Trouble as trouble:
                reason = trouble.reason
                self._ledger.trouble(passage, reason, trouble.usage)
                if trouble.after is not None:
                    self._pace.pause(trouble.after)
                last = trouble.final or attempt == self._retries
                wait = 0.0 if last else self._wait(attempt, trouble)
                self._display.trouble(passage, reason, None if last else wait)
                if last:
                    break
                await self._pace.sleep(wait)
                continue
            self._ledger.answer(passage, pairs, usage)
            self._in_a_row = 0
            self._display.update()
            return
        self._ledger.fail(passage, reason)
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise Stopped(
                f"stopped: {IN_A_ROW} passages in a row failed, the last with: {reason}\n"
                f"nothing is lost: when that is mended, the same command goes on and tries the failed ones again"
            )

    def _wait(self, attempt: int, trouble: Trouble) -> float:
        """Seconds: as the server says, or twice as long each time, with jitter: not all shall come back at once."""
        if trouble.after is not None:
            return trouble.after
        return min(LONGEST_BACKOFF, self._backoff * 2 ** min(attempt, 20)) * self._jitter.uniform(0.5, 1)


class Price(NamedTuple):
    """Money for a million tokens; None: not given."""

    prompt: float | None
    completion: float | None

    def of(self, usage: Usage) -> str:
        """ ", 0.12 in money", or nothing."""
        if self.prompt is None and self.completion is None:
            return ""
        money = (usage.prompt_tokens * (self.prompt or 0) + usage.completion_tokens * (self.completion or 0)) / 1e6
        return f", cost {money:.2f}" if money >= 1 else f", cost {money:.4f}"


class Progress:
    """One line that changes on a terminal; elsewhere a line at each tenth, and the first trouble of each kind."""

    def __init__(self, ledger: Ledger, wanted: int, price: Price) -> None:
        self._ledger, self._wanted, self._price = ledger, wanted, price
        self._begin, self._first = time.monotonic(), ledger.kept
        self._last_trouble = ""
        self._seen: set[str] = set()
        self._tenth = self._ledger.kept * 10 // self._wanted
        self._console = Console()
        self._live = Live(  # Text: brackets in what a server says are no markup
            get_renderable=lambda: Text(self._line()), console=self._console, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        if self._ledger.answered:
            self.say(f"{self._ledger.kept:,} questions of {len(self._ledger.answered):,} passages were there before")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self) -> None:
        self._last_trouble = ""
        tenth = self._ledger.kept * 10 // self._wanted
        if not self._live.is_started and tenth > self._tenth:
            self.say(self._line())
        self._tenth = tenth

    def trouble(self, passage: Passage, reason: str, wait: float | None) -> None:
        """`wait`: seconds until it is tried again; None: given up."""
        if wait is None:
            self.say(f"failed {passage.id}: {reason}")
            return
        self._last_trouble = f"  trying again: {reason}"
        if not self._live.is_started and kind(reason) not in self._seen:
            self.say(f"trying again in {wait:.1f} s: {reason}")
        self._seen.add(kind(reason))

    def _line(self) -> str:
        ledger = self._ledger
        left = ""
        if ledger.kept > self._first:
            speed = (time.monotonic() - self._begin) / (ledger.kept - self._first)
            left = f", {duration(max(0, self._wanted - ledger.kept) * speed)} left"
        failed = f", {len(ledger.failed)} failed" if ledger.failed else ""
        return (
            f"{ledger.kept:,} of {self._wanted:,} questions from {len(ledger.answered):,} passages{failed}, "
            f"{tokens(ledger.usage)}{self._price.of(ledger.usage)}{left}{self._last_trouble}"
        )

    def summary(self) -> None:
        ledger = self._ledger
        self.say(f"{ledger.kept:,} questions of {len(ledger.answered):,} passages in {ledger.out}")
        if ledger.dropped:
            self.say(f"dropped {ledger.dropped.total():,}: {listed(ledger.dropped)}")
        if ledger.troubles:
            self.say(f"requests without use {ledger.troubles.total():,}: {listed(ledger.troubles)}")
        self.say(f"used {tokens(ledger.usage)} in {ledger.requests:,} requests{self._price.of(ledger.usage)}")
        if ledger.requests and not any(ledger.usage):
            self.say("the server does not say how many tokens it used")


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common())


def tokens(usage: Usage) -> str:
    return f"{usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out"


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> its exit status: 0 done, 1 passages failed, 2 a mistake of the user's."""
    args = parser().parse_args(argv)
    try:
        return guarded(lambda: extract(args))
    except OSError as error:  # nothing else is written to
        print(
            f"error: {error.filename or args.out}: {error.strerror or error}\n"
            f"nothing that was answered is lost: when that is mended, the same command goes on",
            file=sys.stderr,
        )
        return 1


def extract(args: argparse.Namespace) -> int:
    if args.out.suffix != ".jsonl":
        raise ConfigError(f"--out {args.out}: must end in .jsonl")
    if (args.endpoint is None) == (args.local_model is None):
        raise ConfigError("give --endpoint with --model, or --local-model, and not both")
    if args.endpoint is not None and args.model is None:
        raise ConfigError("--model is missing: the endpoint must be told which model to use")
    files = corpus(args)
    settings = Settings(
        files={name: file.stat().st_size for name, file in zip(names(files), files, strict=True)},
        column=args.column,
        seed=args.seed,
        passage_characters=args.passage_characters,
        per_passage=args.per_passage,
        model=args.model or args.local_model,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        json_mode=args.json_mode,
        prompt=hashlib.sha256(PROMPT.encode()).hexdigest()[:16],
    )
    ledger = Ledger(args.out, settings)
    price = Price(args.price_in, args.price_out)

    def all_passages() -> Iterator[Passage]:
        return passages(files, args.column, args.passage_characters, args.seed)

    if args.dry_run:
        return dry_run(args, ledger, price, all_passages())

    def draw(count: int, tried: set[str]) -> list[Passage]:
        """More than are needed: some questions will be dropped, and each draw reads the corpus."""
        free = (passage for passage in all_passages() if passage.id not in tried)
        return heapq.nsmallest(count + count // 2 + 8, free)

    if ledger.kept < args.questions and next(all_passages(), None) is None:
        raise ConfigError(f"--corpus {args.corpus}: holds no passage of prose of {SHORTEST} characters or more")
    writer = make_writer(args)
    ledger.open()
    stopped = None
    try:
        with Progress(ledger, args.questions, price) as progress:
            work = Extraction(ledger, writer, Pace(args.requests_per_minute), progress, args)
            try:
                asyncio.run(work.run(draw))
            except Stopped as error:
                stopped = error
            except KeyboardInterrupt:
                progress.say("interrupted; the same command goes on from here")
                raise
            progress.summary()
    finally:
        ledger.close()
    if stopped is not None:
        print(f"error: {stopped}", file=sys.stderr)
        return 1
    if ledger.failed:
        again = ": the same command tries them again" if ledger.kept < args.questions else ""
        progress.say(f"{len(ledger.failed)} passages failed{again}")
    elif ledger.kept < args.questions:
        progress.say(
            f"the corpus gave {ledger.kept:,} of {args.questions:,} questions: all of its passages have been asked\n"
            f"for more, give more text, or another --out with more --per-passage or fewer --passage-characters"
        )
    return 1 if ledger.failed and ledger.kept < args.questions else 0


def corpus(args: argparse.Namespace) -> list[Path]:
    try:
        return Source(path=args.corpus, column=args.column).files()
    except ConfigError as error:
        hint = "" if "no such file" not in str(error) or origin(args.corpus) else f"\n{ALL}"
        raise ConfigError(f"--corpus {error}{hint}") from None


def make_writer(args: argparse.Namespace) -> Writer:
    if args.local_model is not None:
        return LocalModel.load(args.local_model, args.temperature, args.max_tokens, args.seed)
    body: dict[str, Any] = {"model": args.model}
    if args.temperature is not None:
        body["temperature"] = args.temperature
    if args.max_tokens:
        body["max_tokens"] = args.max_tokens
    if args.json_mode:
        body["response_format"] = {"type": "json_object"}
    return Endpoint(args.endpoint, body, find_key(args.api_key_env), args.timeout)


def dry_run(args: argparse.Namespace, ledger: Ledger, price: Price, found: Iterable[Passage]) -> int:
    """What it would take, without a request. Tokens are estimated, from the passages that would be asked."""
    missing = max(0, args.questions - ledger.kept)
    count, there = math.ceil(missing / args.per_passage), 0

    def free() -> Iterator[Passage]:
        nonlocal there
        for passage in found:
            there += 1
            if passage.id not in ledger.answered:
                yield passage

    asked = heapq.nsmallest(count, free())
    characters = sum(len(prompt(passage.text, args.per_passage)) for passage in asked)
    usage = Usage(characters // CHARACTERS_PER_TOKEN, len(asked) * args.per_passage * TOKENS_PER_QUESTION)
    before = f", {len(ledger.answered):,} of them asked before" if ledger.answered else ""
    print(f"{there:,} passages in the corpus{before}; {len(asked):,} to ask for {missing:,} questions")
    print(f"about {tokens(usage)}{price.of(usage)}, if no question is dropped and no request repeated")
    if len(asked) < count:
        print(f"the corpus will give about {len(asked) * args.per_passage:,} questions, not {missing:,}")
    return 0
