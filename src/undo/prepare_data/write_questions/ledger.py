"""What a model has written, on disk. Beside qa.jsonl, a corpus with one question a line, stand two files:

qa.requests      every reply, one a line, with what was dropped and why; the truth from which the others follow
qa.json          settings, tokens, counts
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from undo.config.files import write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import Frozen, Raw, as_raw, differences
from undo.prepare_data.write_questions.passages import Passage
from undo.prepare_data.write_questions.questions import Filter, Question
from undo.prepare_data.write_questions.writers import Usage


class Settings(Frozen):
    """What shapes the questions. The same output with other settings is refused."""

    files: dict[str, int]  # name -> bytes
    column: str
    seed: int
    passage_characters: int
    per_passage: int
    model: str
    temperature: float | None
    max_tokens: int
    json_mode: bool
    prompt: str  # its hash


class Ledger:
    """The three files. Each reply is on the disk before the next one is looked at: a kill loses none of them."""

    def __init__(self, out: Path, settings: Settings) -> None:
        """Raises ConfigError if the output is another's: other settings, edited, or in the hands of another process."""
        self.out, self.side, self.journal = out, out.with_suffix(".json"), out.with_suffix(".requests")
        self.settings = settings
        self._files = ExitStack()
        self._claim()
        self._read()

    def open(self) -> None:
        """From here on it is written to."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.side.exists():
            self.save()
        self._journal: IO[bytes] = self._files.enter_context(open(self.journal, "ab"))  # noqa: SIM115  # by close()
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.out}: another process is writing it; wait for it, or end it") from None
        lines, whole = self._read()  # again: now nobody else writes
        self._journal.truncate(whole)
        self._output: IO[bytes] = self._files.enter_context(open(self.out, "ab"))  # noqa: SIM115
        there = self.out.read_bytes()
        if not lines.startswith(there):
            raise ConfigError(
                f"{self.out}: does not hold what {self.journal.name} says was written; has it been edited?\n"
                f"move it away: the same command then writes it again, and asks nothing twice"
            )
        self._append(self._output, lines[len(there) :])
        self.save()

    def trouble(self, passage: Passage, reason: str, usage: Usage) -> None:
        """A request that gave nothing to use."""
        self._enter({"passage": passage.id, "trouble": reason, **usage._asdict()})

    def fail(self, passage: Passage, reason: str) -> None:
        """It is tried again on the next start."""
        self._enter({"passage": passage.id, "failed": reason})

    def answer(self, passage: Passage, pairs: Sequence[Question], usage: Usage) -> None:
        items = []
        for pair in pairs:
            reason = self.filter.reason(pair)
            if reason is None:
                self.filter.keep(pair)
            items.append({"question": pair.question, "answer": pair.answer, "dropped": reason})
        entry = {"passage": passage.id, "source": passage.source, "items": items, **usage._asdict()}
        self._append(self._output, self._enter(entry))

    def save(self) -> None:
        """The side file."""
        facts = {
            "settings": as_raw(self.settings),
            "questions": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "passages": {"answered": len(self.answered), "failed": len(self.failed)},
            "requests": self.requests,
            "troubles": dict(self.troubles.most_common()),
            "usage": self.usage._asdict(),
        }
        write_atomically(self.side, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def close(self) -> None:
        with suppress(OSError):  # no room: the journal has it all
            self.save()
        self._files.close()

    def _claim(self) -> None:
        """Find out what is there, and change nothing."""
        if self.side.exists():
            try:
                before: Raw = json.loads(self.side.read_text())["settings"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self.side}: is not what this command writes; choose another --out") from None
            if changed := differences(before, as_raw(self.settings)):
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                raise ConfigError(
                    f"{self.out} was made with other settings: {changed[0]}{more}\n"
                    f"give another --out, or the settings that stand in {self.side}"
                )
        elif self.journal.exists() or self.out.exists():
            raise ConfigError(
                f"{self.out} or {self.journal.name} exists without {self.side.name}, which says how it was made\n"
                f"choose another --out, or move it away"
            )

    def _read(self) -> tuple[bytes, int]:
        """All that the journal says -> what the output must hold, and the bytes of the journal's whole lines."""
        self.filter = Filter()
        self.answered: set[str] = set()
        self.failed: dict[str, str] = {}
        self.kept = self.requests = 0
        self.usage = Usage()
        self.dropped: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()
        content = self.journal.read_bytes() if self.journal.exists() else b""
        whole = content.rfind(b"\n") + 1  # what a kill cut in half is asked for again
        lines = []
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self._count(entry)
                lines.append(_lines(entry))
                for item in entry.get("items", ()):
                    if item["dropped"] is None:
                        self.filter.keep(Question(item["question"], item["answer"]))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{self.journal} line {number}: is damaged\n"
                    f"delete that line, and {self.out.name}: the same command writes it again, and asks what is missing"
                ) from None
        return b"".join(lines), whole

    def _enter(self, entry: Raw) -> bytes:
        """Into the journal -> the lines for the output."""
        self._append(self._journal, _line(entry))
        self._count(entry)
        return _lines(entry)

    def _count(self, entry: Raw) -> None:
        passage = entry["passage"]
        if "failed" in entry:
            self.failed[passage] = entry["failed"]
            return
        self.requests += 1
        self.usage = Usage(
            self.usage.prompt_tokens + entry["prompt_tokens"], self.usage.completion_tokens + entry["completion_tokens"]
        )
        if "trouble" in entry:
            self.troubles[kind(entry["trouble"])] += 1
            return
        self.answered.add(passage)
        self.failed.pop(passage, None)
        for item in entry["items"]:
            if item["dropped"] is None:
                self.kept += 1
            else:
                self.dropped[item["dropped"]] += 1

    @staticmethod
    def _append(file: IO[bytes], data: bytes) -> None:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def kind(trouble: str) -> str:
    return trouble.partition(":")[0]


def _line(value: Raw) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace") + b"\n"


def _lines(entry: Raw) -> bytes:
    """Of the output: one a question that was kept."""
    return b"".join(
        _line(
            {
                "text": Question(item["question"], item["answer"]).text,
                "question": item["question"],
                "answer": item["answer"],
                "source": entry["source"],
                "passage": entry["passage"],
            }
        )
        for item in entry.get("items", ())
        if item["dropped"] is None
    )
