"""Read the letter of the option that an answer names, under a named policy. Nothing is guessed."""

import re
import string
from collections.abc import Sequence
from functools import lru_cache

from vapr.evaluation.scoring.answers import SO, Policy, after_reasoning, final_answers, without_left_over
from vapr.text import sentences

_LEAD = re.compile(
    r"(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\b[*_]*(?:\s+(?:is|would be)\b)?"
    r"[\s*_]*[:：]?\s*|(?:正确)?(?:答案|选项)(?:是|为)?\s*[:：]?\s*|(?:我)?选择?\s*[:：]?\s*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"[\s$]*\\boxed\s*\{(.*)\}[\s$.]*", re.DOTALL)
_STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_NAMED = re.compile(
    r"[\s\"'“‘*_`#>(\[{$（【-]*([A-Za-z])(?!['’]\w)"
    r"(\s+[-–—]\s+|[\s\"'”’*_`.)\]}:：,，。、；;$!）】]*)(?![-–—/&+%])(.*)",
    re.DOTALL,
)
_SECOND = re.compile(
    r"(?:[,/&+]|and\b|or\b)[\s,]*(?:and\b|or\b)?\s*\(?([A-Za-z])\)?(?=\s*(?:$|[,.;:)&/!?])|\s+(?:and|or|are)\b)",
    re.IGNORECASE,
)
_ALSO = re.compile(r"(?:[,;/&\n]|\band\b|\bor\b)\s*(?:option\s+)?\(?([A-Z])\s*[.):]+(?=(.*))", re.IGNORECASE)
_JUDGED = re.compile(
    r"(?:because|since|as)\b|(?:is|would be|seems|must be)\s+(?:the\s+)?(?:most\s+)?"
    r"(?:correct|right|best|answer|true|accurate|appropriate|likely)\b",
    re.IGNORECASE,
)
_SETTLED = re.compile(
    r"(?:\b(?:is|be|option|choice|answer|letter|choose|chose|pick|select|go with|选|是)|['’]s)\s*[:：]?\s*[\"'*_]*"
    r"(?:\(([A-Z])\)|([A-Z])(?=[\"'*_.!)]*\s*(?:$|(?:because|since)\b)))"
)
_DENIED = re.compile(
    r"\b(?:not|cannot|neither|nor|incorrect|wrong|false|eliminate\w*|exclude\w*|rather|unlike\w*)\b|n['’]t\b"
    r"|\brules? out",
    re.IGNORECASE,
)


_LINE_MARK = re.compile(r"[\s*_#>•-]*(?:option\s+)?\(?([A-Z])[).:][\s*_]", re.IGNORECASE)
_INLINE = re.compile(r"(?:^|[\s(])([A-Z])[).:]\s*(?=\S)")


def letter(text: str, options: Sequence[str], policy: Policy) -> str | None:
    """Read the letter of an option, ``"A"`` for the first; None if the answer names none, or several.

    An answer names an option that begins with its letter ("B", "(b)", "B. red", "The answer is B") or is its text.
    "A" is an article and "I" a pronoun unless a mark, the end, or the option's text follows; a letter before the text
    of another option, a list of letters and a list of all options name none. Under ``last-answer`` the final answer or
    the last sentence that names one counts, also where it ends with the letter ("so it must be B"); lines that go
    through the options one by one do not.

    Args:
        text: the answer.
        options: texts of the options, the first 26 of which have letters; empty if only the letters are known.
        policy: ``last-answer``, or anything else for ``strict``.
    """
    letters = string.ascii_uppercase[: len(options) or 26]
    if len(text) < 5 and (alone := plain(text).upper()) and alone in letters and len(alone) == 1:
        return alone  # "B", "(B)", "b.": what most answers are
    text = _STYLED.sub(r"\1", without_left_over(text))
    if policy != "last-answer":
        return _at_beginning(text, letters, options)
    for place in final_answers(_without_discussion(after_reasoning(text), letters)):
        place = SO.sub("", place.strip(), count=1)
        if (found := _at_beginning(place, letters, options) or _settled(place, letters)) is not None:
            return found
    return None


def without_lead(text: str) -> str:
    """Return an answer without "The answer is", "Option", "答案：" and marks before what it says."""
    text = text.strip()
    for _ in range(3):  # "The answer is option (B)"
        bare = text.lstrip("*_ #>")
        text = bare[lead.end() :] if (lead := _LEAD.match(bare)) else text
    return boxed[1] if (boxed := _BOXED.fullmatch(text)) else text


def _at_beginning(text: str, letters: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that a text begins with or is."""
    if _lists_all(text, letters):
        return None
    text = without_lead(text)
    said = plain.__wrapped__(text)
    if len(said) == 1 and said.upper() in letters:
        return said.upper()
    for form in (plain, _bare):  # as it is written, then without an article
        said = form.__wrapped__(text)  # not remembered: few answers come again
        same = [label for label, option in zip(letters, options, strict=False) if form(option) == said != ""]
        if len(same) == 1:
            return same[0]
    found = _NAMED.match(text)
    if found is None or found[1].upper() not in letters:
        return None
    chosen, after, rest = found[1].upper(), found[2], found[3]
    if not rest:
        return chosen
    in_chinese = "\u3400" <= rest[0] <= "\u9fff"
    if not after and not in_chinese:
        return None  # the first letter of a word
    second = _SECOND.match(after.lstrip(") ") + rest)
    if second and second[1].upper() != chosen and second[1].upper() in letters:
        return None  # "A or B", "(A), (C)"
    texts = [plain(option) for option in options]
    own, other = (texts[letters.index(chosen)] if options else ""), plain(rest)
    if own != other and other in texts:
        return None  # the letter of one, the text of another
    for also in _ALSO.finditer(rest):  # "A: red and B: blue"
        place = letters.find(also[1].upper())
        if place >= 0 and texts and also[1].upper() != chosen and plain(also[2]).startswith(texts[place] or "\0"):
            return None
    if own and other.startswith(own) and not re.match(r"\w", other[len(own) :]):
        return chosen
    # "A dog" and "I see" are words; "A. The dog", "(A) The dog", "a) the dog" and "A is correct" are letters.
    if found[1].islower():
        return chosen if re.match(r"[*_`\"']*[.):：、]\W*\s", after) else None
    marked = after.strip() not in ("", ",") if chosen == "I" else after.strip() != ""
    return chosen if marked or in_chinese or _JUDGED.match(rest) else None


def _settled(text: str, letters: str) -> str | None:
    """Return the one letter that a sentence settles on: "so it must be B", "option (B) fits best", "... red (B)"."""
    first = (sentences(text) or [""])[0]
    clause = re.split(r"[,;:]\s|\b(?:but|so|hence|thus|therefore)\b", first)[-1]
    if _DENIED.search(clause):
        return None
    named = {found[1] or found[2] for found in _SETTLED.finditer(clause)}
    if not named and re.search(r"\([A-Z]\)[\s*_.!]*$", clause):
        named = set(re.findall(r"\(([A-Z])\)", first))
    return named.pop() if len(named) == 1 and named <= set(letters) else None


def _lists_all(text: str, letters: str) -> bool:
    """Return whether an answer repeats the options in order, one a line, or one after the other."""
    listed = "".join(label for _, label in _option_lines(text, letters))
    inline = "".join(_INLINE.findall(text)) if len(letters) > 2 else ""
    known = len(letters) < 26
    if not known:
        return len(listed) > 1 and listed == letters[: len(listed)]
    return (len(letters) > 1 and listed.startswith(letters)) or (len(letters) > 2 and inline.startswith(letters))


def _without_discussion(text: str, letters: str) -> str:
    """Leave out lines that go through the options; a first line that names one is kept if no other follows it."""
    marked = _option_lines(text, letters)
    if len({label for _, label in marked}) < 2:
        return text
    lines, numbers = text.splitlines(), {number for number, _ in marked}
    following = next((number for number in range(1, len(lines)) if lines[number].strip()), 0)
    if following not in numbers:
        numbers.discard(0)
    return "\n".join(line for number, line in enumerate(lines) if number not in numbers)


def _option_lines(text: str, letters: str) -> list[tuple[int, str]]:
    """Return number and letter of each line that begins with the mark of an option: "(A) ...", "- B. ..."."""
    if "\n" not in text:  # one line lists nothing
        return []
    found = [(number, _LINE_MARK.match(f"{line} ")) for number, line in enumerate(text.splitlines())]
    return [(number, line[1].upper()) for number, line in found if line and line[1].upper() in letters]


@lru_cache(maxsize=1024)  # the options of one question come again and again
def plain(text: str) -> str:
    """Return a text in lower case without needless space and the marks around it."""
    return " ".join(text.lower().split()).strip(" \"'“”‘’*_`.,;:()[]{}$!。，：；（）【】")


@lru_cache(maxsize=1024)
def _bare(text: str) -> str:
    return re.sub(r"^(?:an?|the) ", "", plain(text))
