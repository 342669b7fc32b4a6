"""AMBER, generative: descriptions of 1,004 pictures, judged by the objects that they name.

The official script takes the nouns that NLTK's tagger finds, reduces them with WordNet, and forgives a word that
spaCy's vectors find similar to a true one. Here nouns are the words of the benchmark's own vocabulary, in singular and
plural (inflect): no model decides, and the same text gets the same score everywhere. What differs: a word that is
mostly no noun in descriptions (:data:`MOSTLY_NO_NOUN`) counts only behind a word that makes it one; capital letters do
not matter; and similarity of vectors forgives nothing, so CHAIR and Hal can come out higher than officially, and Cover
and Cog lower.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vapr.errors import UserError
from vapr.evaluation.benchmarks.amber import PLACES, annotated, folder_of, read_results, relations
from vapr.evaluation.benchmarks.benchmark import Benchmark, Reading, Row
from vapr.evaluation.benchmarks.rows import picture
from vapr.evaluation.scoring.answers import Policy, after_reasoning
from vapr.evaluation.scoring.figures import Figure, numbered, of_counts
from vapr.evaluation.scoring.prediction import Prediction, Question, check_ids

MOSTLY_NO_NOUN = frozenset({
    "bear", "board", "brush", "can", "cream", "drain", "drink", "file", "fish", "hot", "leave", "light", "line", "lock",
    "note", "orange", "pack", "range", "ring", "rock", "sink", "skate", "ski", "sound", "spray", "star", "support",
    "switch", "tap", "tie", "warp", "watch",
})  # fmt: skip
_BEFORE_NOUN = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "his", "her", "its", "their", "one", "two", "three", "four",
    "each", "every", "another", "some", "several", "many", "no", "of",
})  # fmt: skip
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


def read(path: Path) -> list[Question]:
    """Read ``query/query_generative.json``, ``annotations.json``, ``relation.json`` and ``safe_words.txt``.

    An answer's truth is the objects that are there, and those that models make up, each with the words that go for it.
    """
    folder = folder_of(path)
    table = relations(path)
    safe = folder / "safe_words.txt"
    if not safe.is_file():
        raise UserError(f"{safe}: no such file; give the folder data/ of junyangwang0410/AMBER, all of it")
    words = {"vocabulary": " ".join(sorted({word for key, some in table.items() for word in (key, *some)}))}
    words["safe"] = " ".join(safe.read_text(encoding="utf-8").split())
    questions = []
    for where, query, note in annotated(path, "query_generative.json", generative=True):
        answer = {}
        for key in ("truth", "hallu"):
            objects = note.get(key)
            if not isinstance(objects, list) or any(one not in table for one in objects):
                raise UserError(f"{where}: '{key}' of annotation {note['id']} is no list of objects of relation.json")
            answer[key] = [[one, *table[one]] for one in objects]
        questions.append(
            Question(
                benchmark="amber-g", id=str(query["id"]), question=query["query"], answer=answer,
                meta={"image": query["image"], **words}, images=(picture(folder, query["image"], PLACES),),
            )
        )  # fmt: skip
    check_ids(questions, path)
    return questions


@lru_cache(maxsize=4)
def _forms(vocabulary: str) -> dict[str, str]:
    """Return the word of the vocabulary for each of its forms."""
    import inflect  # half a second, of no use to other benchmarks

    engine = inflect.engine()
    words = vocabulary.split()
    plurals = {
        str(engine.plural_noun(word)).lower(): word for word in words if word != "leave"
    }  # "leaves" are of "leaf"
    return plurals | {word.lower(): word for word in words}


def nouns(text: str, vocabulary: str) -> list[str]:
    """Return the words of a vocabulary that a text names, as often as it does, in the singular."""
    forms, found, before = _forms(vocabulary), [], ""
    for token in _WORD.findall(text.lower()):
        word = forms.get(token)
        if word is not None and (word not in MOSTLY_NO_NOUN or before in _BEFORE_NOUN):
            found.append(word)
        before = token
    return found


def count(named: Sequence[str], truth: Sequence[Sequence[str]], hallu: Sequence[Sequence[str]], safe: str) -> list[int]:
    """Return what an answer's nouns hold against the truth.

    Args:
        named: the nouns.
        truth: the objects that are there, each with the words that go for it.
        hallu: those that models make up, alike.
        safe: words that are never a mistake.

    Returns:
        Wrong nouns, nouns, objects covered, objects, made-up objects named, made-up objects. As officially, a noun
        covers one object: the first of which it is another word, else the one that it names.
    """
    wrong, forgiven, covered, made_up = 0, set(safe.split()), set(), set()
    for noun in named:
        if noun in forgiven:
            continue
        if (at := _first(noun, truth)) is not None:
            covered.add(at)
            continue
        wrong += 1
        if (at := _first(noun, hallu)) is not None:
            made_up.add(at)
    return [wrong, len(named), len(covered), len(truth), len(made_up), len(hallu)]


def _first(noun: str, objects: Sequence[Sequence[str]]) -> int | None:
    others = (number for number, words in enumerate(objects) if noun in words[1:])
    itself = (number for number, words in enumerate(objects) if noun == words[0])
    return next(others, next(itself, None))


def gold(prediction: Prediction) -> str | None:
    """Return "faithful" where the objects are known."""
    answer = prediction.answer
    lists = isinstance(answer, dict) and all(isinstance(answer.get(key), list) for key in ("truth", "hallu"))
    known = lists and "vocabulary" in prediction.meta
    return "faithful" if known else None


def read_answer(prediction: Prediction, policy: Policy) -> Reading:
    """Read how many of the objects that an answer names are wrong, covered and made up, in words.

    An answer that names none of the vocabulary cannot be judged; the official rule takes it for a faithful one.
    """
    text = after_reasoning(prediction.prediction) if policy == "last-answer" else prediction.prediction
    answer: dict[str, Any] = prediction.answer
    named = nouns(text, str(prediction.meta["vocabulary"]))
    c = count(named, answer["truth"], answer["hallu"], str(prediction.meta.get("safe", "")))
    if not named and policy != "official":
        return Reading(None)
    said = f"{c[0]} of {c[1]} wrong, {c[2]} of {c[3]} covered, {c[4]} of {c[5]} made up"
    return Reading(said, guessed=not named)


def _counts(row: Row) -> list[int]:
    """Return the counts of :func:`count` of an answer that was read."""
    if row.reading.value is None:
        answer: dict[str, Any] = row.prediction.answer
        return count([], answer["truth"], answer["hallu"], "")
    return [int(number) for number in re.findall(r"\d+", row.reading.value)]


def right(prediction: Prediction, gold: str | None, reading: Reading) -> float:
    """Return whether the answer names objects, and none that is wrong."""
    return float(reading.value is not None and reading.value.startswith("0 of"))


def figures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Return CHAIR, Cover, Hal and Cog in percent, as papers do."""
    counts = np.array([_counts(row) for row in rows])  # (P, 6)
    counts = np.column_stack([counts, counts[:, 0] > 0, np.ones(len(rows))])

    def percent(of: int, over: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda c: 100 * c[:, of] / c[:, over]

    statistics = {"chair": percent(0, 1), "cover": percent(2, 3), "hal": percent(6, 7), "cog": percent(4, 5)}
    return of_counts(counts, numbered([row.prediction.image for row in rows]), statistics)


AMBER_G = Benchmark(
    name="amber-g",
    title="AMBER (generative)",
    source="junyangwang0410/AMBER 534babf, inference.py, Apache-2.0",
    read=read,
    gold=gold,
    read_answer=read_answer,
    right=right,
    figures=figures,
    headline="chair",
    read_results=read_results,
    note="Nouns are words of the benchmark's vocabulary in singular and plural; the official script finds them with "
    "NLTK and forgives similar words with spaCy. CHAIR and Hal can be higher here, Cover and Cog lower. An answer that "
    "names no object is unparsed; it counts for the official Hal as one without hallucination.",
)
