"""Makes pairs whose answer stays and whose picture changes, by rules alone: the counterpart of the text editor."""

import hashlib
import io
import os
import random
import re
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from PIL import Image

from vapr.cache import written_whole
from vapr.data.images import as_rgb, image_size, read_image
from vapr.editing.config import EditConfig, PictureConfig
from vapr.editing.draft import prompts
from vapr.editing.draft.asker import Tokens
from vapr.editing.draft.checks import Verdict
from vapr.editing.draft.draft import RULES, Draft, Picture
from vapr.editing.draft.mix import Mix
from vapr.editing.draft.picture_changes import Changed, blurred, cropped, masked
from vapr.editing.draft.picture_swaps import Swaps
from vapr.editing.draft.trades import Plan, Planner
from vapr.editing.rules.boxes import Box, CannotPlace, region_of
from vapr.editing.rules.categories import Categories, Category
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.turns import Turn
from vapr.errors import UserError
from vapr.progress import Display

IMAGES = "images"
"""Folder of the new pictures, in that of the job."""

NO_OTHER = "no other picture about the same thing"
DENIES = "the answer denies something, which a picture with less in it does not refute"
DENIAL = re.compile(
    r"\b(no|not|none|nobody|nothing|nowhere|never|neither|nor|without|cannot)\b|n['’]t\b", re.IGNORECASE
)
NO_REST = "nothing is left beside the region of the answer"
UNCHANGED = "the change does not show"

KINDS = {
    "crop": "a part of the picture without the region of the answer",
    "mask": "the region of the answer is painted over",
    "blur": "the region of the answer is blurred",
    "other": "a picture in which something else is true of the same thing",
}
"""What each kind of ``picture.change`` shows in place of the picture."""


def _category(kind: str, shown: str, order: int) -> Category:
    name = "other-picture" if kind == "other" else kind
    return Category(name=name, title=shown, order=order, change=shown, keep="", min_edits=1, max_edits=1)


class PictureEditor:
    """Makes drafts of turns; one for each process. Its interface is that of :class:`vapr.editing.draft.editor.Editor`.

    Args:
        config: the settings of the job, with its section ``picture``.
        categories: of the job; they find what answers claim.
        folder: of the job, for new pictures; None: they are made, and not kept.
    """

    mix: Mix | None = None

    def __init__(self, config: EditConfig, categories: Categories, folder: Path | None) -> None:
        assert config.picture is not None
        self.config = config
        self._picture: PictureConfig = config.picture
        self._folder = folder
        self._nouns = Nouns(Path(config.checks.wordnet) if config.checks.wordnet else None)
        self._planner = Planner(categories, self._nouns, "swap", has_model=False)
        self._kinds = {kind: _category(kind, shown, order) for order, (kind, shown) in enumerate(KINDS.items())}
        self.categories = Categories(list(self._kinds.values()))
        self.identity = {
            "name": RULES, "revision": None, "engine": None, "prompt_hash": prompts.prompt_hash(categories),
            "seed": config.seed, "temperature": None,
        }  # fmt: skip
        """Who edits, for provenance."""

    def edit(
        self, turns: Sequence[Turn], shard: str, display: Display | None = None,
        published: Callable[[], AbstractSet[int]] = frozenset, round: int = 0,
    ) -> tuple[list[Draft], dict[str, Tokens]]:  # fmt: skip
        """Make a draft of each turn, in their order, each accepted, rejected or failed.

        Each turn has the kinds of change in an order of its own, drawn by the job's seed, and gets the first that can
        be made. Turns that wait for another row's picture are paired with one another, so that each picture is as often
        chosen as rejected.

        Args:
            turns: the turns of one shard.
            shard: its name; with the job's seed it decides who swaps pictures with whom.
            display: shows progress.
            published: not asked for: no two turns of a job have the same images, prompt and answer.
            round: not asked for: nothing is sampled.
        """
        drafts = [Draft(turn) for turn in turns]
        swaps = Swaps(self._planner, turns) if "other" in self._picture.change else None
        orders = [self._order(turn) for turn in turns]
        reasons: list[list[str]] = [[] for _ in turns]

        def advance() -> None:
            if display is not None:
                display.advance("", 1)

        waiting = []
        for number, draft in enumerate(drafts):
            if self._own_pictures_can_be_read(draft) and self._try(draft, orders[number], reasons[number]):
                waiting.append(number)
            else:
                advance()
        attempt = 0
        while waiting:
            assert swaps is not None
            partners = swaps.match(waiting, f"{self.config.seed}|{shard}|{attempt}")
            for number in waiting:
                if number in partners:
                    self._show_another(drafts[number], turns[partners[number]], swaps.claims[number].decided_by)
                else:
                    orders[number].pop(0)
                    reasons[number].append(swaps.reasons.get(number, NO_OTHER))
            left = [number for number in waiting if number not in partners]
            waiting = [number for number in left if self._try(drafts[number], orders[number], reasons[number])]
            attempt += 1
            for _ in range(len(partners) + len(left) - len(waiting)):
                advance()
        for draft, tried in zip(drafts, reasons, strict=True):
            if draft.status == "open":
                draft.end("rejected", tried[0])
        return drafts, {}

    def _order(self, turn: Turn) -> list[str]:
        kinds: list[str] = list(dict.fromkeys(self._picture.change))
        random.Random(f"{self.config.seed}|{turn.digest()}").shuffle(kinds)
        return kinds

    def _own_pictures_can_be_read(self, draft: Draft) -> bool:
        try:
            for image in draft.turn.images:
                image_size(image)
        except UserError as error:
            draft.end("failed", str(error))
            return False
        return True

    def _try(self, draft: Draft, kinds: list[str], reasons: list[str]) -> bool:
        """Make the first change that can be made; return whether the turn waits for another row's picture instead."""
        while kinds and draft.status == "open":
            if kinds[0] == "other":
                return True
            try:
                self._change(draft, kinds[0])
            except CannotPlace as problem:
                reasons.append(str(problem))
                kinds.pop(0)
        return False

    def _change(self, draft: Draft, kind: str) -> None:
        turn, config = draft.turn, self._picture
        if DENIAL.search(turn.answer):
            raise CannotPlace(DENIES)
        if len(turn.images) != 1:
            raise CannotPlace(f"boxes are of one picture, and this row shows {len(turn.images)}")
        [image] = turn.images
        boxes = region_of(turn, image_size(image), self._nouns, order=config.boxes, relative=config.relative)
        try:
            picture = as_rgb(read_image(image))
        except UserError as error:  # its header could be read
            draft.end("failed", str(error))
            return
        changed = self._changed(picture, boxes, kind)
        if changed.share == 0:
            raise CannotPlace(UNCHANGED)
        least, most = config.changed
        if not least <= changed.share <= most:
            side = "less" if changed.share < least else "more"
            raise CannotPlace(f"{side} of the picture would change than picture.changed allows: {changed.share:.3f}")
        verdict = Verdict("changed", True, round(changed.share, 4), "of the picture's pixels")
        self._accept(draft, kind, f"picture:{kind}", (self._kept(changed.picture),), verdict)
        assert draft.picture is not None
        draft.picture.plan["boxes"] = [list(box) for box in boxes]

    @staticmethod
    def _changed(picture: Image.Image, boxes: Sequence[Box], kind: str) -> Changed:
        if kind == "mask":
            return masked(picture, boxes)
        if kind == "blur":
            return blurred(picture, boxes)
        changed = cropped(picture, boxes)
        if changed is None:
            raise CannotPlace(NO_REST)
        return changed

    def _show_another(self, draft: Draft, other: Turn, decided_by: str) -> None:
        images = tuple(
            self._written(image, ".img") if isinstance(image, bytes) else Path(os.path.abspath(image))
            for image in other.images
        )
        verdict = Verdict("other_value", True, None, f"the other picture's answer: {other.answer:.200}")
        self._accept(draft, "other", decided_by, images, verdict)
        assert draft.picture is not None
        draft.picture.plan["of"] = {"place": other.where, "turn": other.number}

    def _accept(self, draft: Draft, kind: str, decided_by: str, images: tuple[Path, ...], verdict: Verdict) -> None:
        draft.plan = Plan(self._kinds[kind], decided_by)
        draft.rejected, draft.status = draft.turn.answer, "accepted"
        draft.picture = Picture(images, {"change": kind})
        draft.verdicts = [verdict]
        draft.why = [KINDS[kind]]

    # Files

    def _kept(self, picture: Image.Image) -> Path:
        file, quality = io.BytesIO(), self._picture.jpeg
        if quality is None:
            picture.save(file, "PNG")
        else:
            picture.save(file, "JPEG", quality=quality)
        return self._written(file.getvalue(), ".png" if quality is None else ".jpg")

    def _written(self, content: bytes, suffix: str) -> Path:
        """Write a picture under the name of its content; one that is there is left alone."""
        name = f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        if self._folder is None:
            return Path(name)
        path = Path(os.path.abspath(self._folder)) / IMAGES / name
        if not path.exists():
            with written_whole(path) as file:
                file.write(content)
        elif path.read_bytes() != content:
            raise UserError(f"{path}: is not the picture that its name stands for; delete it to have it made again")
        return path
