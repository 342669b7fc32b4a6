"""Ask a judge for reviews of answers: those that are stored already are not asked for again."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vapr.errors import UserError
from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.judges.config import SEED, TEMPERATURE, JudgeConfig
from vapr.evaluation.judges.stored import asked, is_own, judged_by
from vapr.evaluation.scoring.prediction import Prediction
from vapr.evaluation.scoring.review import Review, count_problems, read_reviews, write_reviews
from vapr.llm.request import Reply, Request
from vapr.progress import Display

if TYPE_CHECKING:
    from vapr.llm.server import ServerModel


def judge(
    predictions: Sequence[Prediction], benchmark: Benchmark, config: JudgeConfig, file: Path,
    say: Callable[[str], None] = print,
) -> list[Review]:  # fmt: skip
    """Return the judge's reviews of all answers of a benchmark, after asking for those that ``file`` lacks.

    A stored review counts if judge, settings and all that was asked are the same; one that failed is asked for again.
    Reviews are written as they come.

    Args:
        predictions: of that benchmark.
        benchmark: which.
        config: the judge.
        file: ``reviews.jsonl``; reviews of other benchmarks in it are kept.
        say: called with lines on what was found, and what failed.

    Raises:
        UserError: if the server cannot be used, or not one review comes.
    """
    prompts = {prediction.id: judged_by(benchmark).prompt(prediction) for prediction in predictions}
    stored = _stored(file, say)
    wanted = _lacking(prompts, benchmark.name, config.model, config, stored) if config.model else list(prompts)
    if wanted:
        from vapr.llm.server import ServerModel

        model = ServerModel(config.url, config, section="judge")
        wanted = _lacking(prompts, benchmark.name, model.name, config, stored)
        if len(wanted) < len(prompts):
            say(f"{file}: {len(prompts) - len(wanted):,} of {len(prompts):,} answers have been reviewed already")
        if wanted:
            before = Review(benchmark=benchmark.name, id="", judge=model.name, review=None, settings=config.settings)
            new = _ask(model, {name: prompts[name] for name in wanted}, before, config, file)
            stored |= {(review.benchmark, review.id): review for review in new}
            write_reviews(file, stored.values())
            _say_failures(new, f"judge {model.name}", say)
    return [stored[benchmark.name, name] for name in prompts]


def _stored(file: Path, say: Callable[[str], None]) -> dict[tuple[str, str], Review]:
    """Return the reviews of a file by benchmark and id. A last line that was cut short is taken off."""
    if not file.exists():
        return {}
    try:
        with file.open("r+b") as lines:
            text = lines.read()
            if text and not text.endswith(b"\n"):
                lines.truncate(text.rfind(b"\n") + 1)
                say(f"{file}: the last line was cut short; its answer is asked for again")
    except OSError as error:
        raise UserError(f"{file}: cannot be read and written ({error.strerror})") from None
    if not is_own(file):
        raise UserError(f"{file}: not vapr's reviews.jsonl, so that no review can go in; name another with --reviews")
    return {(review.benchmark, review.id): review for review in read_reviews(file)}


def _lacking(
    prompts: Mapping[str, str], benchmark: str, judge: str, config: JudgeConfig,
    stored: Mapping[tuple[str, str], Review],
) -> list[str]:  # fmt: skip
    """Return the ids of answers without a review of this judge, under these settings, of the same words."""
    wanted = []
    for name, prompt in prompts.items():
        review = stored.get((benchmark, name))
        same = review is not None and (review.judge, review.settings, review.asked) == (
            judge, config.settings, asked(prompt)
        )  # fmt: skip
        if not same or review is None or review.review is None:
            wanted.append(name)
    return wanted


def _ask(
    model: "ServerModel", prompts: Mapping[str, str], before: Review, config: JudgeConfig, file: Path
) -> list[Review]:
    """Return reviews in the order of the prompts; each is added to the file as it comes."""
    names = list(prompts)
    requests = [
        Request(
            ({"role": "user", "content": prompt},), None, seed=SEED, max_tokens=config.max_tokens,
            temperature=TEMPERATURE,
        )
        for prompt in prompts.values()
    ]  # fmt: skip

    def review_of(number: int, reply: Reply) -> Review:
        return Review(
            benchmark=before.benchmark, id=names[number], judge=before.judge, review=reply.text,
            problem=reply.problem, asked=asked(prompts[names[number]]), settings=before.settings,
        )  # fmt: skip

    with _appending(file) as lines, Display(f"judge {before.benchmark}", len(names), unit="answer") as display:

        def keep(number: int, reply: Reply) -> None:
            lines.write(f"{review_of(number, reply).as_json()}\n".encode(errors="backslashreplace"))
            lines.flush()
            display.advance("")

        replies = model.ask_each(requests, keep)
    return [review_of(number, reply) for number, reply in enumerate(replies)]


def _appending(file: Path) -> IO[bytes]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("ab")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({os.strerror(error.errno or 0)})") from None


def _say_failures(reviews: Sequence[Review], who: str, say: Callable[[str], None]) -> None:
    """Say how many reviews failed, and of what.

    Raises:
        UserError: if all did.
    """
    problems = [review.problem or "no review" for review in reviews if review.review is None]
    if not problems:
        return
    told = "; ".join(f"{count:,} x {problem}" for problem, count in list(count_problems(problems).items())[:3])
    if len(problems) == len(reviews):
        raise UserError(f"{who}: no review came of {len(reviews):,} that were asked for: {told}; run it again later")
    say(f"{who}: {len(problems):,} of {len(reviews):,} reviews failed: {told}; the same command asks for them again")
