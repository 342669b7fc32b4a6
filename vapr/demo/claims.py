"""What a demo has shown and what it has not, in words that the figures choose."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vapr.demo.measure import distance, verdict

Result = Mapping[str, Any]


class Claim(NamedTuple):
    """Something that could be expected of DPO on edited negatives, and what was measured."""

    expected: str
    holds: bool
    found: str


def claims(result: Result) -> list[Claim]:
    """Return every expectation with what was measured; ``holds`` only where the difference is more than chance."""
    return [
        _accuracy(result),
        _yes_rate(result),
        _ahead(result, "length-biased", "the same DPO on rejected answers that are also longer"),
        _ahead(result, "more-sft", "as many steps of sft on the same chosen answers"),
        _scaling(result),
        _ways_of_speaking(result),
    ]


def _accuracy(result: Result) -> Claim:
    compared = result["compared"]["sft -> dpo"]
    worse = [name for name, one in compared.items() if name != "overall" and verdict(one) == "worse"]
    found = f"DPO {_change(compared['overall'])}"
    if worse:
        found += f"; {' and '.join(worse)} got worse"
    return Claim("DPO raises accuracy", verdict(compared["overall"]) == "better", found)


def _yes_rate(result: Result) -> Claim:
    before, after = (result["policies"][name] for name in ("sft", "dpo"))
    rates = [one["yes"]["yes_rate"]["value"] for one in (before, after)]
    truth = before["yes"]["gold_yes_rate"]["value"]
    found = f"the share of “Yes” went from {rates[0]:.1%} to {rates[1]:.1%}, where {truth:.1%} is true"
    was, now = distance(before), distance(after)
    if was < 0.05:
        return Claim("DPO halves the “Yes” bias", False, f"there was hardly a bias to repair: {found}")
    if verdict(result["compared"]["sft -> dpo"]["existence"]) == "worse":
        # Guessing, or answers that say neither, bring the rate down as well.
        return Claim("DPO halves the “Yes” bias", False, f"{found}, but fewer of these answers are right")
    return Claim("DPO halves the “Yes” bias", now <= was / 2, found)


def _ahead(result: Result, other: str, in_words: str) -> Claim:
    compared = result["compared"][f"{other} -> dpo"]["overall"]
    said = {
        "better": f"ahead by {_points(compared)}",
        "worse": f"behind by {_points(compared)}",
        "no difference shown": f"no difference shown ({_points(compared, signed=True)})",
    }[verdict(compared)]
    return Claim(f"DPO on edited answers beats {in_words}", verdict(compared) == "better", said)


def _scaling(result: Result) -> Claim:
    accuracy = [result["policies"][name]["accuracy"]["overall"]["value"] for name in ("dpo-quarter", "dpo-half", "dpo")]
    found = "a quarter, half and all of the pairs give " + ", ".join(f"{value:.1%}" for value in accuracy)
    rises = accuracy == sorted(accuracy) and verdict(result["compared"]["dpo-quarter -> dpo"]["overall"]) == "better"
    return Claim("More pairs help more", rises, found)


def _ways_of_speaking(result: Result) -> Claim:
    counts = {name: one["garbled"]["answers"] for name, one in result["policies"].items()}
    found = f"garbled answers: {counts['sft']} after sft, {counts['dpo']} after DPO"
    others = [f"{count} of {name}" for name, count in counts.items() if name not in ("sft", "dpo") and count]
    if others:
        found += f" ({', '.join(others)})"
    return Claim("DPO garbles no answer", counts["dpo"] <= counts["sft"], found)


def _change(compared: Mapping[str, Any]) -> str:
    """Say what a change is: "added 8.1 points (95 % interval 6.0 to 10.2): 120 answers fixed, 30 broken"."""
    counts = f"{compared['fixed']} answers fixed, {compared['broken']} broken"
    does = {"better": "added", "worse": "cost"}.get(verdict(compared))
    if does is None:
        return f"made no difference that can be told from chance ({_points(compared, signed=True)}; {counts})"
    return f"{does} {_points(compared)}: {counts}"


def _points(compared: Mapping[str, Any], *, signed: bool = False) -> str:
    """Write a difference in points with its interval; without ``signed``, by its size alone."""
    value = 100 * compared["difference"]["value"]
    low, high = (100 * end for end in compared["difference"]["interval"])
    if not signed and value < 0:
        value, low, high = -value, -high, -low
    return f"{value:{'+' if signed else ''}.1f} points, 95 % interval {low:.1f} to {high:.1f}"


def headline(result: Result) -> str:
    """Say in a few words what happened."""
    compared = result["compared"]["sft -> dpo"]["overall"]
    points = 100 * compared["difference"]["value"]
    change = {
        "better": f"DPO added {points:.1f} points of accuracy",
        "worse": f"DPO cost {-points:.1f} points of accuracy",
        "no difference shown": "DPO changed accuracy by no more than chance",
    }[verdict(compared)]
    was, now = (100 * distance(result["policies"][name]) for name in ("sft", "dpo"))
    if was < 5:
        return f"{change}; there was hardly a “Yes” bias to repair"
    shrank = "cut" if now < was else "did not cut"
    return f"{change} and {shrank} the “Yes” bias ({was:.0f} to {now:.0f} points)"
