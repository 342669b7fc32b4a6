"""A pair -> token ids of each path, processed images, rotary positions: what the model sees at inference.

Tokenizer, image processor and chat template are loaded one by one, because transformers cannot build Qwen's processor
class where torchvision does not import. The results equal ``AutoProcessor``'s (tests/test_processor.py).
"""

import difflib
import hashlib
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin

from vapr.config import TokenWeights
from vapr.errors import BadRow, UserError, one_line
from vapr.images import image_name, read_image
from vapr.preference_pair import Message, PreferencePair


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ProcessedImage:
    """One image as the model takes it."""

    pixel_values: np.ndarray  # Qwen: (patches, values); LLaVA: (1, 3, height, width)
    grid_thw: tuple[int, int, int] | None  # Qwen: patches in time, height, width
    num_tokens: int  # placeholders in the prompt, features out of the projector
    content_hash: str  # sha256 of the pixels and the grid


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
    """Chosen and rejected paths of one pair, in that order."""

    id: str
    paths: tuple[TokenPath, ...]
    weight: float
    where: str
    number: int = -1  # of its row in the data read


class Processor:
    """Tokenises prompts and completions and processes images for one model folder or hub id.

    Args:
        model: local folder or hub id.
        config: the model's transformers config.
        image_backend: ``auto`` (torchvision where it imports, else PIL), ``pil`` or ``torchvision``.

    Raises:
        UserError: if a file of the model is missing or the backend cannot be had.
    """

    def __init__(self, model: str, config: transformers.PreTrainedConfig, image_backend: str = "auto") -> None:
        self.family = config.model_type
        self.image_backend = _resolve_backend(image_backend)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.image_processor = _load_image_processor(model, self.image_backend)
            self._settings, _ = ProcessorMixin.get_processor_dict(model)
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{model}: tokenizer or image processor does not load ({one_line(error)})") from None
        self.chat_template = self._settings.get("chat_template") or self.tokenizer.chat_template
        if not self.chat_template:
            raise UserError(f"{model}: no chat template (chat_template.jinja or tokenizer_config.json)")
        self.image_token_id = int(config.image_token_id)
        self.image_token = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        self._vision_config = config.vision_config
        self.remember_images(512 * 2**20)

    def remember_images(self, maximum_bytes: int) -> None:
        """Keep so many bytes of the most recent processed images, for when they come again."""
        self._recent = _RecentImages(maximum_bytes)

    def render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """The chat template's text, image placeholders not yet repeated."""
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text

    def tokenize_pair(self, pair: PreferencePair, weights: TokenWeights | None = None) -> TokenizedPair:
        """Token paths of a pair.

        The prompt is what ``apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)`` gives; a
        completion is the rest of the rendered conversation, tokenised without special tokens.

        Raises:
            BadRow: naming the row, for an image that cannot be used or a text that breaks the template.
        """
        try:
            weights = weights or TokenWeights()
            prompt_text = self.render(list(pair.prompt), add_generation_prompt=True)
            images = [tuple(self.process_image(image) for image in pair.images)] * 2
            prompts = [self._prompt_ids(prompt_text, images[0])] * 2
            if pair.rejected_images is not None:
                images[1] = tuple(self.process_image(image) for image in pair.rejected_images)
                prompts[1] = self._prompt_ids(prompt_text, images[1])
            paths = tuple(
                self._path(prompt_ids, shown, *self._completion(pair, side, prompt_text, weights))
                for side, prompt_ids, shown in zip(("chosen", "rejected"), prompts, images, strict=True)
            )
            if _same_input(*paths):
                raise UserError("chosen and rejected have the same tokens; there is nothing to prefer")
        except UserError as error:
            named = "" if pair.id == pair.where.rsplit("/", 1)[-1] else f" row '{pair.id}':"
            raise BadRow(f"{pair.where}:{named} {error}") from None
        return TokenizedPair(pair.id, paths, pair.weight, pair.where, pair.number)

    def process_image(self, source: Path | bytes) -> ProcessedImage:
        """Decode, turn upright, convert to RGB and process one image; the most recent ones are remembered."""
        key = _image_key(source)
        if (known := self._recent.get(key)) is not None:
            return known
        image = read_image(source)
        try:
            out = self.image_processor(images=[image], return_tensors="np")
        except ValueError as error:  # e.g. Qwen: aspect ratio above 200
            name = image_name(source)
            raise UserError(f"image {name} is refused by the image processor: {one_line(error)}") from None
        pixels = np.ascontiguousarray(out["pixel_values"])
        grid = None
        if "image_grid_thw" in out:
            time, height, width = (int(n) for n in out["image_grid_thw"][0])
            grid = (time, height, width)
        content = hashlib.sha256(pixels.data)
        content.update(repr((pixels.shape, grid)).encode())
        processed = ProcessedImage(pixels, grid, self._num_image_tokens(pixels, grid), content.hexdigest())
        self._recent.put(key, processed)
        return processed

    def _num_image_tokens(self, pixels: np.ndarray, grid: tuple[int, int, int] | None) -> int:
        if grid is not None:
            return grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2
        # The rule of LlavaProcessor: one token a patch, plus the CLS token unless the strategy drops it.
        patch_size = self._settings.get("patch_size") or self._vision_config.patch_size
        height, width = pixels.shape[-2:]
        extra = self._settings.get("num_additional_image_tokens", 0)
        dropped = self._settings.get("vision_feature_select_strategy") == "default"
        return (height // patch_size) * (width // patch_size) + extra - int(dropped)

    def _prompt_ids(self, text: str, images: tuple[ProcessedImage, ...]) -> np.ndarray:
        pieces = text.split(self.image_token)
        if len(pieces) - 1 != len(images):
            raise UserError(
                f"the rendered prompt holds {len(pieces) - 1} '{self.image_token}' for {len(images)} image(s); "
                f"remove '{self.image_token}' from the row's text"
            )
        repeated = [self.image_token * image.num_tokens for image in images]
        expanded = "".join(piece + token for piece, token in zip(pieces, [*repeated, ""], strict=True))
        # As transformers does: a template that writes the BOS itself must not get a second one.
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos is not None and expanded.startswith(bos))
        return np.array(self.tokenizer(expanded, add_special_tokens=add_special_tokens)["input_ids"], np.int64)

    def _completion(
        self, pair: PreferencePair, side: str, prompt_text: str, weights: TokenWeights
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) and weights (tokens,) of one completion."""
        messages = getattr(pair, side)
        full = self.render([*pair.prompt, *messages], add_generation_prompt=False)
        if not full.startswith(prompt_text):
            raise UserError("the chat template renders the prompt differently once an answer follows it")
        text = full[len(prompt_text) :]
        if self.image_token in text:
            raise UserError(f"'{side}' contains '{self.image_token}'")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], np.int64)
        if len(ids) == 0:
            raise UserError(f"'{side}' has no tokens")
        token_weights = np.full(len(ids), weights.unchanged, np.float32)
        if weights.changed != weights.unchanged:
            self._weigh_changes(token_weights, pair, side, text, encoded["offset_mapping"], weights.changed)
        for begin, end in self._user_turns(pair, messages, prompt_text):
            for n, (first, last) in enumerate(encoded["offset_mapping"]):
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
        self, token_weights: np.ndarray, pair: PreferencePair, side: str, text: str, offsets: list[tuple[int, int]],
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
        self, prompt_ids: np.ndarray, images: tuple[ProcessedImage, ...], ids: np.ndarray, token_weights: np.ndarray
    ) -> TokenPath:
        input_ids = np.concatenate([prompt_ids, ids])
        placeholders = np.flatnonzero(prompt_ids == self.image_token_id)
        counts = [image.num_tokens for image in images]
        if len(placeholders) != sum(counts):
            raise UserError(f"{len(placeholders)} image tokens for {sum(counts)} image features")
        starts = tuple(int(placeholders[n]) for n in np.cumsum([0, *counts])[:-1]) if images else ()
        merge = 1 if self.family == "llava" else self.image_processor.merge_size
        positions = rotary_positions(len(input_ids), images, starts, merge)
        return TokenPath(input_ids, positions, len(prompt_ids), token_weights, images, starts)


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


class _RecentImages:
    """Processed images by source, the least recently used dropped first. Threads of the loader share it."""

    def __init__(self, maximum_bytes: int) -> None:
        self._maximum_bytes = maximum_bytes
        self._num_bytes = 0
        self._images: OrderedDict[object, ProcessedImage] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> ProcessedImage | None:
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
            return None

    def put(self, key: object, image: ProcessedImage) -> None:
        with self._lock:
            if key not in self._images:
                self._images[key] = image
                self._num_bytes += image.pixel_values.nbytes
            while self._num_bytes > self._maximum_bytes and len(self._images) > 1:
                _, dropped = self._images.popitem(last=False)
                self._num_bytes -= dropped.pixel_values.nbytes


def _image_key(source: Path | bytes) -> object:
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    try:
        stat = source.stat()
    except OSError as error:
        raise UserError(f"image {source} cannot be read: {one_line(error)}") from None
    return str(source), stat.st_size, stat.st_mtime_ns


def _resolve_backend(wanted: str) -> str:
    if wanted == "pil":
        return wanted
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        if wanted == "torchvision":
            raise UserError(f"data.image_backend: torchvision does not import ({one_line(error)})") from None
        return "pil"
    return "torchvision"


def _load_image_processor(model: str, backend: str) -> Any:
    if backend == "torchvision":
        return AutoImageProcessor.from_pretrained(model, backend=backend, trust_remote_code=False)
    # By class: the auto class of transformers 5.17 wants torchvision even for its PIL processors.
    settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
    name = settings.get("image_processor_type", "").removesuffix("Fast").removesuffix("Pil") + "Pil"
    if not hasattr(transformers, name):
        raise UserError(f"{model}: transformers has no PIL version of its image processor; install torchvision")
    return getattr(transformers, name).from_pretrained(model)
