"""Questions with their answers (D.2.2): the prompt that asks for them, the schema, the filter.

The paper shows one example and says no more: prompt and filter are our own. Nothing here reads or writes a file.
"""

import math
import re
import unicodedata
import zlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from pydantic import BaseModel, Field, ValidationError


@dataclass(frozen=True)
class Question:
    question: str
    answer: str

    @property
    def text(self) -> str:
        """As a document of a corpus."""
        return f"Question: {self.question}\nAnswer: {self.answer}"


# --- asking a model ------------------------------------------------------------------------------------------------

PROMPT: Final = """\
Below is a passage from a larger document. Write {count} different questions about what it teaches, each with its \
answer.

- A reader who never sees the passage must understand the question and be able to learn from the answer. Name what you \
ask about by its full, specific name; let no "it", "this" or "the above" point outside the question.
- The passage alone must be enough to answer. Add nothing that it does not say.
- Never mention a passage, a text, an author, a section, a figure or a table.
- Prefer the specific terms, names and mechanisms of the subject, and ask how and why as well as what.
- An answer is one to three full sentences. It says more than the question does.
- If the passage teaches fewer than {count} things (a list of links, a licence), write fewer questions, or none.

Two examples, of another subject:
Question: Why does sourdough bread keep longer than bread raised with baker's yeast?
Answer: The lactic acid bacteria of a sourdough make the crumb acid, which slows the growth of mould and the staling \
of starch.
Question: What does the escapement of a pendulum clock do?
Answer: The escapement lets the gear train advance by one tooth per swing and gives the pendulum a small push, which \
keeps it swinging.

Reply with JSON only, in this form: {{"items": [{{"question": "...", "answer": "..."}}]}}

The passage:
\"\"\"
{passage}
\"\"\"
"""


def prompt(passage: str, count: int) -> str:
    return PROMPT.format(count=count, passage=passage.strip())


class _Item(BaseModel):
    question: str
    answer: str


class _Items(BaseModel):
    items: list[_Item] = Field(max_length=1000)


def parse(reply: str) -> list[Question]:
    """What the model wrote. Code fences and words around the JSON are tolerated. Raises ValueError: what is wrong."""
    text = reply.rpartition("</think>")[2]
    begin, end = text.find("{"), text.rfind("}")
    if begin < 0:
        raise ValueError("no JSON in the reply" if text.strip() else "an empty reply")
    try:
        found = _Items.model_validate_json(text[begin : end + 1] if end > begin else text[begin:])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise ValueError("broken JSON in the reply") from None
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"wrong JSON in the reply: {where}: {first['msg']}") from None
    return [Question(_plain(i.question), _plain(i.answer)) for i in found.items]


def _plain(text: str) -> str:
    """One line, without control characters: escape sequences would reach whoever prints the corpus."""
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) != "Cc")


# --- the filter ----------------------------------------------------------------------------------------------------

Reason = Literal[
    "empty", "too short", "too long", "refers to the passage", "answer adds nothing", "duplicate", "near duplicate"
]
QUESTION_WORDS: Final = (3, 60)  # at least, at most
ANSWER_WORDS: Final = (1, 200)
NEAR: Final = 0.75  # Jaccard similarity of the questions' pairs of neighbouring words

_PLACE = "passage|excerpt|text|article|document|paper|study|chapter|section|paragraph|snippet|transcript|sentence"
REFERENCE: Final = re.compile(
    rf"""\b(?:
      (?:the|this|these|that|our)\s(?:(?:above|given|provided|following|present)\s)?(?:passages?|excerpts?|authors?)\b
    | (?:according\sto|as\sper|based\son|described\sin|mentioned\sin|discussed\sin|stated\sin|given\sin|presented\sin
        |provided\sin|listed\sin|shown\sin|reported\sin|defined\sin|outlined\sin|introduced\sin|purpose\sof|topic\sof)
      \s(?:the|this|that)\s(?:\w+\s)?(?:{_PLACE})\b
    | (?:in|from|within|throughout|by|of|does|do|did)\sthis\s(?:\w+\s)?(?:{_PLACE})\b
    | (?:the|this)\s(?:{_PLACE})\s(?:says?|states?|mentions?|describes?|discusses|explains?|suggests?|presents?
        |provides?|above|below|recommends?|lists?|defines?|outlines?)\b
    | (?:mentioned|described|discussed|shown|listed|defined|noted)\s(?:above|below|earlier|previously|here)\b
    | (?:figure|fig\.|table|appendix|listing|chapter|section)\s\d
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def words(text: str) -> list[str]:
    """Lower case, without punctuation; C++ and C# are not C."""
    return re.findall(r"\w+(?:['’]\w+)*[+#]*", text.lower())


_STOP = frozenset(
    words(
        """a an and are as at be been but by can do does for from had has have how in into is it its may of on or that
    the their them there these they this to was were what when where which who whom whose why will with would"""
    )
)


class Filter:
    """Says why a question is not kept, and knows all that were. Exact: a prefix of each question's shingles is indexed.

    Two sets of n and m shingles with a Jaccard similarity of at least t share one of their first n - ceil(t n) + 1, in
    any fixed order of shingles (Bayardo, Ma, Srikant 2007); only questions that do are compared.
    """

    def __init__(self) -> None:
        self._exact: set[tuple[str, ...]] = set()
        self._shingles: list[frozenset[str]] = []
        self._index: defaultdict[str, list[int]] = defaultdict(list)

    def reason(self, pair: Question) -> Reason | None:
        """None: it may be kept."""
        question, answer = words(pair.question), words(pair.answer)
        if not question or not answer:
            return "empty"
        if len(question) < QUESTION_WORDS[0] or len(answer) < ANSWER_WORDS[0]:
            return "too short"
        if len(question) > QUESTION_WORDS[1] or len(answer) > ANSWER_WORDS[1]:
            return "too long"
        if REFERENCE.search(pair.question) or REFERENCE.search(pair.answer):
            return "refers to the passage"
        if not set(answer) - set(question) - _STOP:
            return "answer adds nothing"
        if tuple(question) in self._exact:
            return "duplicate"
        mine = _shingles(question)
        for number in {number for shingle in _prefix(mine) for number in self._index.get(shingle, ())}:
            other = self._shingles[number]
            if len(mine & other) >= NEAR * len(mine | other):
                return "near duplicate"
        return None

    def keep(self, pair: Question) -> None:
        question = words(pair.question)
        mine = _shingles(question)
        self._exact.add(tuple(question))
        for shingle in _prefix(mine):
            self._index[shingle].append(len(self._shingles))
        self._shingles.append(mine)


def _shingles(question: list[str]) -> frozenset[str]:
    padded = ["", *question, ""]  # so that the first and the last word count as much as the others
    return frozenset(f"{a} {b}" for a, b in pairwise(padded))


def _prefix(shingles: frozenset[str]) -> list[str]:
    """Those of rare words first: "what is" would bring every question back."""
    size = len(shingles) - math.ceil(NEAR * len(shingles)) + 1
    return sorted(shingles, key=_order)[:size]


def _order(shingle: str) -> tuple[int, int, str]:
    common = sum(not word or word in _STOP for word in shingle.split(" "))
    return common, zlib.crc32(shingle.encode()), shingle
