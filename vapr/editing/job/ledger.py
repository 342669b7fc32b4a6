"""The ledger of an edit job: what it has cost and brought so far, added up from its manifests."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vapr.editing.config import PriceConfig
from vapr.editing.job.folder import RETRIED, Job
from vapr.editing.job.review import count_verdicts
from vapr.editing.job.worker import DROPPED

Manifests = list[dict[str, Any]]
Counts = dict[str, Counter[str]]


@dataclass(slots=True)
class _Sums:
    """What adds up over manifests whatever became of their turns."""

    tokens: Counter[str] = field(default_factory=Counter)
    models: Counts = field(default_factory=lambda: defaultdict(Counter))
    candidates: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)  # of a judge
    polarity: Counts = field(default_factory=lambda: defaultdict(Counter))
    decided_by: Counter[str] = field(default_factory=Counter)  # each turn once

    @classmethod
    def of(cls, manifests: Manifests) -> "_Sums":
        sums = cls()
        for manifest in manifests:
            sums.tokens.update(manifest["tokens"])
            for name, counts in manifest.get("models", {}).items():  # an older version has not told them apart
                sums.models[name].update(counts)
            sums.candidates.update(manifest.get("candidates", {}))
            sums.points.update(manifest.get("judge", {}))
            for source, counts in manifest["polarity"].items():
                sums.polarity[source].update(counts)
            if manifest["round"] == 0:
                sums.decided_by.update(manifest["decided_by"])
        return sums


def ledger(job: Job, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Add up counts, tokens and speed, and estimate the rest.

    Args:
        job: the folder.
        price_per_gpu_hour: in any currency; None: no estimate of the cost.
    """
    editor, manifests, prices = job.editor, job.manifests(), job.config.engine.prices
    first_rounds = [manifest for manifest in manifests if manifest["round"] == 0]
    newest = {manifest["shard"]: manifest for manifest in manifests}  # sorted by round, so the last one stays
    reasons, categories = _count_reasons(manifests, newest), _count_ends("categories", manifests, newest)
    editors = _count_ends("editors", manifests, newest)
    for name in editor.get("editors") or ():
        editors.setdefault(name, Counter())  # one that has had no answer yet
    sums = _Sums.of(manifests)
    accepted = job.accepted
    if dropped := sum(manifest["accepted"] for manifest in manifests) - accepted:
        reasons["rejected"][DROPPED] += dropped
    seconds = sum(manifest["seconds"] for manifest in manifests)
    done = sum(manifest["turns"] for manifest in first_rounds)
    scan = {key: value for key, value in job.scan.items() if key != "first_bad_rows"}
    return {
        "editor": editor,
        "source": {**job.described["source"], **scan, "licence": job.config.source.licence},
        "turns": {"total": job.num_turns, "done": done, "left": job.num_turns - done},
        "accepted": accepted,
        "rejected": dict((reasons["rejected"] + reasons["partner_lost"]).most_common()),
        "failed": dict(reasons["failed"].most_common()),
        "over_target": sum(manifest["over_target"] for manifest in newest.values()),
        "categories": {name: _with_rate(counts) for name, counts in sorted(categories.items())},
        "editors": {name: _with_rate(counts) for name, counts in sorted(editors.items())},
        "candidates": dict(sums.candidates.most_common()) if job.config.ask.candidates > 1 else None,
        "judge": {"model": job.config.ask.judge or editor["name"], **sums.points} if job.config.ask.rubric else None,
        "polarity": {
            source: {said: counts[said] for said in ("rejected_yes", "rejected_no")}
            for source, counts in sorted(sums.polarity.items())
        },
        "decided_by": dict(sums.decided_by),
        "tokens": {kind: sums.tokens[kind] for kind in ("prompt", "cached", "generated")},
        "models": {name: _with_cost(counts, prices.get(name)) for name, counts in sorted(sums.models.items())},
        "seconds": round(seconds, 3),
        "accepted_per_second": round(accepted / seconds, 3) if seconds else None,
        "shards": {
            "total": job.num_shards,
            "done": len(newest),
            "redone": sum(manifest["times_taken"] - 1 for manifest in manifests),
        },
        "rest": _estimate_rest(first_rounds, job.num_turns - done, done, price_per_gpu_hour),
        "review": count_verdicts(job),
        "picture_changes": list(job.config.picture.change) if job.config.picture is not None else None,
        "verifier": job.config.checks.verifier,
        "blind_check": editor["name"] if job.config.checks.blind else None,
    }


def _counts_here(status: str, manifest: Mapping[str, Any], newest: Mapping[int, Mapping[str, Any]]) -> bool:
    """Return whether turns that ended so count in this manifest: what a later round went through counts there."""
    return status not in RETRIED or newest[manifest["shard"]] is manifest


def _count_reasons(manifests: Manifests, newest: Mapping[int, Mapping[str, Any]]) -> Counts:
    reasons: Counts = defaultdict(Counter)
    for manifest in manifests:
        for status, counts in manifest["reasons"].items():
            if _counts_here(status, manifest, newest):
                reasons[status].update(counts)
    return reasons


def _count_ends(of: str, manifests: Manifests, newest: Mapping[int, Mapping[str, Any]]) -> Counts:
    """Count how turns have ended, by ``categories`` or ``editors``."""
    ends: Counts = defaultdict(Counter)
    for manifest in manifests:
        for name, counts in manifest.get(of, {}).items():
            for status, count in counts.items():
                counts_once = manifest["round"] == 0 if status == "turns" else _counts_here(status, manifest, newest)
                if counts_once:
                    ends[name][status] += count
    return ends


def _with_rate(counts: Counter[str]) -> dict[str, Any]:
    shown = {
        "turns": counts["turns"],
        "accepted": counts["accepted"],
        "rejected": counts["rejected"] + counts["partner_lost"],
        "failed": counts["failed"],
    }
    return {**shown, "accept_rate": round(counts["accepted"] / counts["turns"], 4) if counts["turns"] else None}


def _with_cost(counts: Counter[str], price: PriceConfig | None) -> dict[str, Any]:
    """Return what a model was asked and how many tokens that took, with the cost if the user has said its price."""
    shown = {kind: counts[kind] for kind in ("asked", "found", "prompt", "cached", "generated")}
    if price is None:
        return {**shown, "cost": None}
    cached = price.prompt if price.cached is None else price.cached
    cost = (counts["prompt"] - counts["cached"]) * price.prompt + counts["cached"] * cached
    return {**shown, "cost": round((cost + counts["generated"] * price.generated) / 1e6, 4)}


def _estimate_rest(first_rounds: Manifests, left: int, done: int, price: float | None) -> dict[str, Any]:
    """Estimate time and money for the turns left, at the speed so far. Workers share the time, not the GPU-hours."""
    seconds = gpu_hours = cost = None
    if done:
        seconds = round(sum(m["seconds"] for m in first_rounds) / done * left, 1)
        hours = sum(m["seconds"] * m["num_gpus"] for m in first_rounds) / 3600 / done * left
        gpu_hours, cost = round(hours, 3), round(hours * price, 2) if price is not None else None
    return {"seconds": seconds, "gpu_hours": gpu_hours, "cost": cost, "price_per_gpu_hour": price}
