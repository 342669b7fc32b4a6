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
from vapr.editing.rules.agreement import CannotEdit
from vapr.editing.rules.categories import Categories, Category
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.operations import apply, changed_spans
from vapr.editing.rules.turns import Turn, answer_hash, bare
from vapr.errors import UserError
from vapr.llm.request import LanguageModel, Reply, Request
from vapr.progress import Display

RULES = "rules"
"""The name of the editor that has no language model."""
SAME_PAIR = "another pair has the same images, prompt and rejected answer"
TRUE_HERE = "another row gives the edited answer as the truth of this image"
LABEL_TOKENS = TRUTH_TOKENS = 64


@dataclass(slots=True)
class Picture:
    """What a draft shows beside its rejected answer in place of its own images."""

    images: tuple[Path, ...]
    plan: dict[str, Any]  # plain data: how it was made


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
    picture: Picture | None = None  # where the answer stays and the images change
    restored: bool = False  # from an earlier round, which has noted its plan

    def end(self, status: str, reason: str) -> None:
        self.status, self.reason, self.rejected, self.edits = status, reason, None, []

    @property
    def category(self) -> Category:
        """The category of a draft that has one."""
        assert self.plan.category is not None
        return self.plan.category


@dataclass(slots=True)
class Tokens:
    """What the requests of a shard have cost, those of one model or all."""

    asked: int = 0  # replies that a model was asked for
    found: int = 0  # replies that were kept from before, and cost nothing
    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def count(self, reply: Reply) -> None:
        """Add one reply."""
        if reply.found:
            self.found += 1
            return
        self.asked += 1
        self.prompt += reply.prompt_tokens
        self.cached += reply.cached_tokens
        self.generated += reply.generated_tokens


class _Asker:
    """Sends the requests of one shard: each has its own seed, tokens are added up, replies are shown as progress."""

    def __init__(self, config: EditConfig, round: int, display: Display | None) -> None:
        self._config, self._round, self._display = config, round, display
        self.tokens: dict[str, Tokens] = defaultdict(Tokens)  # of each model

    def advance(self, turns: int) -> None:
        """Show that so many turns more are through."""
        if turns and self._display is not None:
            self._display.advance("", turns)

    def request(
        self, draft: Draft, purpose: str, messages: prompts.Messages, schema: dict[str, Any], max_tokens: int
    ) -> Request:
        """Make a request about a draft; the same one for the same purpose in the same round, whatever shard it is in.

        So a reply that is kept is found again by jobs that divide or filter the source otherwise; --retry-failed, which
        begins another round, gets another reply.
        """
        seed = f"{self._config.seed}|{self._round}|{purpose}|{draft.turn.digest()}"
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little") >> 1
        max_tokens += self._config.engine.reasoning_tokens
        return Request(messages, schema, number, max_tokens, self._config.ask.temperature)

    def ask(self, llm: LanguageModel, requests: Sequence[Request], what: str) -> list[Reply]:
        """Return the replies, in the order of the requests."""
        came = itertools.count(1)

        def show() -> None:
            note = f"{what}: {next(came):,} of {len(requests):,} replies"
            if self._display is not None:
                self._display.note(note)

        replies = llm.ask(requests, show)
        for reply in replies:
            self.tokens[llm.name].count(reply)
        return replies


class Editor:
    """Makes drafts of turns; one for each process.

    Args:
        config: the settings of the job.
        categories: the categories of the job.
        llm: the language model; None edits by rules alone.
        verifier: a model that looks at the image; None: nobody does.
        pictures: gives an image source as a data URI, for the verifier.
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
        self.identity = {
            "name": llm.name if llm else RULES,
            "revision": llm.revision if llm else None,
            "engine": llm.engine if llm else None,
            "prompt_hash": prompts.prompt_hash(categories),
            "seed": config.seed,
            "temperature": config.ask.temperature if llm else None,
        }
        """Who edits, for provenance."""

    def edit(
        self, turns: Sequence[Turn], shard: str, display: Display | None = None,
        published: Callable[[], AbstractSet[int]] = frozenset, round: int = 0,
    ) -> tuple[list[Draft], dict[str, Tokens]]:  # fmt: skip
        """Make a draft of each turn, in their order, each accepted, rejected or failed.

        Args:
            turns: the turns of one shard.
            shard: its name; with the job's seed it decides trades.
            display: shows progress.
            published: gives the identities of pairs that are written already; no draft becomes one of them again.
            round: how often these turns were through before; with the job's seed it decides the model's sampling.

        Returns:
            The drafts, and what each model has cost, by its name.
        """
        asker = _Asker(self.config, round, display)
        drafts = [Draft(turn, self.planner.by_rules(turn, number)) for number, turn in enumerate(turns)]
        self._label(drafts, asker)
        self.planner.trade([draft.plan for draft in drafts], f"{self.config.seed}|{shard}")
        for draft in drafts:
            if draft.plan.reason and draft.status == "open":
                draft.end("rejected", draft.plan.reason)
        asker.advance(sum(not draft.plan.ask or draft.plan.reason is not None for draft in drafts))
        for draft in drafts:
            if draft.status == "open" and not draft.plan.ask:
                self._apply_trades(draft)
        self._ask_for_edits(drafts, asker)
        self._end_torn_trades(drafts)
        self._end_true_answers(drafts)
        self._check_blind(drafts, asker)
        self._verify(drafts, asker)
        self._end_torn_trades(drafts)
        while self._end_repeated(drafts, published()):
            self._end_torn_trades(drafts)
        for draft in drafts:
            if draft.status == "open":
                draft.status = "accepted"
        return drafts, asker.tokens

    # Rules

    def _apply_trades(self, draft: Draft) -> None:
        if len(draft.plan.trades) < draft.category.min_edits:
            draft.end("rejected", NO_PARTNER)
            return
        try:
            draft.rejected, draft.edits = apply(draft.turn.answer, draft.plan.operations())
        except CannotEdit as error:
            draft.end("rejected", str(error))
            return
        if problem := self._check(draft):
            draft.end("rejected", problem)

    def _check(self, draft: Draft) -> str | None:
        """Check a draft that has been edited; return what is wrong with it, if anything."""
        assert draft.rejected is not None
        answer, checks, traded = draft.turn.answer, self.config.checks, not draft.plan.ask
        draft.verdicts = check_pair(
            answer, draft.rejected, draft.edits, draft.category, checks, self.nouns, traded=traded
        )
        return next((f"{verdict.name}: {verdict.note}" for verdict in draft.verdicts if not verdict.passed), None)

    # The language model

    def _label(self, drafts: list[Draft], asker: _Asker) -> None:
        """Ask for the category of turns that no rule fits."""
        unclear = [n for n, draft in enumerate(drafts) if draft.plan.category is None and not draft.plan.reason]
        if self.llm is None or not unclear:
            return
        schema = prompts.label_schema(self.categories)
        requests = []
        for number in unclear:
            messages = prompts.label_messages(self.categories, drafts[number].turn)
            requests.append(asker.request(drafts[number], "label", messages, schema, LABEL_TOKENS))
        for number, reply in zip(unclear, asker.ask(self.llm, requests, "categories"), strict=True):
            draft = drafts[number]
            try:
                label = prompts.read_label(_text(reply), self.categories)
            except prompts.BadReply as error:
                draft.plan.decided_by = f"model {self.llm.name}"
                draft.end("failed", f"no category: {error}")
            else:
                draft.plan = self.planner.labelled(draft.turn, number, label)

    def _ask_for_edits(self, drafts: list[Draft], asker: _Asker) -> None:
        """Ask for an edit, and again where it was refused, with the reason."""
        waiting = [draft for draft in drafts if draft.status == "open" and draft.plan.ask]
        if not waiting:
            return
        assert self.llm is not None
        # One category after the other: their prompts begin alike, which the engine computes once.
        waiting.sort(key=lambda draft: (draft.category.order, draft.category.name))
        for attempt in range(1, self.config.ask.attempts + 1):
            requests = [self._edit_request(draft, asker, attempt) for draft in waiting]
            refused = []
            for draft, reply in zip(waiting, asker.ask(self.llm, requests, f"edits, attempt {attempt}"), strict=True):
                draft.attempts, draft.raw = attempt, reply.text
                problem = self._read_edit(draft, reply)
                if problem is not None and attempt < self.config.ask.attempts:
                    draft.rejected = None
                    draft.refused.append(problem)
                    refused.append(draft)
                    continue
                if problem is not None:
                    draft.end("failed", problem)
                asker.advance(1)
            waiting = refused
            if not waiting:
                return

    def _edit_request(self, draft: Draft, asker: _Asker, attempt: int) -> Request:
        category = draft.category
        messages = prompts.edit_messages(category, draft.turn, must_begin=draft.plan.must_begin, refused=draft.refused)
        longer = len(draft.turn.answer) // 2 if category.mode == "rewrite" else 0  # two characters a token at worst
        max_tokens = self.config.ask.max_tokens + longer
        return asker.request(draft, str(attempt - 1), messages, prompts.edit_schema(category), max_tokens)

    def _read_edit(self, draft: Draft, reply: Reply) -> str | None:
        """Take the edit out of a reply; return what is wrong with it, if anything."""
        try:
            text = _text(reply)
            if draft.category.mode == "rewrite":
                draft.rejected, why = prompts.read_rewrite(text)
                draft.edits, draft.why = changed_spans(draft.turn.answer, draft.rejected), [why]
            else:
                operations = prompts.read_edits(text, draft.category)
                draft.rejected, draft.edits = apply(draft.turn.answer, operations)
                draft.why = [operation.why for operation in operations]
        except (prompts.BadReply, CannotEdit) as error:
            return str(error)
        return self._check(draft)

    # Balance

    def _end_torn_trades(self, drafts: list[Draft]) -> None:
        """Undo the other half of a trade where one was refused, until every trade left has both halves."""
        plans = [draft.plan for draft in drafts]
        ended = [draft for draft in drafts if draft.status != "open" and draft.plan.trades]
        while ended:
            draft = ended.pop()
            for trade in list(draft.plan.trades):
                for other in (drafts[number] for number in release(trade, plans)):
                    if other is draft or other.status != "open":
                        continue
                    # What is left of a caption's edits is still a pair, unless somebody has judged it as a whole.
                    judged = any(verdict.name in ("blind", "verifier") for verdict in other.verdicts)
                    keeps_some = other.plan.trades and not other.plan.ask and not judged
                    if keeps_some:
                        self._apply_trades(other)
                    if not keeps_some or other.reason == NO_PARTNER:
                        other.end("partner_lost", PARTNER_LOST)
                    if other.status != "open" and other.plan.trades:
                        ended.append(other)

    # Judges

    def _end_true_answers(self, drafts: list[Draft]) -> None:
        """Refuse a rejected answer that another row gives as the truth for the same image and question.

        About rows in other shards the turn knows hashes.
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
        """Refuse what would be a pair that there is already; return whether there was any."""
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

    def _check_blind(self, drafts: list[Draft], asker: _Asker) -> None:
        """Ask without the image whether both answers could be true; refuse those that could."""
        if not self.config.checks.blind or self.llm is None:
            return
        judged = [draft for draft in drafts if draft.status == "open"]
        requests = []
        for draft in judged:
            messages = prompts.both_messages(draft.turn, str(draft.rejected))
            requests.append(asker.request(draft, "both", messages, prompts.BOTH_SCHEMA, TRUTH_TOKENS))
        for draft, reply in zip(judged, asker.ask(self.llm, requests, "blind check"), strict=True):
            try:
                both = prompts.read_both(_text(reply))
            except prompts.BadReply as error:
                draft.end("failed", f"blind check: {error}")
                continue
            draft.verdicts.append(Verdict("blind", not both))
            if both:
                draft.end("rejected", "blind check: both answers could be true of one image")

    def _verify(self, drafts: list[Draft], asker: _Asker) -> None:
        """Ask twice, with the order swapped: a verifier that likes the first answer best says nothing."""
        if self.verifier is None:
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
                requests.append(asker.request(draft, f"truth|{right}", messages, prompts.TRUTH_SCHEMA, TRUTH_TOKENS))
            replies = asker.ask(self.verifier, requests, "verifier")
            for (draft, _), vote, reply in zip(judged, votes, replies, strict=True):
                try:
                    vote.append(prompts.read_truth(_text(reply)) == right)
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
        assert self.pictures is not None
        try:
            return [self.pictures(image) for image in draft.turn.images]
        except UserError as error:
            draft.end("failed", f"verifier: {error}")
            return None


def _text(reply: Reply) -> str:
    if reply.text is None:
        raise prompts.BadReply(reply.problem or "no text")
    return reply.text
