"""Finished demos as rows of bench/results/demo.jsonl, and as the tables of docs/demo.md.

for seed in 0 1 2 3 4; do vapr demo --out demo-$seed --seed $seed; done
python -m bench.demo demo-0 demo-1 demo-2 demo-3 demo-4
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from scipy.stats import t

from bench.record import record

COMPARED = ("sft -> dpo", "length-biased -> dpo", "more-sft -> dpo", "dpo-quarter -> dpo")


def row_of(result: dict[str, Any], beside: str) -> dict[str, Any]:
    """Return what a row says about a demo: accuracies, share of "Yes", differences in points, seconds."""
    return {
        "seed": result["seed"],
        "questions": len(result["answers"]),
        "policies": {
            name: {
                "accuracy": {c: round(100 * f["value"], 2) for c, f in one["accuracy"].items()},
                "yes": round(100 * one["yes"]["yes_rate"]["value"], 2),
                "truth": round(100 * one["yes"]["gold_yes_rate"]["value"], 2),
                "garbled": one["garbled"]["answers"],
            }
            for name, one in result["policies"].items()
        },
        "points": {
            name: [round(100 * v, 2) for v in (d["value"], *d["interval"])]
            for name in COMPARED
            for d in (result["compared"][name]["overall"]["difference"],)
        },
        "pairs": result["editing"]["accepted"],
        "seconds": round(result["seconds"]["total"]),
        "beside": beside,
    }


def mean_text(values: list[float], low: float = 0.0, high: float = 100.0) -> str:
    """Write the mean of seeds with its 95 % interval (Student's t), cut off where no value can lie."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    reach = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} [{max(mean - reach, low):.1f}, {min(mean + reach, high):.1f}]"


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the tables of docs/demo.md: a row for each policy over seeds, and the differences by seed."""
    first = rows[0]["policies"]
    heads = [*first["sft"]["accuracy"], "says Yes", "off the truth", "garbled"]
    lines = [f"| | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 1)}"]
    for name in first:
        ones = [row["policies"][name] for row in rows]
        cells = [mean_text([one["accuracy"][category] for one in ones]) for category in first["sft"]["accuracy"]]
        cells += [mean_text([one["yes"] for one in ones]), mean_text([abs(one["yes"] - one["truth"]) for one in ones])]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(one['garbled'] for one in ones)} |")
    lines += ["", f"| seed | {' | '.join(COMPARED)} |", f"|{' --- |' * (len(COMPARED) + 1)}"]
    for row in rows:
        points = (f"{value:+.1f} [{low:.1f}, {high:.1f}]" for value, low, high in row["points"].values())
        lines.append(f"| {row['seed']} | {' | '.join(points)} |")
    means = (mean_text([row["points"][name][0] for row in rows], low=-100) for name in COMPARED)
    return "\n".join([*lines, f"| mean | {' | '.join(means)} |"])


def main() -> None:
    """Record the demos whose folders are given; BESIDE=... says what else ran on the machine."""
    import os

    results = [json.loads((Path(folder) / "result.json").read_text(encoding="utf-8")) for folder in sys.argv[1:]]
    rows = [row_of(result, os.environ.get("BESIDE", "")) for result in results]
    for row in rows:
        record("demo", **row)
    print(tables(rows))


if __name__ == "__main__":
    main()
