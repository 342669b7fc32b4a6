"""How well a text-only probe tells chosen from rejected, when rules edit skewed data by trades or by any other value.

    python -m bench.shortcuts

Values of real data are skewed: bananas are yellow, and two is the commonest number. Whoever replaces a value by any
other one makes the common value chosen and the rare one rejected, and a classifier that never sees an image learns
that. How to read the rows: bench/README.md.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bench.editing_rows import PLACES, plural, write_images, write_rows
from bench.record import record
from vapr.audit.text_probes import in_two_pairs, ngram_differences, probe
from vapr.editing.config import EditConfig
from vapr.editing.job.run import run
from vapr.editing.job.start import Start

PLAUSIBLE = {
    "banana": ("yellow", "green", "brown"), "apple": ("red", "green", "yellow"),
    "bus": ("red", "white", "blue", "yellow"),
    "car": ("white", "black", "red", "blue", "green"), "truck": ("white", "red", "black", "blue"),
    "bicycle": ("black", "red", "blue", "green"), "dog": ("brown", "black", "white"), "cat": ("black", "white", "grey"),
    "horse": ("brown", "black", "white"), "bird": ("black", "blue", "white", "yellow"),
    "jacket": ("black", "blue", "red", "green", "yellow"), "hat": ("black", "white", "red", "blue"),
    "umbrella": ("black", "red", "blue", "yellow", "green"), "flower": ("white", "red", "yellow", "purple"),
    "chair": ("brown", "white", "black", "red"), "table": ("brown", "white", "black"),
}  # fmt: skip
"""Colours of things, the commonest first."""
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = ("colour", "colour beside its noun", "number")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3_000)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="nothing is recorded")
    options = parser.parse_args()
    head = ["| values | what is edited | pairs | n-gram probe, % right | 95 % interval |", "|" + " --- |" * 5]
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder, options.images)
        source = write_rows(folder / "rows.jsonl", skewed_rows(options.rows, images, random.Random(options.seed)))
        for balance in ("uniform", "swap"):
            pairs = edited(source, folder / balance, balance, options.seed)
            for what in KINDS:
                of_kind = [pair for pair in pairs if pair["provenance"]["source_id"].startswith(f"{what}-")]
                fields = {"balance": balance, "edited": what, "rows": options.rows, "images": options.images}
                fields |= probed(of_kind, options.seed)
                print(json.dumps(fields if options.quick else record("shortcuts", **fields)))
                low, high = fields["interval"]
                share = f"{fields['accuracy']:.1f} | {low:.1f} to {high:.1f}"
                lines.append(f"| {balance} | {what} | {fields['pairs']:,} | {share} |")
    print("\n".join([*head, *lines]))


def skewed_rows(num_rows: int, images: list[str], draws: random.Random) -> Iterator[dict[str, Any]]:
    """A third of each kind; no thing comes twice in an image."""
    shown = [(image, noun) for image in images for noun in PLAUSIBLE]
    for number, (image, noun) in enumerate(draws.sample(shown, num_rows)):
        what = KINDS[number % len(KINDS)]
        place = draws.choice(PLACES)
        colour, many = zipf(PLAUSIBLE[noun], draws), zipf(NUMBERS, draws)
        texts = {
            "colour": (f"What color is the {noun}?", f"The {noun} {place} is {colour}."),
            "colour beside its noun": (f"What color is the {noun}?", f"It is a {colour} {noun} {place}."),
            "number": (f"How many {plural(noun)} are there?", f"There are {many} {plural(noun)} {place}."),
        }[what]
        turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), texts, strict=True)]
        yield {"id": f"{what}-{number}", "image": image, "conversations": turns}


def zipf(values: tuple[str, ...], draws: random.Random) -> str:
    """The n-th value with probability proportional to 1 / n."""
    return draws.choices(values, [1 / n for n in range(1, len(values) + 1)])[0]


def edited(source: Path, out: Path, balance: str, seed: int) -> list[dict[str, Any]]:
    """The pairs that ``vapr edit --editor rules`` makes."""
    config = EditConfig.load(None, (f"plan.balance={balance}", f"seed={seed}"))
    run(Start(source=str(source), folder=out, config=config), print)
    return [pair for part in sorted((out / "pairs").glob("*.parquet")) for pair in pq.read_table(part).to_pylist()]


def probed(pairs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The audit's n-gram probe: accuracy in percent with its interval, folds and interval by image."""
    texts = [[pair[side][0]["content"][0]["text"] for pair in pairs] for side in ("chosen", "rejected")]
    _, groups = np.unique([pair["images"][0]["path"] for pair in pairs], return_inverse=True)
    differences, names = in_two_pairs(*ngram_differences(*texts))
    found = probe(differences, groups, names, seed=seed, scaled=False, thorough=False)
    return {key: found[key] for key in ("pairs", "usable", "groups", "accuracy", "interval")}


if __name__ == "__main__":
    main()
