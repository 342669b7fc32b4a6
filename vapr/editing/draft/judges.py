"""Judges of what has passed the checks: one without the image, one that sees it, and one that ranks candidates."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vapr.editing.config import EditConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.asker import Asker, text_of
from vapr.editing.draft.checks import Verdict
from vapr.editing.draft.draft import Draft
from vapr.errors import UserError
from vapr.llm.request import LanguageModel

JUDGE_TOKENS = 64
JUDGE = "judge"
"""The verdict of whoever gives points: it passes all, and its value is the points, if it gave any."""


class Judges:
    """Judges of drafts and of candidates alike.

    Args:
        config: the settings of the job.
        editor_of: gives the language model that edits a draft; None: rules alone do.
        verifier: a model that looks at the image; None: nobody does.
        pictures: gives an image source as a data URI, for the verifier.
        judge: a model that gives points; None: the editor of a draft does.
    """

    def __init__(
        self, config: EditConfig, editor_of: Callable[[Draft], LanguageModel | None],
        verifier: LanguageModel | None, pictures: Callable[[Path | bytes], str] | None, judge: LanguageModel | None,
    ) -> None:  # fmt: skip
        self._config = config
        self._editor_of = editor_of
        self._verifier = verifier
        self._pictures = pictures
        self._judge = judge

    def check_blind(self, drafts: Sequence[Draft], asker: Asker) -> None:
        """Ask without the image whether both answers could be true; refuse those that could."""
        if not self._config.checks.blind:
            return
        judged, asked = [], []
        for draft in drafts:
            if draft.status == "open" and (llm := self._editor_of(draft)) is not None:
                messages = prompts.both_messages(draft.turn, str(draft.rejected))
                judged.append(draft)
                asked.append((llm, asker.request(draft, "both", messages, prompts.BOTH_SCHEMA, JUDGE_TOKENS)))
        for draft, reply in zip(judged, asker.ask_each(asked, "blind check"), strict=True):
            try:
                both = prompts.read_both(text_of(reply))
            except prompts.BadReply as error:
                draft.end("failed", f"blind check: {error}")
                continue
            draft.verdicts.append(Verdict("blind", not both))
            if both:
                draft.end("rejected", "blind check: both answers could be true of one image")

    def verify(self, drafts: Sequence[Draft], asker: Asker) -> None:
        """Ask twice, with the order swapped: a verifier that likes the first answer best says nothing."""
        if self._verifier is None:
            return
        seen = [(draft, self._look(draft)) for draft in drafts if draft.status == "open"]
        judged = [(draft, pictures) for draft, pictures in seen if pictures is not None]
        votes: list[list[bool]] = [[] for _ in judged]
        for right in ("A", "B"):
            requests = []
            for draft, pictures in judged:
                texts = (draft.turn.answer, str(draft.rejected))
                first, second = texts if right == "A" else texts[::-1]
                messages = prompts.truth_messages(draft.turn, pictures, first, second)
                requests.append(asker.request(draft, f"truth|{right}", messages, prompts.TRUTH_SCHEMA, JUDGE_TOKENS))
            replies = asker.ask(self._verifier, requests, "verifier")
            for (draft, _), vote, reply in zip(judged, votes, replies, strict=True):
                try:
                    vote.append(prompts.read_truth(text_of(reply)) == right)
                except prompts.BadReply as error:
                    if draft.status == "open":
                        draft.end("failed", f"verifier: {error}")
        for (draft, _), vote in zip(judged, votes, strict=True):
            if draft.status == "open":
                draft.verdicts.append(Verdict("verifier", all(vote), float(sum(vote))))
                if not all(vote):
                    draft.end("rejected", "verifier: the image does not tell the two answers apart")

    def _look(self, draft: Draft) -> list[str] | None:
        """Return the pictures of a draft; one whose pictures cannot be read fails alone."""
        assert self._pictures is not None
        try:
            return [self._pictures(image) for image in draft.turn.images]
        except UserError as error:
            draft.end("failed", f"verifier: {error}")
            return None

    def give_points(self, drafts: Sequence[Draft], asker: Asker) -> None:
        """Have the candidates of each draft held against the rubric, where more than one is left.

        A reply without a number gives no points, which is less than 0 points; its verdict says so.
        """
        if (rubric := self._config.ask.rubric) is None:
            return
        judged, asked = [], []
        for draft in drafts:
            left = [candidate for candidate in draft.candidates if candidate.status == "open"]
            llm = self._judge or self._editor_of(draft)
            if draft.status != "open" or len(left) < 2 or llm is None:
                continue
            for candidate in left:
                messages = prompts.score_messages(draft.turn, str(candidate.rejected), rubric)
                judged.append(candidate)
                asked.append((llm, asker.request(draft, "score", messages, prompts.SCORE_SCHEMA, JUDGE_TOKENS)))
        for candidate, reply in zip(judged, asker.ask_each(asked, "judge"), strict=True):
            try:
                candidate.score = prompts.read_score(text_of(reply))
                candidate.verdicts.append(Verdict(JUDGE, True, float(candidate.score)))
            except prompts.BadReply as error:
                candidate.verdicts.append(Verdict(JUDGE, True, note=f"no points: {error}"))
