"""One model's result folder: answers to benchmarks, with and without pictures, then scores."""

import dataclasses
import gc
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from vapr.batches.tokenize import Processor
from vapr.cache import write_json
from vapr.errors import UserError
from vapr.evaluation.generation.answer import answer_batches
from vapr.evaluation.generation.journal import FolderLock, Journal
from vapr.evaluation.generation.open_model import Answerer, Dtype
from vapr.evaluation.generation.prompts import Asked, in_batches, tokenize_questions
from vapr.evaluation.generation.record import NAME, AskedSet, describe, open_record
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.judges.reviews import Judging, reviews_of
from vapr.evaluation.score import score, score_rows
from vapr.evaluation.scoring.answers import Policy
from vapr.evaluation.scoring.paired import difference, sign_flip
from vapr.evaluation.scoring.prediction import Prediction
from vapr.evaluation.scoring.review import Review
from vapr.interrupts import stopped_at_once
from vapr.progress import Display

EngineName = Literal["auto", "transformers", "vllm"]
Sizes = dict[Path | bytes, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How questions are asked, and how answers are read."""

    settings: Settings = field(default_factory=Settings)
    engine: EngineName = "transformers"
    dtype: Dtype = "auto"
    policy: Policy = "strict"
    blind: bool = False


def options_of(
    *, max_new_tokens: int = 512, temperature: float = 0.0, batch_size: int | None = None, seed: int = 0, **others: Any
) -> Options:
    """Return options by the names they have on the command line; ``others`` are Options' own."""
    settings = Settings(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size, seed=seed)
    return Options(settings=settings, **others)


class Engine(Protocol):
    """What answers batches of questions. ``notes`` are lines on how it does."""

    notes: list[str]

    def answer(self, batches: Sequence[Sequence[Asked]]) -> Iterator[list[Prediction]]:
        """Yield the answers to each batch."""

    def close(self) -> None:
        """Give its memory back."""


class TransformersEngine:
    """An untouched Hugging Face model, on a GPU if there is one."""

    def __init__(self, answerer: Answerer, processor: Processor, settings: Settings, dtype: torch.dtype) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.notes: list[str] = []
        try:
            self._model: Any = answerer.load(dtype).to(device).eval()  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            raise UserError(f"{answerer.given} does not fit the GPU; CUDA_VISIBLE_DEVICES= takes the CPU") from None
        self._processor, self._settings = processor, settings

    def answer(self, batches: Sequence[Sequence[Asked]]) -> Iterator[list[Prediction]]:
        """Yield the answers to each batch."""
        return answer_batches(self._model, self._processor, batches, self._settings)

    def close(self) -> None:
        """Give the model's memory back."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def choose_engine(wanted: EngineName, *, whole: bool = True) -> Literal["transformers", "vllm"]:
    """Return the engine to use; ``auto`` is vLLM where it is installed, there is a GPU, and the model is whole."""
    if wanted != "auto":
        return wanted
    return "vllm" if whole and torch.cuda.is_available() and importlib.util.find_spec("vllm") else "transformers"


class Evaluation:
    """A result folder in the making.

    Whatever can be wrong with questions, prompts or the folder is found when this is made, before weights are loaded.

    Args:
        answerer: the model.
        sets: what it is asked.
        sizes: of the pictures, as :func:`~vapr.evaluation.generation.prompts.check_images` returns them.
        options: how.
        folder: the result folder.

    Attributes:
        notes: lines on what was found there, to be shown.

    Raises:
        UserError: as the parts raise it.
    """

    def __init__(
        self, answerer: Answerer, sets: Sequence[AskedSet], sizes: Sizes, options: Options, folder: Path
    ) -> None:
        self.answerer, self.sets, self.options, self.folder = answerer, sets, options, folder
        self.processor = answerer.processor()
        self.engine = choose_engine(options.engine, whole=answerer.whole)
        self.settings = options.settings.of(self.engine)
        self.dtype = answerer.dtype(options.dtype)
        settings = {
            **self.settings.as_dict(), "engine": self.engine, "dtype": str(self.dtype).removeprefix("torch."),
            "image_backend": self.processor.image_backend,
        }  # fmt: skip
        record = describe(answerer.given, answerer.identity, settings, sets)
        self.record, notes = open_record(folder, record)
        self.notes = [
            *answerer.notes,
            *answerer.left_out(),
            *(f"{answerer.given}: {note}" for note in self.processor.notes),
            *notes,
        ]
        self._parts = [
            (name, one, self._batches(one, sizes, blind=blind))
            for name, blind in (("predictions", False), ("predictions.blind", True))[: 1 + options.blind]
            for one in sets
        ]

    def _batches(self, one: AskedSet, sizes: Sizes, *, blind: bool) -> list[list[Asked]]:
        """Return a set's questions in batches, which are the same whatever is answered already."""
        asked = tokenize_questions(one.questions, self.processor, blind=blind, sizes=sizes)
        return in_batches(asked, self.settings.batch_size or 1)

    def answer(self, say: Callable[[str], None] = print, *, quiet: bool = False) -> dict[str, list[Prediction]]:
        """Ask what is not answered yet, and write the finished files.

        Returns:
            The answers by benchmark, those without pictures as ``NAME (blind)``.

        Raises:
            UserError: if the model does not load or the folder cannot be written.
            Stopped: by a signal; answers so far are kept.
        """
        with FolderLock(self.folder):
            write_json(self.folder / NAME, self.record, allow_nan=False)
            journals = {name: Journal(self.folder, name) for name in dict.fromkeys(name for name, _, _ in self._parts)}
            self._tell(journals, say)
            todo = [
                (journals[name], one.benchmark.name, [b for b in batches if not _is_answered(b, journals[name])])
                for name, one, batches in self._parts
            ]
            for journal, _, batches in todo:
                if again := journal.forget((q.question.benchmark, q.question.id) for batch in batches for q in batch):
                    say(f"{journal.partial}: {again:,} answers of a batch that was not complete are given again")
            if any(batches for _, _, batches in todo):
                self._ask(todo, say, quiet)
            questions = [question for one in self.sets for question in one.questions]
            answers: dict[str, list[Prediction]] = {}
            for name, journal in journals.items():
                finished = journal.finish(questions)
                for one in self.sets:
                    blind = "" if name == "predictions" else " (blind)"
                    mine = [answer for answer in finished if answer.benchmark == one.benchmark.name]
                    answers[one.benchmark.name + blind] = mine
            return answers

    def _tell(self, journals: Mapping[str, Journal], say: Callable[[str], None]) -> None:
        for journal in journals.values():
            if journal.dropped:
                say(f"{journal.partial}: its last line was cut short and is dropped; the question is asked again")
            keys = {(q.benchmark, q.id) for one in self.sets for q in one.questions}
            if found := sum(key in journal.answered for key in keys):
                say(f"{self.folder}: {found:,} of {len(keys):,} questions are answered in {journal.file.stem}")

    def _ask(self, todo: list[tuple[Journal, str, list[list[Asked]]]], say: Callable[[str], None], quiet: bool) -> None:
        total = sum(len(batch) for _, _, batches in self._parts for batch in batches)
        left = sum(len(batch) for _, _, batches in todo for batch in batches)
        done = total - left

        def stopped() -> str:
            return f"{done:,} of {total:,} answers are kept in {self.folder}; the same command goes on from there"

        with stopped_at_once(stopped):
            engine = self._open_engine([one for _, _, batches in todo for batch in batches for one in batch])
            for note in engine.notes:
                say(note)
            try:
                with Display(self.answerer.name, total, done, unit="question", quiet=quiet) as display:
                    for journal, name, batches in todo:
                        for predictions in engine.answer(batches):
                            journal.add(predictions)
                            done += len(predictions)
                            display.advance(name, len(predictions))
            finally:
                for journal, _, _ in todo:
                    journal.close()
                engine.close()

    def _open_engine(self, asked: Sequence[Asked]) -> Engine:
        if self.engine == "transformers":
            return TransformersEngine(self.answerer, self.processor, self.settings, self.dtype)
        from vapr.evaluation.generation.vllm import VllmEngine

        return VllmEngine(self.answerer, self.processor, self.settings, self.dtype, asked)

    def score(
        self, answers: Mapping[str, list[Prediction]], say: Callable[[str], None] = print
    ) -> dict[str, Any]:  # fmt: skip
        """Score answers, add them to ``scores.json``, and return the scores by benchmark.

        What a judge has to score is scored by the reviews that are stored in the folder, if there are any.
        """
        scores: dict[str, Any] = {}
        for one in self.sets:
            name = one.benchmark.name
            reviews = reviews_of(self.folder, answers[name], one.benchmark, Judging(), partial=True, say=say)
            scores[name] = self._scored(answers[name], one, reviews)
            if self.options.blind:
                blind = f"{name} (blind)"
                scores[blind] = {**self._scored(answers[blind], one), "benchmark": blind}
                if scores[name]["scored"] and scores[blind]["scored"]:
                    scores[blind]["gap"] = _gap(answers[name], answers[blind], one, self.options.policy)
        path = self.folder / "scores.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError):
            before = {}
        write_json(path, {**(before if isinstance(before, dict) else {}), **scores}, allow_nan=False)
        return scores

    def _scored(
        self, answers: Sequence[Prediction], one: AskedSet, reviews: Mapping[str, Review] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Return the scores of a set; where truths are missing, why there are none."""
        policy, part = self.options.policy, len(one.questions) < one.of
        try:
            return score(answers, one.benchmark, policy, questions=one.of, partial=part, reviews=reviews)
        except UserError as error:
            withheld = dataclasses.replace(one.benchmark, scored=str(error))
            return score(answers, withheld, policy, questions=one.of, partial=part)


def _is_answered(batch: Sequence[Asked], journal: Journal) -> bool:
    return all((one.question.benchmark, one.question.id) in journal.answered for one in batch)


def _gap(seen: Sequence[Prediction], blind: Sequence[Prediction], one: AskedSet, policy: Policy) -> dict[str, Any]:
    """Return how much of the accuracy the pictures make: seen less blind, on the same questions."""
    with_pictures, without = (
        np.array([row.right for row in score_rows(answers, one.benchmark, policy)]) for answers in (seen, blind)
    )
    pictures = [prediction.image for prediction in seen]
    return {
        "accuracy": difference(without, with_pictures, pictures).as_dict(),
        "p": sign_flip(without, with_pictures, pictures),
    }
