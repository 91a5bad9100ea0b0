"""A rule instead of a model: question-answer pairs from the sentences of a text that define something."""

import re
from collections.abc import Iterator
from typing import Final

from undo.prepare_data.write_questions.questions import REFERENCE, Question, words

_END = re.compile(r"(?<=[.!?])[\"”’)]?\s+(?=[\"“(]?[A-Z])")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Dr|Mr|Ms|St|No|Fig|Inc|approx|sp|spp|ca)|\b[A-Z])\.$")
_TERM = r"[A-Za-z][\w'’+#/-]*"
_DOES = (  # asked as "What does X do?"
    "allows|enables|provides|prevents|protects|ensures|controls|determines|generates|converts|regulates|produces"
    "|stimulates|inhibits|transports|connects|separates|detects|verifies|validates|encrypts|restricts|executes|helps"
)
_WITH: Final = {  # asked with the verb itself
    "requires": "require", "contains": "contain", "consists of": "consist of", "involves": "involve",
    "supports": "support", "defines": "define", "specifies": "specify", "describes": "describe", "stores": "store",
    "measures": "measure", "represents": "represent", "returns": "return", "exploits": "exploit",
}  # fmt: skip
_SENTENCE: Final = re.compile(
    rf"""^(?P<article>(?:The|An|A)\s)?
    (?P<term>{_TERM}(?:\s{_TERM}){{0,8}}?)
    (?P<short>\s\([A-Z][\w\s-]{{0,24}}\))?
    (?:,\s(?:also\s|or\s|sometimes\s)[^,]{{3,60}},)?\s
    (?: (?P<be>is|are)\s(?:(?:simply|essentially|basically|defined\sas|also\sknown\sas)\s)?
        (?:an?|the|any|one\sof)\s(?=[a-z])
      | (?P<plural>are)\s(?!\w+ed\s|examples)
        (?=(?:[a-z-]+\s){{0,3}}[a-z]+s\s(?:that|which|who|of|used|designed|in|between)\s)
      | (?P<means>means|refers\sto)\s
      | (?P<occurs>occurs)\s(?=when|if|in|at|during)
      | (?P<used>is|are)\s(?:(?:commonly|often|usually|typically|primarily|mainly)\s)?used\s(?=to|for|as|in|by)
      | (?P<does>{_DOES})\s
      | (?P<with>{"|".join(_WITH).replace(" ", chr(92) + "s")})\s
    )(?!(?:could|can|should|may|must|might|will|is|are|and|or)\s)(?P<rest>\S.*\.)$""",
    re.VERBOSE,
)
_NO_TERM: Final = frozenset(
    words(  # a term with such a word is a clause, or points to something said before
        """a an the this that these those it its he she they we you i there here what which who where when why how if
    then because while since although though as than so but and or nor not no yes is are was were be been being
    has have had do does did can could may might must shall should will would to for from with without by at on
    into about between under another other others such each every both either neither one two three all any some
    many most much more less few our your their his her my same first second third next last final main major key
    only following above below former latter now today also even note however therefore thus hence instead finally
    additionally furthermore moreover similarly unlike after before during per via let see use using given
    resulting common basic typical simple good better best useful popular important classic possible potential
    notable recent new old certain itself themselves simply already still suppose consider"""
    )
)
_NO_HEAD: Final = frozenset(
    words(  # nothing is defined by "the reason is the ..."
        """reason reasons goal goals problem problems question result results example examples
    purpose idea point points difference differences advantage advantages disadvantage disadvantages alternative
    answer default solution issue issues case cases step steps way ways thing things rest end part parts benefit
    benefits drawback challenge exception author authors approach option options chapter section figure table
    article document text pep proposal value values name names output input effect effects cause causes factor
    kind type types form forms number amount aim focus role topic motivation rationale intent intention
    consequence implication concern rule list set time place people researchers introduction overview summary
    background impact scenario outcome practice advice test tests code tester"""
    )
)
_OUTSIDE: Final = re.compile(  # points to what was said before, speaks to the reader, or only judges
    r"\b(?:this|these|those|above|below|following|here|previous|previously|aforementioned|such a|I|we|our|us|my|you"
    r"|your|idea|lot of|matter of|case of|result of|same|one that|thing|subject of|topic of|et al|as follows|they|it's"
    r"|factor|way to|place to|concern for|good|great|helpful|important|challenging|difficult|easy)\b"
    r"|\(\s*\)|\d\.[A-Z]|https?:|[{}<>|=\\\[\]•*`#]"
)
_DEFINES: Final = re.compile(
    r"\b(?:that|which|who|whose|where|when|of|for|used|by|from|with|to|in|on|between|through|against|consisting|caused"
    r"|designed|containing|including|allowing|using)\b"
)
_HEADING: Final = "Introduction|Overview|Summary|Description|Background|Abstract|Definition|Context|Objective"


def definitions(text: str) -> Iterator[Question]:
    """Pairs from sentences that say what something is or does: "X is a Y that ..." -> "What is X?". No model is asked.

    Precision before recall: what looks like a clause, points to what was said before or speaks to the reader is left.
    """
    within = set(re.findall(r"[a-z]\S*[a-z]", text))  # words that the document writes with small letters
    for sentence in sentences(text):
        sentence = re.sub(r"\s*\((?:see|and|also|[\s,;])*\)", "", sentence)  # a figure's number has been lost
        match = _SENTENCE.match(sentence)
        if match is None or len(sentence.split()) > 60 or len(match["rest"].split()) < 5:
            continue
        article, term = _unglue((match["article"] or "").strip(), match["term"])
        parts = term.split()
        if _NO_TERM.intersection(term.lower().split()) or parts[-1].lower() in _NO_HEAD or not 2 <= len(term) <= 60:
            continue
        if len(parts) > 6 or parts[-1].endswith("ly") or re.search(rf"[a-z](?:{_HEADING})|\w{{24}}", term):
            continue
        if article == "The" and len(parts) == 1 and term.islower():  # the gland: which one?
            continue
        said = sentence[match.start("rest") :]
        if _OUTSIDE.search(said) or REFERENCE.search(sentence) or not _DEFINES.search(said):
            continue
        if sentence.count("(") != sentence.count(")") or said.count('"') % 2:
            continue
        if not article:
            term = _decapitalised(term, within)
        asked = f"{article.lower()} {term}".strip() + (match["short"] or "")
        answer = f"{article} {match['term'][len(match['term']) - len(term) :]}".strip() + sentence[match.end("term") :]
        yield Question(_ask(match, asked), answer[0].upper() + answer[1:] if term.islower() else answer)


def _decapitalised(term: str, within: set[str]) -> str:
    """Without the capital that was only the sentence's: Hair, but not Aspergillus, DNA or Reverse Transcriptase."""
    first, _, rest = term.partition(" ")
    small = first.lower() in within and first[1:].islower() and rest in ("", rest.lower())
    return term[0].lower() + term[1:] if small else term


def _ask(match: re.Match[str], asked: str) -> str:
    if match["be"] or match["plural"]:
        return f"What {match['be'] or 'are'} {asked}?"
    if match["means"]:
        return f"What does {asked} mean?" if match["means"] == "means" else f"What is {asked}?"
    if match["occurs"]:
        return f"When does {asked} occur?"
    if match["used"]:
        return f"What {match['used']} {asked} used for?"
    return f"What does {asked} {_WITH[match['with']] if match['with'] else 'do'}?"


def _unglue(article: str, term: str) -> tuple[str, str]:
    """Take off a heading that lost its line: "Castor Castor", "Panic Modes A panic mode", "DoctorA doctor"."""
    if found := list(re.finditer(r"(?:(?<=\s)|(?<=[a-z]))(The|An|A)\s(?=\w)", term)):
        article, term = found[-1][1], term[found[-1].end() :]
    parts = term.split()
    lower = [part.lower().removesuffix("s") for part in parts]
    if len(parts) > 1 and parts[0] in _HEADING.split("|"):
        return "", " ".join(parts[1:])
    for size in (3, 2, 1):
        if len(parts) >= 2 * size and lower[-size:] == lower[-2 * size : -size]:
            return "", " ".join(parts[-size:])
    if lower[-1] in lower[:-1]:  # DoS Prevention DoS
        return "", parts[-1]
    return article, term


def sentences(text: str) -> Iterator[str]:
    """Those of each line, with single spaces; a list's bullet is taken off."""
    for line in text.splitlines():
        begun = ""
        for piece in _END.split(" ".join(line.split()).lstrip("-*•# ")):
            begun = f"{begun} {piece}" if begun else piece
            if not _ABBREVIATION.search(begun):
                yield begun
                begun = ""
        if begun:
            yield begun
