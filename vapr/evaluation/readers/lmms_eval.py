"""Logs of lmms-eval: what ``--log_samples`` writes, JSON lines since its version 0.3, one JSON object before."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark, Results
from vapr.evaluation.readers.joining import Answer, join
from vapr.evaluation.readers.shape import Row, as_text
from vapr.evaluation.readers.shapes import LOG_IDS, SPLIT_OF_TASK
from vapr.evaluation.scoring.prediction import Question, read_json_lines

TASK = re.compile(r"_samples_(.+)\.jsonl$")
NEEDED = ("doc_id", "filtered_resps")
IMAGE_KEYS = ("image_source", "image_path", "filename", "image_id", "image")
ABOUT_THE_RUN = {
    "doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps", "doc_hash", "prompt_hash",
    "target_hash", "input_media", "token_counts",
}  # fmt: skip
"""Keys of a sample that are not a metric's. What a metric keeps names the question, for the document is not logged."""


def samples_of(file: Path) -> list[tuple[str, Row]] | None:
    """Return place and content of each sample of a log; None if the file is no log.

    Raises:
        UserError: for lmms-eval's results, which hold scores and no answers.
    """
    if file.suffix == ".jsonl":
        lines = read_json_lines(file)
        first = next(lines, None)
        if first is None or not all(key in first[1] for key in NEEDED):
            return None
        return [(f"{file}:{number}", row) for number, row in (first, *lines)]
    if file.suffix != ".json":
        return None
    try:
        whole = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return None
    if isinstance(whole.get("logs"), list):
        return [(f"{file}, sample {number}", row) for number, row in enumerate(whole["logs"], start=1)]
    if "results" in whole and {"configs", "config", "n-samples", "versions"} & whole.keys():
        samples = file.name.replace("_results.json", "_samples_TASK.jsonl")
        raise UserError(
            f"{file}: lmms-eval's scores, without an answer in them; give {samples}, which --log_samples writes"
        )
    return None


def read_answers(
    samples: Sequence[tuple[str, Row]], file: Path, benchmark: Benchmark, questions: Sequence[Question]
) -> Results:
    """Read the answers of a log.

    The model's own words are taken, where a filter of lmms-eval made other ones of them.

    Raises:
        UserError: naming a sample that is cut short, or answers none of the questions.
    """
    task = found[1] if (found := TASK.search(file.name)) else ""
    answers, several = [], 0
    for where, sample in samples:
        if missing := [key for key in NEEDED if not isinstance(sample, dict) or key not in sample]:
            raise UserError(f"{where}: no '{missing[0]}'; a sample of lmms-eval has {', '.join(NEEDED)}")
        if not str(sample["doc_id"]).isdecimal() or not isinstance(sample.get("doc") or {}, dict):
            raise UserError(f"{where}: 'doc_id' is no number or 'doc' no object, as lmms-eval writes them")
        texts = list(_texts(sample.get("resps", sample["filtered_resps"])))
        several += len(texts) > 1
        facts = _facts(sample)
        image = next((as_text(facts[key]) for key in IMAGE_KEYS if isinstance(facts.get(key), str)), None)
        answers.append(
            Answer(
                where=where, text=texts[0] if texts else "", ids=_ids(facts, benchmark.name), question=_asked(sample),
                image=image or None, split=as_text(facts.get("category")) or SPLIT_OF_TASK.get(task),
                truth=sample.get("target"), order=int(sample["doc_id"]),
            )
        )  # fmt: skip
    results = join(answers, questions, file, drops=getattr(benchmark, "relabels", None) or "")
    more = [f"{file.name}: {several:,} samples hold several responses; the first of each is read"] if several else []
    return Results(results.predictions, notes=[*results.notes, *more])


def _texts(responses: Any) -> Iterator[str]:
    """Yield the texts in lists of lists, however deep."""
    if isinstance(responses, str):
        yield responses.strip()
    elif isinstance(responses, list):
        for inner in responses:
            yield from _texts(inner)


def _facts(sample: Row) -> Row:
    """Return what the metrics and the document of a sample tell, by key; the document comes first."""
    facts: Row = {}
    for key, value in sample.items():
        if key not in ABOUT_THE_RUN and isinstance(value, dict):
            facts = value | facts
    return facts | (sample.get("doc") or {})


def _ids(facts: Row, benchmark: str) -> tuple[str, ...]:
    ids = []
    for template in ("{vapr_id}", *LOG_IDS.get(benchmark, ())):
        if callable(template):
            with contextlib.suppress(ValueError, TypeError):  # the log does not tell
                ids.append(template(facts))
            continue
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        if all(as_text(facts.get(name)) for name in names):
            ids.append(template.format(**{name: as_text(facts[name]) for name in names}))
    return tuple(ids)


def _asked(sample: Row) -> str:
    """Return the prompt that the model was given, or else the document's question."""
    arguments = sample.get("arguments") or [""]
    while isinstance(arguments, list) and arguments:
        arguments = arguments[0]
    asked = sample.get("input") or arguments
    return asked if isinstance(asked, str) and asked else as_text((sample.get("doc") or {}).get("question"))
