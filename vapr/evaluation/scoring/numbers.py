"""Read the number that an answer states: the whole of it, or its final answer, under a named policy."""

import re

from vapr.evaluation.scoring.answers import Policy, final_answers
from vapr.evaluation.scoring.letters import without_lead

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_TIMES = r"\s*(?:[x×*·]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[-+−]?\d+)\s*\}?"
_VALUE = re.compile(
    rf"(?P<sign>[-+−]?)\s*[$€£¥]?\s*(?:\\?d?frac\{{\s*(?P<over>{_DIGITS})\s*\}}\{{\s*(?P<under>{_DIGITS})\s*\}}"
    rf"|(?P<digits>{_DIGITS})(?:(?P<e>[eE][-+]?\d+)\b|{_TIMES}|\s*/\s*(?P<by>{_DIGITS})(?![\d/]))?)"
)
_OPENING = re.compile(
    r"[\s\"'“‘*_`#>(\[{$\\]*(?:(?:\\?(?:text|mathrm|mathbf)\{)?\s*[A-Za-z∠Δ]\w{0,3}\}?\s*(?:=|≈|~)\s*)?"
    r"(?:(?:about|approximately|approx\.?|around|roughly|nearly|exactly)\b|≈|~|\\approx)?[\s$*_(]*"
)
# Up to four words or signs without a number of their own: "m", "cm^2", "%", "of the apples", "\text{ m}".
_UNIT = re.compile(
    r"(?:\s*(?:\\?[A-Za-zµμΩÅ°%‰][A-Za-zµμΩÅ°%‰′″/·⋅{}\\'-]*(?:\^\{?[-−]?[0-3]\}?|(?<=m)[23])?(?!\d)|[²³°%$€£¥])){0,4}"
)
_CLOSING = re.compile(r"[\s\"'”’*_`)\]}$.,;:!\\]*$")
_FIRST = re.compile(r"[.!?]\s+(?=[A-Z\"'(])|\n")  # "5. That is" begins no list here
_IN_TEXT = re.compile(rf"(?<![\w.,^{{])(?:{_VALUE.pattern})(?![\w]*\d)")
_WORD_IN_TEXT = re.compile(rf"\b(?:{'|'.join(WORDS[2:])})\b", re.IGNORECASE)


def number(text: str) -> float | None:
    """Return the number that a text is, with a unit or a few words after it: "1,200 g", "x = 3/4", "three apples".

    None for a text that says more than one number, or something else.
    """
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)
    opening = _OPENING.match(text)
    rest = text[opening.end() if opening else 0 :]
    if (found := _VALUE.match(rest)) is None:
        said = re.sub(r"[^\w\s]", "", rest).lower().split()
        return float(WORDS.index(said[0])) if 0 < len(said) <= 2 and said[0] in WORDS else None
    after = rest[found.end() :]
    if after[:1].isalnum() and not re.match(r"[A-Za-zµμΩÅ°]", after):
        return None
    unit = _UNIT.match(after)
    return _value(found) if _CLOSING.match(after[unit.end() if unit else 0 :]) else None


def stated_number(text: str, policy: Policy) -> float | None:
    """Read the number that an answer states; None if it states none, or several.

    Under ``last-answer`` it is that of the final answer, or else of the last sentence that states one: where several
    stand in it, the one after the last "=".
    """
    if policy != "last-answer":
        said = without_lead(text)
        value = number(said)
        return number(_FIRST.split(said.strip(), maxsplit=1)[0]) if value is None else value
    for place in final_answers(text):
        for part in dict.fromkeys([_FIRST.split(place.strip(), maxsplit=1)[0], place]):
            for said in (part, re.split(r"=|≈|\\approx|\bequals\b", part)[-1]):
                if (value := number(said)) is not None:
                    return value
            if (value := _only(part)) is not None:
                return value
    return None


def _only(text: str) -> float | None:
    """Return the number in a text where there is but one, in digits or else as a word from "two" on."""
    values = {_value(found) for found in _IN_TEXT.finditer(text)}
    if not values:
        values = {float(WORDS.index(found[0].lower())) for found in _WORD_IN_TEXT.finditer(text)}
    return values.pop() if len(values) == 1 else None


def _value(found: re.Match[str]) -> float | None:
    sign = -1.0 if found["sign"] in ("-", "−") else 1.0
    top, under = found["over"] or found["digits"], found["under"] or found["by"]
    value = float(top.replace(",", ""))
    if under is not None:
        bottom = float(under.replace(",", ""))
        return sign * value / bottom if bottom else None
    try:
        if found["e"]:
            value = float(f"{value}{found['e']}")
        elif found["power"]:
            value *= 10.0 ** int(found["power"].replace("−", "-"))
    except OverflowError:
        return None
    return sign * value if abs(value) != float("inf") else None
