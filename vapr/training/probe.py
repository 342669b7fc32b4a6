"""A look at the policy while it trains: what it prefers with and without the image, and what it answers.

Preference is by the policy's own log-probs, as ``vapr audit`` measures a reference model: chosen is preferred if its
log-prob is larger, and equal ones count half. Nothing of the training is changed by it.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vapr.batches.packing import fill_packs, pack
from vapr.batches.tokenize import Processor
from vapr.cache import write_json
from vapr.config import Config
from vapr.data.images import image_size, read_image
from vapr.data.pair import PreferencePair
from vapr.data.pairs import Pairs
from vapr.errors import UserError
from vapr.evaluation.generation.answer import answer_batches
from vapr.evaluation.generation.prompts import Asked, in_batches
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.scoring.answers import yes_or_no
from vapr.evaluation.scoring.figures import Figure, numbered, of_counts, share
from vapr.evaluation.scoring.prediction import Question
from vapr.model.generation import as_transformers
from vapr.model.logps import completion_logps, per_completion, token_logps
from vapr.model.policy import Policy, frozen
from vapr.pages.page import thumbnail
from vapr.pages.probe import Shown, read_probes
from vapr.training.probe_slice import Slice, picture_of, said_in, text_of

AT_ONCE = 16
"""Pairs scored whose pixels are in memory together."""

ASKED_AT_ONCE = 8
"""Questions answered together; training leaves a GPU little memory."""

Note = Callable[[str], None]


class Probe:
    """A slice of held-out pairs, and how the policy does on it.

    Args:
        config: ``probe``, and how its pairs are read and packed.
        processor: tokenises.

    Raises:
        UserError: if a row of the slice cannot be used, unless such rows are skipped; or if none can.
    """

    def __init__(self, config: Config, processor: Processor) -> None:
        self._config, self._processor = config, processor
        self._slice = Slice(config, processor)

    @property
    def rows(self) -> Pairs:
        """All held-out pairs that the slice was drawn from."""
        return self._slice.rows

    def in_words(self) -> str:
        """Say what is looked at, and how often."""
        return self._slice.in_words()

    def is_due(self, step: int, num_steps: int) -> bool:
        """Tell whether a probe belongs after this step."""
        return step % (self._config.probe.every or 1) == 0 or step == num_steps

    def take(self, policy: Policy, step: int, run_dir: Path, note: Note) -> tuple[dict[str, float | None], str]:
        """Measure the policy and write ``probe/step-N.json`` into the run's folder.

        Returns:
            The values to log, and a line for the terminal.
        """
        began = time.monotonic()
        preferences, figures = self._preferences(policy, note)
        answers = self._answers(policy, note)
        figures |= _answer_figures([answer for answer in answers if answer["yes_or_no"]])
        seconds = time.monotonic() - began
        written = {name: figure.as_dict() for name, figure in figures.items()}
        content = {"step": step, "seconds": seconds, "figures": written, "preferences": preferences, "answers": answers}
        write_json(run_dir / "probe" / f"step-{step:06d}.json", content)
        values = {**{f"probe/{name}": figure.value for name, figure in figures.items()}, "probe/seconds": seconds}
        return values, _in_words(values)

    def shown(self, run_dir: Path) -> list[Shown]:
        """Return the questions that the report shows, with their pictures and every answer so far."""
        most = self._config.probe.shown
        probes = read_probes(run_dir)
        return [
            *(_shown(pair, probes, yes_or_no=True) for pair in self._slice.questions[:most]),
            *(_shown(pair, probes, yes_or_no=False) for pair in self._slice.pairs[:most]),
        ]

    def _preferences(self, policy: Policy, note: Note) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
        """Return of each pair whether chosen is likelier, and how often it is: with the image, without, the gap."""
        pairs = dict(enumerate(self._slice.pairs))
        shown, blind = self._preferred(policy, pairs, note), self._preferred(policy, self._slice.blind, note)
        pictures = [picture_of(pair) for pair in pairs.values()]
        groups = [pictures[n] for n in blind]
        counts = np.array([[shown[n], value, 1.0] for n, value in blind.items()]).reshape(-1, 3)
        gap = of_counts(counts, numbered(groups), {"gap": lambda c: (c[:, 0] - c[:, 1]) / c[:, 2]})
        rows = [
            {"where": pair.where, "picture": picture_of(pair), "with_image": shown[n], "blind": blind.get(n)}
            for n, pair in pairs.items()
        ]
        figures = {
            "accuracy": share([shown[n] for n in pairs], pictures),
            "accuracy_blind": share(list(blind.values()), groups),
            **gap,
        }
        return rows, figures

    def _preferred(self, policy: Policy, pairs: Mapping[int, PreferencePair], note: Note) -> dict[int, float]:
        """Return 1 by number where chosen has the larger log-prob, 0 where rejected has, 0.5 where they are equal."""
        packing = self._config.packing
        preferred: dict[int, float] = {}
        with frozen(policy):
            for chunk in _chunks(list(pairs.items())):
                tokenized = [dataclasses.replace(self._processor.tokenize_pair(pair), number=n) for n, pair in chunk]
                for members in fill_packs(tokenized, packing):
                    batch = pack(members, packing.share).to(policy.device)
                    sums = completion_logps(per_completion(token_logps(policy, batch), batch), batch)  # (P, 2)
                    for pair, margin in zip(batch.pairs, (sums[:, 0] - sums[:, 1]).tolist(), strict=True):
                        preferred[pair.number] = 0.5 if margin == 0 else float(margin > 0)
                note(f"probe: {len(preferred)}/{len(pairs)} pairs")
        return {n: preferred[n] for n in pairs}

    def _answers(self, policy: Policy, note: Note) -> list[dict[str, Any]]:
        """Return what the policy answers to each question, and what that is read as."""
        questions = self._slice.questions
        asked = [*questions, *self._slice.pairs[: self._config.probe.shown]]
        note(f"probe: {len(asked)} answers")
        said = answer(policy, self._processor, asked, self._config.probe.max_new_tokens)
        return [
            {
                "id": pair.id, "where": pair.where, "picture": picture_of(pair), "truth": text_of(pair.chosen),
                "said": text, "yes_or_no": n < len(questions), "gold": said_in(pair), "read": yes_or_no(text, "strict"),
            }
            for n, (pair, text) in enumerate(zip(asked, said, strict=True))
        ]  # fmt: skip


def answer(policy: Policy, processor: Processor, pairs: Sequence[PreferencePair], max_new_tokens: int) -> list[str]:
    """Return what the policy answers to the prompts of pairs, greedily."""
    asked = [_question(processor, n, pair) for n, pair in enumerate(pairs)]
    settings = Settings(max_new_tokens=max_new_tokens)
    said: dict[int, str] = {}
    with as_transformers(policy) as model:
        for predictions in answer_batches(model, processor, in_batches(asked, ASKED_AT_ONCE), settings):
            said |= {int(prediction.id): prediction.prediction for prediction in predictions}
    return [said[n] for n in range(len(pairs))]


def _question(processor: Processor, number: int, pair: PreferencePair) -> Asked:
    question = Question(benchmark="probe", id=str(number), question="", answer="", images=pair.images)
    prompt = processor.tokenize_prompt(list(pair.prompt))
    more = processor.expected_image_tokens([image_size(image) for image in pair.images]) - len(pair.images)
    return Asked(question, prompt, pair.images, len(prompt.ids) + more)


def _answer_figures(answers: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Return accuracy, yes rate, true yes rate and unparsed share of the answers to yes/no questions."""
    if not answers:
        return {}
    pictures = [answer["picture"] for answer in answers]
    holds = {
        "accuracy": [answer["read"] == answer["gold"] for answer in answers],
        "yes_rate": [answer["read"] == "yes" for answer in answers],
        "gold_yes_rate": [answer["gold"] == "yes" for answer in answers],
        "unparsed_rate": [answer["read"] is None for answer in answers],
    }
    return {f"answers/{name}": share(values, pictures) for name, values in holds.items()}


def _in_words(values: Mapping[str, float | None]) -> str:
    def shown(name: str, form: str = ".2f") -> str:
        value = values.get(f"probe/{name}")
        return "none" if value is None else format(value, form)

    line = f"probe: acc {shown('accuracy')}"
    if values.get("probe/gap") is not None:
        line += f", blind {shown('accuracy_blind')}, gap {shown('gap', '+.2f')}"
    if "probe/answers/accuracy" in values:
        line += (
            f"; answers {shown('answers/accuracy')} right, yes {shown('answers/yes_rate')} "
            f"(true {shown('answers/gold_yes_rate')}), unparsed {shown('answers/unparsed_rate')}"
        )
    return f"{line}; {shown('seconds', '.1f')} s"


def _shown(pair: PreferencePair, probes: Sequence[dict[str, Any]], *, yes_or_no: bool) -> Shown:
    said = [
        (probe["step"], answer["said"])
        for probe in probes
        for answer in probe["answers"]
        if (answer["where"], answer["yes_or_no"]) == (pair.where, yes_or_no)
    ]
    try:
        pictures = tuple(thumbnail(read_image(image)) for image in pair.images)
    except UserError:
        pictures = ()
    question = "".join(part.get("text", "") for part in pair.prompt[-1]["content"])
    return Shown(question, text_of(pair.chosen), pictures, said)


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]
