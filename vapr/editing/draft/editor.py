"""Edits the turns of one shard: plan, ask the language model, apply, check, ask again, and keep trades in balance."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from vapr.editing.config import EditConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.asker import Asker, Tokens, text_of
from vapr.editing.draft.candidates import SAME_CANDIDATE, choose
from vapr.editing.draft.checks import Verdict, check_pair
from vapr.editing.draft.draft import RULES, Draft
from vapr.editing.draft.judges import Judges
from vapr.editing.draft.mix import Mix
from vapr.editing.draft.own_checks import NO_VERDICT, NoVerdict, OwnChecks
from vapr.editing.draft.trades import NO_PARTNER, PARTNER_LOST, Planner, release
from vapr.editing.rules.agreement import CannotEdit
from vapr.editing.rules.categories import Categories
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.operations import apply, changed_spans
from vapr.editing.rules.turns import Turn, answer_hash, bare
from vapr.llm.request import LanguageModel, Reply, Request
from vapr.progress import Display

SAME_PAIR = "another pair has the same images, prompt and rejected answer"
TRUE_HERE = "another row gives the edited answer as the truth of this image"
LABEL_TOKENS = 64


class Editor:
    """Makes drafts of turns; one for each process.

    Args:
        config: the settings of the job.
        categories: the categories of the job.
        llm: the language model, or several that share the turns; None edits by rules alone.
        verifier: a model that looks at the image; None: nobody does.
        pictures: gives an image source as a data URI, for the verifier.
        judge: a model that gives candidates points; None: the one that has made them.
        own_checks: the user's own checks; None: there are none.
        note_counted: called with who was ``asked_for``, once its cost is written down; None: no replies are kept.
    """

    def __init__(
        self, config: EditConfig, categories: Categories, llm: LanguageModel | Mix | None = None,
        verifier: LanguageModel | None = None, pictures: Callable[[Path | bytes], str] | None = None,
        judge: LanguageModel | None = None, own_checks: OwnChecks | None = None,
        note_counted: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.categories = categories
        self.mix = llm if llm is None or isinstance(llm, Mix) else Mix([(llm, 1.0)])
        self.own_checks = own_checks
        self.note_counted = note_counted
        self.nouns = Nouns(Path(config.checks.wordnet) if config.checks.wordnet else None)
        self.planner = Planner(categories, self.nouns, config.plan.balance, has_model=llm is not None)
        self._judges = Judges(config, self._llm_of, verifier, pictures, judge)
        self._models = {model.name: model for model in self.mix.models} if self.mix else {}
        who = self.mix.identity if self.mix else {"name": RULES, "revision": None, "engine": None}
        self.identity = {
            **who,
            "prompt_hash": prompts.prompt_hash(categories, config.ask.rubric),
            "seed": config.seed,
            "temperature": config.ask.temperature if self.mix else None,
        }
        """Who edits, for provenance."""

    def _llm_of(self, draft: Draft) -> LanguageModel | None:
        return self._models[draft.model] if draft.model is not None else None

    def _draft(self, turn: Turn, number: int) -> Draft:
        model = self.mix.of(turn).name if self.mix else None
        return Draft(turn, self.planner.by_rules(turn, number), model=model)

    def edit(
        self, turns: Sequence[Turn], shard: str, display: Display | None = None,
        published: Callable[[], AbstractSet[int]] = frozenset, round: int = 0, asked_for: str = "",
    ) -> tuple[list[Draft], dict[str, Tokens]]:  # fmt: skip
        """Make a draft of each turn, in their order, each accepted, rejected or failed.

        Args:
            turns: the turns of one shard.
            shard: its name; with the job's seed it decides trades.
            display: shows progress.
            published: gives the identities of pairs that are written already; no draft becomes one of them again.
            round: how often these turns were through before; with the job's seed it decides the model's sampling.
            asked_for: who counts what the model costs; what the same one has paid for in an earlier start counts, too.

        Returns:
            The drafts, and what each model has cost, by its name.
        """
        asker = Asker(self.config, round, display, asked_for)
        drafts = [self._draft(turn, number) for number, turn in enumerate(turns)]
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
        ready = [one for draft in drafts if draft.status == "open" for one in draft.candidates or [draft]]
        self._end_true_answers(drafts, ready)
        self._judges.check_blind(ready, asker)
        self._judges.verify(ready, asker)
        self._judges.give_points(drafts, asker)
        choose(drafts)
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
        try:
            if problem := self._check(draft):
                draft.end("rejected", problem)
        except NoVerdict as error:
            draft.end("failed", f"{NO_VERDICT}: {error}")

    def _check(self, draft: Draft) -> str | None:
        """Check a draft that has been edited; return what is wrong with it, if anything.

        Raises:
            NoVerdict: if the user's own check says nothing about it.
        """
        assert draft.rejected is not None
        answer, checks, traded = draft.turn.answer, self.config.checks, not draft.plan.ask
        draft.verdicts = check_pair(
            answer, draft.rejected, draft.edits, draft.category, checks, self.nouns, traded=traded,
            question=draft.turn.question,
        )  # fmt: skip
        if self.own_checks is not None and all(verdict.passed for verdict in draft.verdicts):
            draft.verdicts += self.own_checks.judge(draft.turn, draft.rejected, draft.edits, draft.category)
        return next((f"{verdict.name}: {verdict.note}" for verdict in draft.verdicts if not verdict.passed), None)

    # The language model

    def _label(self, drafts: list[Draft], asker: Asker) -> None:
        """Ask for the category of turns that no rule fits."""
        schema = prompts.label_schema(self.categories)
        unclear, asked = [], []
        for number, draft in enumerate(drafts):
            llm = self._llm_of(draft)
            if draft.plan.category is None and not draft.plan.reason and llm is not None:
                messages = prompts.label_messages(self.categories, draft.turn)
                unclear.append(number)
                asked.append((llm, asker.request(draft, "label", messages, schema, LABEL_TOKENS)))
        for number, reply in zip(unclear, asker.ask_each(asked, "categories"), strict=True):
            draft = drafts[number]
            decided_by = f"model {draft.model}"
            try:
                label = prompts.read_label(text_of(reply), self.categories)
            except prompts.BadReply as error:
                draft.plan.decided_by = decided_by
                draft.end("failed", f"no category: {error}")
            else:
                draft.plan = self.planner.labelled(draft.turn, number, label, decided_by)

    def _ask_for_edits(self, drafts: list[Draft], asker: Asker) -> None:
        """Ask for candidates, and again where all were refused, with the reason."""
        waiting = [draft for draft in drafts if draft.status == "open" and draft.plan.ask]
        # One category after the other: their prompts begin alike, which the engine computes once.
        waiting.sort(key=lambda draft: (draft.category.order, draft.category.name))
        for attempt in range(1, self.config.ask.attempts + 1):
            if not waiting:
                return
            asked = [
                (draft, number, self.edit_request(draft, asker, attempt, number))
                for draft in waiting
                for number in range(self.config.ask.candidates)
            ]
            requests = [(self._models[str(draft.model)], request) for draft, _, request in asked]
            replies = asker.ask_each(requests, f"edits, attempt {attempt}")
            for (draft, _, _), reply in zip(asked, replies, strict=True):
                draft.attempts = attempt
                draft.candidates.append(self._candidate(draft, reply))
            refused = []
            for draft in waiting:
                new = draft.candidates[-self.config.ask.candidates :]
                again = all(candidate.status != "open" for candidate in new) and attempt < self.config.ask.attempts
                if again and (problem := next((one.reason for one in new if one.status == "refused"), None)):
                    draft.refused.append(problem)
                    refused.append(draft)
                    continue
                asker.advance(1)
            waiting = refused

    def edit_request(self, draft: Draft, asker: Asker, attempt: int = 1, number: int = 0) -> Request:
        """Return what the language model is asked for.

        Args:
            draft: of a turn whose plan asks for an edit.
            asker: gives the seed.
            attempt: from 1.
            number: of the candidate, from 0.
        """
        category = draft.category
        messages = prompts.edit_messages(category, draft.turn, must_begin=draft.plan.must_begin, refused=draft.refused)
        longer = len(draft.turn.answer) // 2 if category.mode == "rewrite" else 0  # two characters a token at worst
        max_tokens = self.config.ask.max_tokens + longer
        purpose = f"{attempt - 1}|{number}" if number else str(attempt - 1)
        return asker.request(draft, purpose, messages, prompts.edit_schema(category), max_tokens)

    def _candidate(self, draft: Draft, reply: Reply) -> Draft:
        """Take the edit out of a reply: open if it passes the checks, else refused, or failed if nobody can say."""
        candidate = Draft(draft.turn, draft.plan, attempts=draft.attempts, raw=reply.text, model=draft.model)
        try:
            if problem := self._read_edit(candidate, reply):
                candidate.end("refused", problem)
        except NoVerdict as error:
            candidate.end("failed", f"{NO_VERDICT}: {error}")
        known = {other.rejected for other in draft.candidates if other.status == "open"}
        if candidate.status == "open" and candidate.rejected in known:
            candidate.end("same", SAME_CANDIDATE)
        return candidate

    def _read_edit(self, draft: Draft, reply: Reply) -> str | None:
        """Take the edit out of a reply; return what is wrong with it, if anything. Raises NoVerdict."""
        try:
            text = text_of(reply)
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

    # Answers that stand elsewhere

    @staticmethod
    def _end_true_answers(drafts: Sequence[Draft], ready: Sequence[Draft]) -> None:
        """Refuse a rejected answer that another row gives as the truth for the same image and question.

        About rows in other shards the turn knows hashes.

        Args:
            drafts: of the shard.
            ready: those that may become pairs, or the candidates for it.
        """
        answers: dict[tuple[Any, str], set[str]] = defaultdict(set)
        for draft in drafts:
            answers[draft.turn.images, draft.turn.question].add(bare(draft.turn.answer))
        for draft in ready:
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
