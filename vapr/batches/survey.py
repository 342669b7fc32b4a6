"""What a run's data is: rows, images, tokens by kind, what sharing saves, what is skipped and why."""

import dataclasses
import hashlib
import heapq
from collections import Counter
from typing import Any, Literal

import numpy as np

from vapr.batches.loader import PairLoader, open_loaders, warning_of_rows_in_both
from vapr.batches.packing import count_tokens
from vapr.batches.tokenize import TokenizedPair
from vapr.config import Config
from vapr.data.pairs import Pairs
from vapr.data.rendered import rendered_warning
from vapr.data.sources import open_sets
from vapr.errors import DroppedInReview, NoPair, UserError, reason_kind
from vapr.progress import Display

LONGEST = 5


def survey(config: Config, name: Literal["train", "eval"] = "train", limit: int | None = None) -> dict[str, Any]:
    """Read every row of ``data.train`` or ``data.eval`` once, as training would, and count. No weights are loaded.

    Bad rows and pairs that are too long are counted whatever the config does with them. With ``limit`` only about so
    many rows are read, chosen at random; ``rows_read`` says how many.

    Returns:
        Plain data: ``sets``, ``notes``, ``unused_columns`` (of the rows checked at the start), ``rows``, ``pairs``,
        ``images``, ``left_out`` (pairs that a loss does not apply to, by loss and reason), ``tokens``, ``sharing``,
        ``longest``, ``skipped``.

    Raises:
        UserError: if the data or the model's processor cannot be opened.
    """
    on_bad_row = config.data.on_bad_row
    data = dataclasses.replace(config.data, on_bad_row="skip", too_long="skip")
    config = dataclasses.replace(config, data=data)
    with open_loaders(config, [name], say=lambda line: None) as loaders:
        loader = loaders[name].once(by_image=limit is None)
        stop = loader.steps_per_epoch
        if limit is not None:
            stop = min(stop, -(-limit // loader.pairs_per_step))
        counts = _Counts()
        notes = loader.processor.notes if name == "train" else []  # said once
        with Display(f"read {name}", stop) as display:
            for step in loader.steps(0, stop):
                for pair in step.pairs:
                    counts.add(pair)
                counts.packs += [batch.num_tokens for batch in step.batches]
                display.advance(f"{counts.pairs:,} pairs, {len(loader.skipped):,} skipped")
    counted = counts.result(config, loader)
    result = {
        "sets": _sets(loader),
        "notes": [*getattr(loader.pairs, "notes", []), *notes, *counts.warnings(counted["rows_read"])],
        "unused_columns": dict(sorted(getattr(loader.pairs, "unused", {}).items())),
        **counted,
        "skipped": _reasons(loader),
    }
    return {**result, "refused": _refused(loader, on_bad_row)}


def rows_in_both(config: Config) -> str | None:
    """A warning of pairs that are held out and trained on; None if there are none or nothing is held out."""
    train, held_out = (
        Pairs([part for source in config.data.sources(name) for part in open_sets(source)])
        for name in ("train", "eval")
    )
    return warning_of_rows_in_both(train, held_out)


class _Counts:
    """Sums over pairs."""

    def __init__(self) -> None:
        self.pairs = 0
        self.packs: list[int] = []
        self._images: set[bytes] = set()
        self._seen = 0.0  # sum over images of the share of its area that the model sees
        self._ids: set[bytes] = set()
        self._tokens: Counter[str] = Counter()
        self._lengths: list[tuple[int, str, str]] = []
        self._with_images = 0
        self._rendered = 0
        self._first_rendered: tuple[int, str, str] | None = None  # its row, where, and by what it shows
        self._several_images = 0
        self._left_out: Counter[str] = Counter()

    def add(self, pair: TokenizedPair) -> None:
        chosen, rejected = pair.paths[:2]
        self.pairs += 1
        self._ids.add(hashlib.blake2b(pair.id.encode(), digest_size=8).digest())
        self._with_images += bool(chosen.images)
        self._several_images += len(chosen.images) > 1
        self._left_out.update(pair.left_out)
        for image in (image for path in pair.paths[:2] for image in path.images):
            if (content := bytes.fromhex(image.content_hash)[:8]) not in self._images:
                self._images.add(content)
                self._seen += image.seen
        if pair.rendered is not None:
            self._rendered += 1
            found = (pair.number, pair.where, pair.rendered)
            self._first_rendered = min(found, self._first_rendered or found)
        sides = [chosen]
        if [i.content_hash for i in rejected.images] != [i.content_hash for i in chosen.images]:
            sides.append(rejected)  # another prompt: nothing after its image is shared
        in_images = sum(image.num_tokens for side in sides for image in side.images)
        answers = [path.input_ids[path.completion_start :] for path in (chosen, rejected)]
        shorter = min(len(answer) for answer in answers)
        differs = np.flatnonzero(answers[0][:shorter] != answers[1][:shorter])
        common = int(differs[0]) if len(differs) else shorter
        if len(sides) > 1:
            common = 0
        self._tokens.update(
            {
                "image": in_images,
                "prompt text": sum(side.completion_start for side in sides) - in_images,
                "answers' common beginning": common,
                "chosen, rest": len(answers[0]) - common,
                "rejected, rest": len(answers[1]) - common,
                **({"other views": _tokens_of_other_views(pair)} if pair.roles else {}),
                "unshared": sum(len(path.input_ids) for path in pair.paths),
            }
        )
        longest = max(len(path.input_ids) for path in pair.paths)
        entry = (longest, pair.where, pair.id)
        push = heapq.heappush if len(self._lengths) < LONGEST else heapq.heappushpop
        push(self._lengths, entry)

    def warnings(self, rows: int) -> list[str]:
        """Lines on what is strange in ``rows`` rows but not wrong."""
        if self._first_rendered is None:
            return []
        _, where, marker = self._first_rendered
        return [rendered_warning(where, marker, self._rendered, rows)]

    def result(self, config: Config, loader: PairLoader) -> dict[str, Any]:
        packed, unshared = sum(self.packs), self._tokens.pop("unshared", 0)
        return {
            "rows": len(loader.pairs),
            "rows_read": self.pairs + len(loader.skipped),
            "pairs": self.pairs,
            "pairs_with_repeated_ids": self.pairs - len(self._ids),
            "pairs_with_images": self._with_images,
            "pairs_with_several_images": self._several_images,
            "images": len(self._images),
            "left_out": dict(self._left_out),
            "cropped_away": 1 - self._seen / len(self._images) if self._images else 0.0,
            "tokens": dict(self._tokens),
            "sharing": {
                "share": config.packing.share,
                "tokens_unshared": unshared,
                "tokens_packed": packed,
                "saved": 1 - packed / unshared if unshared else 0.0,
                "packs": len(self.packs),
                "mean_fill": packed / (len(self.packs) * config.packing.max_tokens) if self.packs else 0.0,
            },
            "longest": [
                {"tokens": tokens, "where": where, "id": id}
                for tokens, where, id in sorted(self._lengths, reverse=True)
            ],
        }


def _tokens_of_other_views(pair: TokenizedPair) -> int:
    """Count the tokens that paths beside chosen and rejected add, without those they share with these."""
    plain = dataclasses.replace(pair, paths=pair.paths[:2], roles=())
    return count_tokens([pair], "pair") - count_tokens([plain], "pair")


def _sets(loader: PairLoader) -> list[str]:
    return getattr(loader.pairs, "formats", [])


def _refused(loader: PairLoader, on_bad_row: str) -> str | None:
    """Say what the check before training has against the first rows."""
    try:
        Pairs(getattr(loader.pairs, "sets", ()), on_bad_row).check()
    except UserError as error:
        return str(error)
    return None


def _reasons(loader: PairLoader) -> dict[str, Any]:
    """Count the rows that each reason costs, with the first few places."""
    grouped: dict[str, list[str]] = {}
    for place, line in loader.skipped.items():
        grouped.setdefault(reason_kind(line.removeprefix(f"{place}: ")), []).append(line)
    return {
        "rows": len(loader.skipped),
        "reasons": [
            {"reason": reason, "rows": len(lines), "first": lines[:3]}
            for reason, lines in sorted(grouped.items(), key=lambda item: -len(item[1]))
        ],
    }


def stops_training(config: Config, result: dict[str, Any]) -> str | None:
    """A row that ``vapr train`` would stop at, and how many more there are; None if there is none."""
    if result["refused"]:
        return str(result["refused"])
    for entry in result["skipped"]["reasons"]:
        too_long = "packing.max_tokens" in entry["reason"]
        key, setting = (
            ("data.too_long", config.data.too_long) if too_long else ("data.on_bad_row", config.data.on_bad_row)
        )
        if setting == "error" and not entry["reason"].startswith((NoPair.MARK, DroppedInReview.MARK)):
            return f"{entry['first'][0]} ({entry['rows']:,} rows for this reason; {key}: skip leaves them out)"
    return None


def show(result: dict[str, Any]) -> str:
    """The survey as text."""
    sharing, skipped = result["sharing"], result["skipped"]
    total = sum(result["tokens"].values()) or 1
    images = f"{result['pairs_with_images']:,} with images, {result['pairs_with_several_images']:,} with several"
    cropped = f"{result['cropped_away']:.1%} of their area is cropped away before the model sees it"
    read, repeated = result["rows_read"], result["pairs_with_repeated_ids"]
    rows: list[tuple[str, str, str]] = [
        ("rows", f"{result['rows']:,}", "" if read == result["rows"] else f"{read:,} of them read"),
        (
            "usable pairs",
            f"{result['pairs']:,}",
            images,
        ),
        ("repeated ids", f"{repeated:,}", "ids should be unique" if repeated else ""),
        ("distinct images", f"{result['images']:,}", cropped if result["cropped_away"] else ""),
        *(
            (f"no {reason.split(': ')[0]} loss for", f"{pairs:,}", reason.split(": ", 1)[1])
            for reason, pairs in result["left_out"].items()
        ),
        *((f"tokens: {kind}", f"{tokens:,}", f"{tokens / total:.1%}") for kind, tokens in result["tokens"].items()),
        ("tokens one by one", f"{sharing['tokens_unshared']:,}", "every path computed alone"),
        ("tokens packed", f"{sharing['tokens_packed']:,}", f"share: {sharing['share']} saves {sharing['saved']:.1%}"),
        ("packs", f"{sharing['packs']:,}", f"{sharing['mean_fill']:.0%} full on average"),
        ("skipped rows", f"{skipped['rows']:,}", ""),
    ]
    figures = (f"{name:<33}{value:>15}  {note}".rstrip() for name, value, note in rows)
    lines = [*result["sets"], *result["notes"], *figures, "longest"]
    lines += [f"{entry['tokens']:>15,} tokens  {entry['where']}  {entry['id']}" for entry in result["longest"]]
    for entry in skipped["reasons"]:
        lines += [
            f"{entry['rows']:>15,} x skipped: {entry['reason']}",
            *(f"{'':>17} {line}" for line in entry["first"]),
        ]
    return "\n".join(lines)
