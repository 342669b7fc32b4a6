"""The limits that a pair set is held against, and its verdict on each.

A gate fails only if the whole 95 % interval lies beyond its limit, so that a small set does not fail by chance; where
the figure is beyond the limit but the interval is not, it warns. No evidence against a set is no proof for it: where
the figure is within the limit but the interval reaches far beyond it, the set is too small to tell.
"""

import math
from collections.abc import Mapping
from typing import Any

from vapr.intervals import MIN_GROUPS

SURFACE_LIMIT = 55.0
NGRAM_WARNING, NGRAM_LIMIT = 60.0, 70.0
BALANCE = (48.0, 52.0)
LENGTH_GAP = 1.0
DUPLICATES = 1.0
IMAGE_GAP = 15.0
PICTURE_WARNING = 60.0

POINTS_BEYOND = 10.0
LENGTH_GAP_BEYOND = 4.0
"""How far beyond the limit, in points, an interval may reach and its gate still pass; for the mean length gap, whose
limits are closer, in percent of the length."""

TOO_SMALL = "too small to tell"

Gate = dict[str, Any]
"""``name``, ``status`` (pass, warn, fail, too small to tell, not measured), ``value``, ``interval``, ``limit``, and
``why``, in words."""


def judge(result: Mapping[str, Any]) -> list[Gate]:
    """Return the gates of one set's result (:func:`vapr.audit.measure.audit`)."""
    overall = result["overall"]
    gates = [
        _probe("surface probe", overall["surface"], SURFACE_LIMIT, SURFACE_LIMIT),
        _probe("n-gram probe", overall["ngrams"], NGRAM_WARNING, NGRAM_LIMIT),
        _between("rejected longer", overall["length"]["rejected_longer"], BALANCE, POINTS_BEYOND, "48 to 52 %"),
        _between(
            "mean length gap", overall["length"]["gap"], (-LENGTH_GAP, LENGTH_GAP), LENGTH_GAP_BEYOND, "within 1 %"
        ),
        _polarity(result),
        _duplicates(result["duplicates"]),
    ]
    if result["pictures"] is not None:
        gates.append(_pictures(result["pictures"]))
    if result["model"] is not None:
        gates.append(_image_gap(result["model"]))
    return gates


def _gate(name: str, status: str, value: float | None, interval: Any, limit: str, why: str) -> Gate:
    return {"name": name, "status": status, "value": value, "interval": interval, "limit": limit, "why": why}


def _not_measured(name: str, limit: str, why: str) -> Gate:
    return _gate(name, "not measured", None, None, limit, why)


def _probe(name: str, figures: Mapping[str, Any], warning: float, failing: float) -> Gate:
    limit = f"at most {warning:g} %" if warning == failing else f"at most {warning:g} %, fails above {failing:g} %"
    value, interval = figures["accuracy"], figures["interval"]
    if value is None:
        return _not_measured(name, limit, figures["why"])
    if interval[0] > failing:
        return _gate(name, "fail", value, interval, limit, "the text alone tells chosen from rejected")
    if value > warning:
        sure = interval[0] > warning
        why = f"above {warning:g} %" if sure else f"above {warning:g} %, but the interval reaches below it"
        return _gate(name, "warn", value, interval, limit, why)
    return _passed(name, value, interval, limit, (-math.inf, warning + POINTS_BEYOND))


def _pictures(pictures: Mapping[str, Any]) -> Gate:
    """Judge what rejected pictures give away. It never fails: mDPO itself compares with cut-out pictures."""
    name, limit = "picture probe", f"at most {PICTURE_WARNING:g} %, never fails"
    if pictures["probe"] is None:
        return _not_measured(name, limit, f"no picture can be read; the first: {pictures['first_unreadable']}")
    value, interval = pictures["probe"]["accuracy"], pictures["probe"]["interval"]
    if value is None:
        return _not_measured(name, limit, pictures["probe"]["why"])
    if value > PICTURE_WARNING:
        return _gate(name, "warn", value, interval, limit, "a rejected picture gives itself away, whatever it shows")
    return _passed(name, value, interval, limit, (-math.inf, PICTURE_WARNING + POINTS_BEYOND))


def _passed(name: str, value: float, interval: Any, limit: str, within: tuple[float, float]) -> Gate:
    """Judge a figure inside its limit: it passes unless its interval ends outside ``within``, and tells too little."""
    if interval[0] < within[0] or interval[1] > within[1]:
        why = (
            f"the interval reaches from {interval[0]:.1f} to {interval[1]:.1f}; more pairs, of more images, would tell"
        )
        return _gate(name, TOO_SMALL, value, interval, limit, why)
    return _gate(name, "pass", value, interval, limit, "")


def _between(name: str, figure: Mapping[str, Any], bounds: tuple[float, float], beyond: float, limit: str) -> Gate:
    value, interval = figure["value"], figure["interval"]
    if value is None:
        return _not_measured(name, limit, "nothing to measure it on")
    if interval is None:
        return _not_measured(name, limit, f"too few: {figure['groups']:,} images, needs {MIN_GROUPS}")
    if interval[0] > bounds[1] or interval[1] < bounds[0]:
        side = "above" if interval[0] > bounds[1] else "below"
        return _gate(name, "fail", value, interval, limit, f"{side} {bounds[1 if side == 'above' else 0]:g} %")
    if not bounds[0] <= value <= bounds[1]:
        return _gate(name, "warn", value, interval, limit, "outside, but the interval reaches inside")
    return _passed(name, value, interval, limit, (bounds[0] - beyond, bounds[1] + beyond))


def _polarity(result: Mapping[str, Any]) -> Gate:
    """Judge the set by itself or its worst source. A source that is too small to tell says nothing about the set."""
    name, limit = "yes is chosen", "48 to 52 %, in every source, too"
    parts = {"": result["overall"]["polarity"]}
    parts |= {source: part["polarity"] for source, part in result["sources"].items()}
    gates = {
        source: _between(name, part["yes_chosen"], BALANCE, POINTS_BEYOND, limit) for source, part in parts.items()
    }
    measured = {
        source: gate
        for source, gate in gates.items()
        if gate["value"] is not None and not (source and gate["status"] == TOO_SMALL)
    }
    if not measured:
        return _not_measured(name, limit, "no pair answers yes against no")
    order = ("pass", TOO_SMALL, "warn", "fail")
    worst = max(
        measured, key=lambda source: (order.index(measured[source]["status"]), abs(measured[source]["value"] - 50))
    )
    gate = measured[worst]
    where = f"source '{worst}'" if worst else ""
    return {**gate, "why": "; ".join(part for part in (where, gate["why"]) if part)}


def _duplicates(duplicates: Mapping[str, Any]) -> Gate:
    """Judge duplicates by their count, which needs no interval."""
    name, limit, value = "duplicates", f"none, fails above {DUPLICATES:g} %", duplicates["percent"]
    status = "fail" if value > DUPLICATES else "warn" if value else "pass"
    why = f"{duplicates['extra']:,} pairs repeat images, prompt and rejected text of another" if value else ""
    return _gate(name, status, value, None, limit, why)


def _image_gap(model: Mapping[str, Any]) -> Gate:
    name, limit = "gain by the image", f"at least {IMAGE_GAP:g} points"
    value, interval = model["gap"]["value"], model["gap"]["interval"]
    if value is None:
        return _not_measured(name, limit, model["why"])
    if interval[1] < IMAGE_GAP:
        return _gate(name, "fail", value, interval, limit, "the model prefers the chosen text nearly as often blind")
    if value < IMAGE_GAP:
        return _gate(name, "warn", value, interval, limit, "below, but the interval reaches it")
    return _passed(name, value, interval, limit, (IMAGE_GAP - POINTS_BEYOND, math.inf))
