"""What an edit job has cost and brought so far, added up from its manifests."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vapr.editing.job.folder import RETRIED, Job
from vapr.editing.job.review import review
from vapr.editing.job.worker import DROPPED


def ledger(job: Job, editor: Mapping[str, Any], price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """Counts, tokens, speed, and an estimate for the rest.

    Args:
        job: the folder.
        editor: name, revision, engine, prompt_hash, seed, temperature.
        price_per_gpu_hour: in any currency; None: no estimate of the cost.
    """
    manifests = job.manifests()
    newest = {manifest["shard"]: manifest for manifest in manifests}  # sorted by round, so the last one stays
    reasons, categories = _by_reason(manifests, newest), _by_category(manifests, newest)
    polarity: dict[str, Counter[str]] = defaultdict(Counter)
    tokens: Counter[str] = Counter()
    for manifest in manifests:
        tokens.update(manifest["tokens"])
        for source, counts in manifest["polarity"].items():
            polarity[source].update(counts)
    accepted = job.accepted
    if dropped := sum(manifest["accepted"] for manifest in manifests) - accepted:
        reasons["rejected"][DROPPED] += dropped
    seconds = sum(manifest["seconds"] for manifest in manifests)
    done = sum(manifest["turns"] for manifest in manifests if manifest["round"] == 0)
    scan = {key: value for key, value in job.scan.items() if key != "first_bad_rows"}
    return {
        "editor": dict(editor),
        "source": {**job.described["source"], **scan, "licence": job.config.source.licence},
        "turns": {"total": job.num_turns, "done": done, "left": job.num_turns - done},
        "accepted": accepted,
        "rejected": dict((reasons["rejected"] + reasons["partner_lost"]).most_common()),
        "failed": dict(reasons["failed"].most_common()),
        "over_target": sum(manifest["over_target"] for manifest in newest.values()),
        "categories": {name: _with_rate(counts) for name, counts in sorted(categories.items())},
        "polarity": {
            source: {f"rejected_{said}": counts[f"rejected_{said}"] for said in ("yes", "no")}
            for source, counts in sorted(polarity.items())
        },
        "decided_by": dict(sum((Counter(m["decided_by"]) for m in manifests if m["round"] == 0), Counter[str]())),
        "tokens": {kind: tokens[kind] for kind in ("prompt", "cached", "generated")},
        "seconds": round(seconds, 3),
        "accepted_per_second": round(accepted / seconds, 3) if seconds else None,
        "shards": {
            "total": job.num_shards,
            "done": len(newest),
            "redone": sum(manifest["times_taken"] - 1 for manifest in manifests),
        },
        "rest": _rest(manifests, job.num_turns - done, done, price_per_gpu_hour),
        "review": review(job),
        "verifier": job.config.checks.verifier,
        "blind_check": editor["name"] if job.config.checks.blind else None,
    }


Manifests = Sequence[Mapping[str, Any]]
Newest = Mapping[int, Mapping[str, Any]]
"""The last manifest of each shard. What a later round has taken up again is counted in the later one."""


def _by_reason(manifests: Manifests, newest: Newest) -> dict[str, Counter[str]]:
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for manifest in manifests:
        for status, counts in manifest["reasons"].items():
            if newest[manifest["shard"]] is manifest or status not in RETRIED:
                reasons[status].update(counts)
    return reasons


def _by_category(manifests: Manifests, newest: Newest) -> dict[str, Counter[str]]:
    categories: dict[str, Counter[str]] = defaultdict(Counter)
    for manifest in manifests:
        for name, counts in manifest["categories"].items():
            for status, count in counts.items():
                if status == "turns" and manifest["round"] > 0:
                    continue
                if newest[manifest["shard"]] is manifest or status not in RETRIED:
                    categories[name][status] += count
    return categories


def _with_rate(counts: Counter[str]) -> dict[str, Any]:
    shown = {
        "turns": counts["turns"],
        "accepted": counts["accepted"],
        "rejected": counts["rejected"] + counts["partner_lost"],
        "failed": counts["failed"],
    }
    return {**shown, "accept_rate": round(counts["accepted"] / counts["turns"], 4) if counts["turns"] else None}


def _rest(manifests: Manifests, left: int, done: int, price: float | None) -> dict[str, Any]:
    """Time and money for the turns that are left, at the speed so far. Workers share the time, not the GPU-hours."""
    if not done:
        return {"seconds": None, "gpu_hours": None, "cost": None, "price_per_gpu_hour": price}
    first_rounds = [manifest for manifest in manifests if manifest["round"] == 0]
    seconds = sum(m["seconds"] for m in first_rounds) / done * left
    gpu_hours = sum(m["seconds"] * m["num_gpus"] for m in first_rounds) / 3600 / done * left
    return {
        "seconds": round(seconds, 1),
        "gpu_hours": round(gpu_hours, 3),
        "cost": round(gpu_hours * price, 2) if price is not None else None,
        "price_per_gpu_hour": price,
    }
