"""Edits the turns of one shard: plan, ask the language model, apply, check, ask again, and keep trades in balance."""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapr.data.pair import Edit
from vapr.editing.config import EditConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.checks import Verdict, check_pair
from vapr.editing.draft.trades import NO_PARTNER, PARTNER_LOST, Plan, Planner, release
from vapr.editing.llm.request import LanguageModel, Reply, Request
from vapr.editing.rules.agreement import CannotEdit
from vapr.editing.rules.categories import Categories, Category
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.operations import apply, changed_spans
from vapr.editing.rules.turns import Turn, answer_hash, bare
from vapr.errors import UserError

Told = Callable[[int, str], None]
"""Is told how many turns more are through, and in words what is going on."""

SAME_PAIR = "another pair has the same images, prompt and rejected answer"
TRUE_HERE = "another row gives the edited answer as the truth of this image"
LABEL_TOKENS = 64
TRUTH_TOKENS = 64


@dataclass(slots=True)
class Draft:
    """A turn on its way to a pair."""

    turn: Turn
    plan: Plan = field(default_factory=Plan)
    rejected: str | None = None
    edits: list[Edit] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    attempts: int = 0
    raw: str | None = None  # the model's last reply
    why: list[str] = field(default_factory=list)  # why the result is wrong, in the model's words
    refused: list[str] = field(default_factory=list)  # why earlier edits were
    status: str = "open"  # accepted | rejected | failed | partner_lost | over_target
    reason: str | None = None
    taken_up: bool = False  # as an earlier round left it, which has noted its plan

    def end(self, status: str, reason: str) -> None:
        self.status, self.reason, self.rejected, self.edits = status, reason, None, []


@dataclass(slots=True)
class Tokens:
    """Of all requests of a shard."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def add(self, reply: Reply) -> None:
        self.prompt += reply.prompt_tokens
        self.cached += reply.cached_tokens
        self.generated += reply.generated_tokens


class Editor:
    """Makes drafts of turns; one for each process.

    Args:
        config: of the job.
        categories: of the job.
        llm: the language model; None edits by rules alone.
        verifier: looks at the image; None: nobody does.
        pictures: an image source as a data URI, for the verifier.
    """

    def __init__(
        self, config: EditConfig, categories: Categories, llm: LanguageModel | None = None,
        verifier: LanguageModel | None = None, pictures: Callable[[Path | bytes], str] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.categories = categories
        self.llm = llm
        self.verifier = verifier
        self.pictures = pictures
        self.nouns = Nouns(Path(config.checks.wordnet) if config.checks.wordnet else None)
        self.planner = Planner(categories, self.nouns, llm.name if llm else None, config.plan.balance)

    def edit(
        self, turns: Sequence[Turn], seed: str, told: Told = lambda count, what: None,
        published: Callable[[], AbstractSet[int]] = frozenset,
    ) -> tuple[list[Draft], Tokens]:  # fmt: skip
        """A draft for each turn, in their order, each accepted, rejected or failed.

        Args:
            turns: of one shard.
            seed: names the shard; with the job's seed it decides trades and the model's sampling.
            told: of the progress.
            published: gives the identities of pairs that are written already; no draft becomes one of them again.
        """
        tokens = Tokens()
        drafts = [Draft(turn) for turn in turns]
        self._plan(drafts, seed, tokens, told)
        waiting = sum(draft.plan.ask and draft.plan.reason is None for draft in drafts)
        told(len(drafts) - waiting, "")
        self._trade(drafts)
        self._ask(drafts, seed, tokens, told)
        self._settle(drafts)
        self._other_answers(drafts)
        self._blind_check(drafts, seed, tokens, told)
        self._verify(drafts, seed, tokens, told)
        self._settle(drafts)
        while self._end_repeated(drafts, published()):
            self._settle(drafts)
        for draft in drafts:
            if draft.status == "open":
                draft.status = "accepted"
        return drafts, tokens

    # Planning

    def _plan(self, drafts: list[Draft], seed: str, tokens: Tokens, told: Told) -> None:
        for number, draft in enumerate(drafts):
            draft.plan = self.planner.by_rules(draft.turn, number)
        unclear = [n for n, draft in enumerate(drafts) if draft.plan.category is None and not draft.plan.reason]
        if self.llm is not None and unclear:
            requests = [
                self._request(
                    prompts.label_messages(self.categories, drafts[n].turn), prompts.label_schema(self.categories),
                    LABEL_TOKENS, drafts[n].turn, f"{seed}|label",
                )
                for n in unclear
            ]  # fmt: skip
            replies = self._replies(self.llm, requests, tokens, told, "categories")
            for number, reply in zip(unclear, replies, strict=True):
                draft = drafts[number]
                try:
                    label = prompts.read_label(_text(reply), self.categories)
                except prompts.BadReply as error:
                    draft.plan.decided_by = f"model {self.llm.name}"
                    draft.end("failed", f"no category: {error}")
                else:
                    draft.plan = self.planner.labelled(draft.turn, number, label)
        self.planner.trade([draft.plan for draft in drafts], f"{self.config.seed}|{seed}")
        for draft in drafts:
            if draft.plan.reason and draft.status == "open":
                draft.end("rejected", draft.plan.reason)

    def _trade(self, drafts: list[Draft]) -> None:
        for draft in drafts:
            if draft.status == "open" and not draft.plan.ask:
                self._apply_trades(draft)

    def _apply_trades(self, draft: Draft) -> None:
        plan, category = draft.plan, _category(draft)
        if len(plan.trades) < category.min_edits:
            draft.end("rejected", NO_PARTNER)
            return
        try:
            draft.rejected, draft.edits = apply(draft.turn.answer, plan.operations())
        except CannotEdit as error:
            draft.end("rejected", str(error))
            return
        draft.verdicts = self._check(draft)
        if failed := _failed(draft.verdicts):
            draft.end("rejected", failed)

    def _check(self, draft: Draft) -> list[Verdict]:
        assert draft.rejected is not None
        return check_pair(
            draft.turn.answer,
            draft.rejected,
            draft.edits,
            _category(draft),
            self.config.checks,
            self.nouns,
            traded=not draft.plan.ask,
        )

    # The language model

    def _ask(self, drafts: list[Draft], seed: str, tokens: Tokens, told: Told) -> None:
        """Ask for an edit, and again where it was refused, with the reason."""
        open_drafts = [draft for draft in drafts if draft.status == "open" and draft.plan.ask]
        if not open_drafts:
            return
        assert self.llm is not None
        # One category after the other: their prompts begin alike, which the engine computes once.
        open_drafts.sort(key=lambda draft: (_category(draft).order, _category(draft).name))
        for attempt in range(self.config.ask.attempts):
            last = attempt + 1 == self.config.ask.attempts
            requests = [self._edit_request(draft, f"{seed}|{attempt}") for draft in open_drafts]
            replies = self._replies(self.llm, requests, tokens, told, f"edits, attempt {attempt + 1}")
            for draft, reply in zip(open_drafts, replies, strict=True):
                draft.attempts += 1
                draft.raw = reply.text
                problem = self._read(draft, reply)
                if problem is None:
                    told(1, "")
                elif last:
                    draft.end("failed", problem)
                    told(1, "")
                else:
                    draft.rejected = None
                    draft.refused.append(problem)
            open_drafts = [d for d in open_drafts if d.status == "open" and d.rejected is None]
            if not open_drafts:
                return

    def _edit_request(self, draft: Draft, seed: str) -> Request:
        category = _category(draft)
        messages = prompts.edit_messages(category, draft.turn, must_begin=draft.plan.must_begin, refused=draft.refused)
        longer = len(draft.turn.answer) // 2 if category.mode == "rewrite" else 0  # two characters a token at worst
        limit = self.config.ask.max_tokens + longer
        return self._request(messages, prompts.edit_schema(category), limit, draft.turn, seed)

    def _read(self, draft: Draft, reply: Reply) -> str | None:
        """Take the edit out of a reply; what is wrong with it, if anything."""
        category = _category(draft)
        try:
            text = _text(reply)
            if category.mode == "rewrite":
                draft.rejected, why = prompts.read_rewrite(text)
                draft.edits, draft.why = changed_spans(draft.turn.answer, draft.rejected), [why]
            else:
                operations = prompts.read_edits(text, category)
                draft.rejected, draft.edits = apply(draft.turn.answer, operations)
                draft.why = [operation.why for operation in operations]
        except (prompts.BadReply, CannotEdit) as error:
            return str(error)
        draft.verdicts = self._check(draft)
        return _failed(draft.verdicts)

    def _request(
        self, messages: tuple[dict[str, Any], ...], schema: dict[str, Any], max_tokens: int, turn: Turn, seed: str
    ) -> Request:
        digest = hashlib.sha256(f"{self.config.seed}|{seed}|{turn.digest()}".encode()).digest()
        number = int.from_bytes(digest[:4], "little") >> 1
        return Request(messages, schema, number, max_tokens, self.config.ask.temperature)

    @staticmethod
    def _replies(llm: LanguageModel, requests: Sequence[Request], tokens: Tokens, told: Told, what: str) -> list[Reply]:
        came = itertools.count(1)
        replies = llm.ask(requests, lambda: told(0, f"{what}: {next(came):,} of {len(requests):,} replies"))
        for reply in replies:
            tokens.add(reply)
        return replies

    # Balance

    def _settle(self, drafts: list[Draft]) -> None:
        """Where one half of a trade was refused, undo the other, until every trade left has both halves."""
        plans = [draft.plan for draft in drafts]
        ended = [n for n, draft in enumerate(drafts) if draft.status != "open" and draft.plan.trades]
        while ended:
            draft = drafts[ended.pop()]
            for trade in list(draft.plan.trades):
                for number in release(trade, plans):
                    other = drafts[number]
                    if other is draft or other.status != "open":
                        continue
                    # What is left of a caption's edits is still a pair, unless somebody has judged it as a whole.
                    if other.plan.trades and not other.plan.ask and not _judged(other):
                        self._apply_trades(other)
                        if other.reason == NO_PARTNER:
                            other.end("partner_lost", PARTNER_LOST)
                    else:
                        other.end("partner_lost", PARTNER_LOST)
                    if other.status != "open" and other.plan.trades:
                        ended.append(number)

    # Judges

    def _other_answers(self, drafts: list[Draft]) -> None:
        """Refuse a rejected answer that another row gives as the truth for the same image and question.

        Of rows in other shards the turn knows by hashes.
        """
        answers: dict[tuple[Any, str], set[str]] = defaultdict(set)
        for draft in drafts:
            answers[draft.turn.images, draft.turn.question].add(bare(draft.turn.answer))
        for draft in drafts:
            if draft.status == "open" and draft.rejected is not None:
                known = answers[draft.turn.images, draft.turn.question]
                if bare(draft.rejected) in known or answer_hash(draft.rejected) in draft.turn.truths:
                    draft.end("rejected", TRUE_HERE)
                else:
                    draft.verdicts.append(Verdict("duplicate", True))

    @staticmethod
    def _end_repeated(drafts: Sequence[Draft], published: AbstractSet[int]) -> bool:
        """Refuse what would be a pair that there is already; whether there was any."""
        times = Counter((draft.turn.images, draft.turn.question) for draft in drafts)
        known, ended = set(published), False
        for draft in drafts:
            asked_again = draft.turn.truths or times[draft.turn.images, draft.turn.question] > 1
            if draft.status != "open" or draft.rejected is None or not asked_again:
                continue
            identity = draft.turn.identity(draft.rejected)
            if identity in known:
                draft.end("rejected", SAME_PAIR)
                ended = True
            known.add(identity)
        return ended

    def _blind_check(self, drafts: list[Draft], seed: str, tokens: Tokens, told: Told) -> None:
        if not self.config.checks.blind or self.llm is None:
            return
        judged = [draft for draft in drafts if draft.status == "open"]
        requests = []
        for draft in judged:
            messages = prompts.both_messages(draft.turn, str(draft.rejected))
            requests.append(self._request(messages, prompts.BOTH_SCHEMA, TRUTH_TOKENS, draft.turn, f"{seed}|both"))
        replies = self._replies(self.llm, requests, tokens, told, "blind check")
        for draft, reply in zip(judged, replies, strict=True):
            try:
                both = prompts.read_both(_text(reply))
            except prompts.BadReply as error:
                draft.end("failed", f"blind check: {error}")
                continue
            draft.verdicts.append(Verdict("blind", not both))
            if both:
                draft.end("rejected", "blind check: both answers could be true of one image")

    def _look(self, drafts: list[Draft]) -> tuple[list[Draft], list[list[str]]]:
        """Open drafts with their pictures; one whose picture cannot be read fails alone."""
        assert self.pictures is not None
        judged, seen = [], []
        for draft in drafts:
            if draft.status != "open":
                continue
            try:
                seen.append([self.pictures(image) for image in draft.turn.images])
            except UserError as error:
                draft.end("failed", f"verifier: {error}")
            else:
                judged.append(draft)
        return judged, seen

    def _verify(self, drafts: list[Draft], seed: str, tokens: Tokens, told: Told) -> None:
        """Ask twice, with the order swapped: a verifier that likes the first answer best says nothing."""
        if self.verifier is None:
            return
        judged, seen = self._look(drafts)
        votes: list[list[bool]] = [[] for _ in judged]
        for right in ("A", "B"):
            requests = []
            for draft, pictures in zip(judged, seen, strict=True):
                texts = (draft.turn.answer, str(draft.rejected))
                first, second = texts if right == "A" else texts[::-1]
                messages = prompts.truth_messages(draft.turn, pictures, first, second)
                requests.append(
                    self._request(messages, prompts.TRUTH_SCHEMA, TRUTH_TOKENS, draft.turn, f"{seed}|truth|{right}")
                )
            for number, reply in enumerate(self._replies(self.verifier, requests, tokens, told, "verifier")):
                try:
                    votes[number].append(prompts.read_truth(_text(reply)) == right)
                except prompts.BadReply as error:
                    if judged[number].status == "open":
                        judged[number].end("failed", f"verifier: {error}")
        for draft, vote in zip(judged, votes, strict=True):
            if draft.status == "open":
                draft.verdicts.append(Verdict("verifier", all(vote), float(sum(vote))))
                if not all(vote):
                    draft.end("rejected", "verifier: the image does not tell the two answers apart")


def _category(draft: Draft) -> Category:
    assert draft.plan.category is not None
    return draft.plan.category


def _text(reply: Reply) -> str:
    if reply.text is None:
        raise prompts.BadReply(reply.problem or "no text")
    return reply.text


def _failed(verdicts: Sequence[Verdict]) -> str | None:
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return f"{failed[0].name}: {failed[0].note}" if failed else None


def _judged(draft: Draft) -> bool:
    return any(verdict.name in ("blind", "verifier") for verdict in draft.verdicts)
