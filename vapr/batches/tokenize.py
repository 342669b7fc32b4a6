"""A pair -> token ids of each path, processed images, rotary positions: what the model sees at inference.

Tokenizer, image processor and chat template are loaded one by one, because transformers cannot build Qwen's processor
class where torchvision does not import. The results equal ``AutoProcessor``'s (tests/test_processor.py).
"""

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from vapr.batches.continuation import PROBE, EndOfTurn, Offsets, continuation, end_of_turn, eos_tokens
from vapr.batches.image_processor import check_llava, load_image_processor, num_llava_tokens, resolve_backend, seen_box
from vapr.batches.processed_image import ProcessedImage, RecentImages, image_key
from vapr.config import TokenWeights
from vapr.data.images import image_name, read_image
from vapr.data.pair import Message, PreferencePair
from vapr.data.rendered import rendered_marker
from vapr.errors import BadRow, UserError, one_line

if TYPE_CHECKING:
    from vapr.batches.second_image import OtherViews


@dataclass(frozen=True, slots=True, eq=False)
class TokenPath:
    """One full token sequence: prompt and one completion."""

    input_ids: np.ndarray  # (tokens,) int64
    position_ids: np.ndarray  # (3, tokens) int64; LLaVA uses one row, all three are equal
    completion_start: int
    token_weights: np.ndarray  # (completion tokens,) float32
    images: tuple[ProcessedImage, ...]
    image_starts: tuple[int, ...]  # first placeholder of each image


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPair:
    """Chosen and rejected paths of one pair, in that order, and then those that its losses need besides."""

    id: str
    paths: tuple[TokenPath, ...]
    weight: float
    where: str
    number: int = -1  # of its row in the data read
    rendered: str | None = None  # what in its prompt only a chat template writes
    roles: tuple[str, ...] = ()  # of the paths after the first two: some of vapr_kernels.image_losses.OTHER_PATHS
    left_out: tuple[str, ...] = ()  # losses that do not apply to it, each ``kind: reason``
    beta: float | None = None
    margin: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A rendered prompt, with one placeholder an image: whatever its number, what stands around it is the same."""

    text: str
    ids: np.ndarray  # (tokens,) int64
    add_special_tokens: bool  # whether the tokenizer added the BOS, not the template


class Processor:
    """Tokenises prompts and completions and processes images for one model folder or hub id.

    Args:
        model: local folder or hub id.
        config: the model's transformers config.
        image_backend: ``auto`` (torchvision where it imports, else PIL), ``pil`` or ``torchvision``.
        dtype: that pixels are rounded to, which is the policy's.

    Attributes:
        notes: lines on what differs from what one may expect, to be shown to the user once.
        eos_token_ids: tokens at which the model stops.

    Raises:
        UserError: if a file of the model is missing, the files do not fit each other or the backend cannot be had.
    """

    def __init__(
        self,
        model: str,
        config: transformers.PreTrainedConfig,
        image_backend: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        self.family = config.model_type
        self.image_backend = resolve_backend(image_backend)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.image_processor = load_image_processor(model, self.family, self.image_backend)
            self._settings, _ = ProcessorMixin.get_processor_dict(model)
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{model}: tokenizer or image processor does not load ({one_line(error)})") from None
        self.chat_template = _chat_template(model, self._settings.get("chat_template") or self.tokenizer.chat_template)
        self.image_token_id = int(config.image_token_id)
        self.image_token = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        self._vision_config = config.vision_config
        if self.family == "llava":
            check_llava(model, config, self._settings, self.image_processor)
        try:
            self.eos_token_ids = eos_tokens(model, config, self.tokenizer)
            self._end_of_turn = self._read_end_of_turn(self.eos_token_ids)
        except UserError as error:
            raise UserError(f"{model}: {error}") from None
        self.notes = self._notes()
        self.remember_images(512 * 2**20)

    def remember_images(self, maximum_bytes: int) -> None:
        """Keep so many bytes of the most recent processed images, for when they come again."""
        self._recent = RecentImages(maximum_bytes)

    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """The chat template's text, one placeholder an image. Raises UserError if the template refuses the messages."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {one_line(error)}") from None
        assert isinstance(text, str)
        return text

    def _read_end_of_turn(self, eos_token_ids: list[int]) -> EndOfTurn:
        probe = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "What is it?"), ("assistant", PROBE))
        ]
        return end_of_turn(self.render(probe, add_generation_prompt=False), eos_token_ids, self.tokenizer)

    def _notes(self) -> list[str]:
        notes = []
        if (token := self._end_of_turn.token_id) is not None:
            written = f"{self._end_of_turn.template!r}" if self._end_of_turn.template else "nothing"
            named = self.tokenizer.convert_ids_to_tokens(token)
            notes.append(
                f"the chat template ends an answer with {written}; {named} is scored there, where the model stops"
            )
        left, _, right, _ = seen_box(self.image_processor, 640, 480)
        if right - left < 640:
            notes.append(f"the model sees the middle of a picture: of 640 x 480, columns {left} to {right - 1}")
        return notes

    def tokenize_pair(
        self, pair: PreferencePair, weights: TokenWeights | None = None, others: "OtherViews | None" = None
    ) -> TokenizedPair:
        """Token paths of a pair: chosen, rejected, and those that ``others`` asks for.

        The prompt is what ``apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)`` gives. A
        completion is what the model would have to say after it (:mod:`vapr.batches.continuation`), its end of turn
        included.

        Raises:
            BadRow: naming the row, for an image that cannot be used or a text that breaks the template.
        """
        try:
            weights = weights or TokenWeights()
            prompt = self.tokenize_prompt(list(pair.prompt))
            images = [tuple(self.process_image(image) for image in pair.images)] * 2
            if pair.rejected_images is not None:
                images[1] = tuple(self.process_image(image) for image in pair.rejected_images)
            said = {side: self._completion(pair, side, prompt, weights) for side in ("chosen", "rejected")}
            paths = [
                self._path(prompt, shown, *answer) for shown, answer in zip(images, said.values(), strict=True)
            ]  # fmt: skip
            if _same_input(*paths):
                raise UserError("chosen and rejected have the same tokens; there is nothing to prefer")
            views, left_out = others.of(pair, *images) if others is not None else ([], [])
            paths += [self._path(prompt, view.images, *said[view.side]) for view in views]
        except UserError as error:
            named = "" if pair.id == pair.where.rsplit("/", 1)[-1] else f" row '{pair.id}':"
            raise BadRow(f"{pair.where}:{named} {error}") from None
        return TokenizedPair(
            pair.id, tuple(paths), pair.weight, pair.where, pair.number, rendered_marker(pair),
            roles=tuple(view.role for view in views), left_out=tuple(left_out), beta=pair.beta, margin=pair.margin,
        )  # fmt: skip

    def process_image(self, source: Path | bytes) -> ProcessedImage:
        """Decode, turn upright and process one image; the most recent ones are remembered.

        Pixels are those of the image processor for the picture in its own mode: what becomes of transparency is its
        own to say, and differs between versions of transformers.
        """
        key = image_key(source)
        if (known := self._recent.get(key)) is not None:
            return known
        processed = self.process(read_image(source), image_name(source))
        self._recent.put(key, processed)
        return processed

    def process(self, image: Image.Image, name: str) -> ProcessedImage:
        """Process a picture that messages call ``name``. Raises UserError if the image processor refuses it."""
        if not getattr(self.image_processor, "do_convert_rgb", False):
            image = image.convert("RGB")
        try:
            out = self.image_processor(images=[image], return_tensors="np")
        except ValueError as error:  # e.g. Qwen: aspect ratio above 200
            raise UserError(f"image {name} is refused by the image processor: {one_line(error)}") from None
        pixels = np.ascontiguousarray(out["pixel_values"])
        grid = None
        if "image_grid_thw" in out:
            time, height, width = (int(n) for n in out["image_grid_thw"][0])
            grid = (time, height, width)
        content = hashlib.sha256(pixels.data)
        content.update(repr((pixels.shape, grid)).encode())
        left, top, right, bottom = seen_box(self.image_processor, *image.size)
        seen = (right - left) * (bottom - top) / (image.width * image.height)
        num_tokens = self._num_image_tokens(pixels, grid)
        return ProcessedImage(torch.from_numpy(pixels).to(self._dtype), grid, num_tokens, content.hexdigest(), seen)

    def expected_image_tokens(self, width: int, height: int) -> int:
        """Placeholders that an image of this size will get, without processing it."""
        if self.family == "llava":
            side = self._vision_config.image_size
            return self._num_image_tokens(np.empty((side, side)), None)
        patches = int(self.image_processor.get_number_of_image_patches(height, width))
        return patches // self.image_processor.merge_size**2

    def _num_image_tokens(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> int:
        if grid is not None:
            return grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2
        patch_size = self._settings.get("patch_size") or self._vision_config.patch_size
        return num_llava_tokens(self._settings, patch_size, *pixels.shape[-2:])

    def tokenize_prompt(self, messages: list[Message]) -> Prompt:
        """Render and tokenise what the model is asked. Raises UserError if the template refuses it."""
        text = self.render(messages, add_generation_prompt=True)
        # As transformers does: a template that writes the BOS itself must not get a second one.
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos is not None and text.startswith(bos))
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return Prompt(text, np.array(ids, np.int64), add_special_tokens)

    def with_images(self, prompt: Prompt, images: tuple[ProcessedImage, ...]) -> np.ndarray:
        """The prompt's ids, each image's placeholder as often as it has tokens.

        Raises:
            UserError: if the prompt has another number of placeholders than there are images.
        """
        placeholders = prompt.ids == self.image_token_id
        if (written := prompt.text.count(self.image_token)) != len(images) or placeholders.sum() != written:
            raise UserError(
                f"the rendered prompt holds {written} '{self.image_token}' for {len(images)} image(s); "
                f"remove '{self.image_token}' from the row's text"
            )
        times = np.ones(len(prompt.ids), np.int64)
        times[placeholders] = [image.num_tokens for image in images]
        return prompt.ids.repeat(times)

    def _completion(
        self, pair: PreferencePair, side: str, prompt: Prompt, weights: TokenWeights
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) and weights (tokens,) of one completion."""
        messages = getattr(pair, side)
        full = self.render([*pair.prompt, *messages], add_generation_prompt=False)
        if not full.startswith(prompt.text):
            raise UserError("the chat template renders the prompt differently once an answer follows it")
        text = full[len(prompt.text) :]
        if self.image_token in text:
            raise UserError(f"'{side}' contains '{self.image_token}'")
        text = self._end_of_turn.of(text)
        said, offsets = continuation(
            self.tokenizer, prompt.ids, prompt.text, text, add_special_tokens=prompt.add_special_tokens
        )
        if self._end_of_turn.token_id is not None:
            said, offsets = [*said, self._end_of_turn.token_id], [*offsets, (len(text), len(text))]
        ids = np.array(said, np.int64)
        if len(ids) == 0:
            raise UserError(f"'{side}' has no tokens")
        token_weights = np.full(len(ids), weights.unchanged, np.float32)
        if weights.changed != weights.unchanged:
            self._weigh_changes(token_weights, pair, side, text, offsets, weights.changed)
        for begin, end in self._user_turns(pair, messages, prompt.text):
            for n, (first, last) in enumerate(offsets):
                if first < end and last > begin:
                    token_weights[n] = 0.0
        return ids, token_weights

    def _user_turns(
        self, pair: PreferencePair, messages: tuple[Message, ...], prompt_text: str
    ) -> list[tuple[int, int]]:
        """Character ranges of a completion of several turns that the user, not the model, is to say."""
        spans = []
        for n in range(1, len(messages), 2):
            before = self.render([*pair.prompt, *messages[:n]], add_generation_prompt=False)
            after = self.render([*pair.prompt, *messages[: n + 1]], add_generation_prompt=True)
            spans.append((len(before) - len(prompt_text), len(after) - len(prompt_text)))
        return spans

    def _weigh_changes(
        self, token_weights: np.ndarray, pair: PreferencePair, side: str, text: str, offsets: Offsets,
        changed: float,
    ) -> None:  # fmt: skip
        """Give the tokens of the edit their weight. ``text`` is the rendered completion, ``offsets`` its tokens'."""
        messages = getattr(pair, side)
        answer = "".join(part["text"] for part in messages[0]["content"])
        begin = max(text.find(answer.strip()) - (len(answer) - len(answer.lstrip())), 0)
        for start, end in changed_spans(pair, side):
            for n, (first, last) in enumerate(offsets):
                if first < begin + end and last > begin + start:
                    token_weights[n] = changed

    def _path(
        self, prompt: Prompt, images: tuple[ProcessedImage, ...], ids: np.ndarray, token_weights: np.ndarray
    ) -> TokenPath:
        prompt_ids = self.with_images(prompt, images)
        input_ids = np.concatenate([prompt_ids, ids])
        first = np.cumsum([0, *(image.num_tokens for image in images)])[:-1]
        starts = tuple(np.flatnonzero(prompt_ids == self.image_token_id)[first].tolist()) if images else ()
        merge = 1 if self.family == "llava" else self.image_processor.merge_size
        positions = rotary_positions(len(input_ids), images, starts, merge)
        return TokenPath(input_ids, positions, len(prompt_ids), token_weights, images, starts)


def _chat_template(model: str, found: Any) -> str:
    """The template; of several named ones that called ``default``, as transformers takes it."""
    if isinstance(found, dict) and "default" not in found:
        raise UserError(f"{model}: none of its chat templates is called 'default' (there are {', '.join(found)})")
    template = found["default"] if isinstance(found, dict) else found
    if not template:
        raise UserError(f"{model}: no chat template (chat_template.jinja or tokenizer_config.json)")
    return str(template)


def _same_input(chosen: TokenPath, rejected: TokenPath) -> bool:
    same_images = [image.content_hash for image in chosen.images] == [image.content_hash for image in rejected.images]
    return same_images and np.array_equal(chosen.input_ids, rejected.input_ids)


def rotary_positions(
    num_tokens: int, images: tuple[ProcessedImage, ...], image_starts: tuple[int, ...], merge_size: int
) -> np.ndarray:
    """Positions in time, height and width, shape (3, tokens): Qwen2-VL's M-RoPE (arXiv 2409.12191, section 2.1).

    Text advances all three by one a token. An image's tokens take its grid's coordinates from where the text stopped,
    and the text goes on after the largest of them. Without grids (LLaVA) this is plain counting.
    """
    positions = np.empty((3, num_tokens), np.int64)
    token, position = 0, 0
    for image, start in zip(images, image_starts, strict=True):
        if image.grid_thw is None:
            continue
        positions[:, token:start] = position + np.arange(start - token)
        position += start - token
        time, height, width = image.grid_thw
        grid = np.indices((time, height // merge_size, width // merge_size)).reshape(3, -1)
        positions[:, start : start + image.num_tokens] = position + grid
        position += max(height, width) // merge_size
        token = start + image.num_tokens
    positions[:, token:] = position + np.arange(num_tokens - token)
    return positions


def changed_spans(pair: PreferencePair, side: str) -> list[tuple[int, int]]:
    """Character ranges of a completion that the edit changed: the row's ``edits``, or else a word-level diff."""
    texts = ["".join(part["text"] for part in messages[0]["content"]) for messages in (pair.chosen, pair.rejected)]
    spans = {"chosen": [], "rejected": []}  # type: dict[str, list[tuple[int, int]]]
    if pair.edits:
        shift = 0
        for edit in sorted(pair.edits, key=lambda edit: edit.start):
            spans["chosen"].append((edit.start, edit.end))
            spans["rejected"].append((edit.start + shift, edit.start + shift + len(edit.to)))
            shift += len(edit.to) - (edit.end - edit.start)
        return spans[side]
    words = [list(re.finditer(r"\s+|\w+|[^\w\s]", text)) for text in texts]
    before, after = ([word[0] for word in line] for line in words)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for operation, *bounds in matcher.get_opcodes():
        if operation == "equal":
            continue
        for name, line, (first, last) in zip(spans, words, (bounds[:2], bounds[2:]), strict=True):
            if first < last:
                spans[name].append((line[first].start(), line[last - 1].end()))
    return spans[side]
