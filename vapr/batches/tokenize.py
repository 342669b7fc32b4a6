"""A pair -> token ids of each path, processed images, rotary positions: what the model sees at inference.

Tokenizer, image processor and chat template are loaded one by one, because transformers cannot build Qwen's processor
class where torchvision does not import. The results equal ``AutoProcessor``'s (tests/test_processor.py).
"""

import hashlib
from collections.abc import Sequence
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

from vapr.batches.changed_spans import weigh_changes
from vapr.batches.continuation import EndOfTurn, continuation, end_of_turn, eos_tokens
from vapr.batches.heads import PROBED, read_heads
from vapr.batches.image_processor import load_image_processor, resolve_backend, seen_box
from vapr.batches.processed_image import RecentImages, image_key
from vapr.config import TokenWeights
from vapr.data.images import image_name, read_image
from vapr.data.pair import Message, PreferencePair
from vapr.data.rendered import rendered_marker
from vapr.errors import BadRow, UserError, one_line
from vapr.families import FAMILIES, family_name
from vapr.families.family import ModelFiles
from vapr.families.processed_image import Placeholder, ProcessedImage, Run

if TYPE_CHECKING:
    from vapr.batches.second_image import OtherViews


@dataclass(frozen=True, slots=True, eq=False)
class TokenPath:
    """One full token sequence: prompt and one completion."""

    input_ids: np.ndarray  # (tokens,) int64
    position_ids: np.ndarray  # (3, tokens) int64; all three are equal where a family has one axis
    completion_start: int
    token_weights: np.ndarray  # (completion tokens,) float32
    images: tuple[ProcessedImage, ...]
    image_runs: tuple[tuple[Run, ...], ...]  # the placeholders of each image
    blocks: tuple[Run, ...] = ()  # tokens that see one another both ways


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
        self.family = family_name(config)
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
        self._family = FAMILIES[self.family]
        self.files = ModelFiles(model, config, self._settings, self.image_processor, self.tokenizer)
        self.image_token_id = self.files.image_token_id
        self.image_token = self.files.image_token
        self._family.check_files(self.files)
        self._written = self._family.written(self.files)
        try:
            self.eos_token_ids = eos_tokens(model, config, self.tokenizer)
            self._end_of_turn = self._read_end_of_turn(self.eos_token_ids)
            self._heads = read_heads(self.render)
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
        return end_of_turn(self.render(PROBED, add_generation_prompt=False), eos_token_ids, self.tokenizer)

    def _notes(self) -> list[str]:
        notes = []
        if self._heads.differ:
            notes.append(
                f"the chat template asks with {self._heads.asked!r} but writes answers after "
                f"{self._heads.answered!r}; they are scored as asked"
            )
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
            images = [self.process_images(pair.images)] * 2
            if pair.rejected_images is not None:
                images[1] = self.process_images(pair.rejected_images)
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

    def process_images(self, sources: Sequence[Path | bytes]) -> tuple[ProcessedImage, ...]:
        """Process the images of a prompt, as :meth:`process_image` does each."""
        return tuple(self.process_image(source, several=len(sources) > 1) for source in sources)

    def process_image(self, source: Path | bytes, *, several: bool = False) -> ProcessedImage:
        """Decode, turn upright and process one image; the most recent ones are remembered.

        ``several``: it is one of several in its prompt, which matters to some families.

        Pixels are those of the image processor for the picture in its own mode: what becomes of transparency is its
        own to say, and differs between versions of transformers.
        """
        key = image_key(source), several and self._family.differs_among_several
        if (known := self._recent.get(key)) is not None:
            return known
        processed = self.process(read_image(source), image_name(source), several=several)
        self._recent.put(key, processed)
        return processed

    def process(self, image: Image.Image, name: str, *, several: bool = False) -> ProcessedImage:
        """Process a picture that messages call ``name``. Raises UserError if the image processor refuses it."""
        if not getattr(self.image_processor, "do_convert_rgb", False):
            image = image.convert("RGB")
        among = several and self._family.differs_among_several
        process = self._family.process_one_of_several if among else self._family.process
        try:
            pixels, layout = process(self.files, image)
        except ValueError as error:  # e.g. Qwen: aspect ratio above 200
            raise UserError(f"image {name} is refused by the image processor: {one_line(error)}") from None
        pixels = np.ascontiguousarray(pixels)
        content = hashlib.sha256(pixels.data)
        content.update(repr((pixels.shape, layout)).encode())
        left, top, right, bottom = seen_box(self.image_processor, *image.size)
        seen = (right - left) * (bottom - top) / (image.width * image.height)
        stands = self._family.placeholder(self.files, pixels.shape, layout)
        placeholder = stands if isinstance(stands, Placeholder) else None
        num_tokens = stands.num_tokens if isinstance(stands, Placeholder) else stands
        values = torch.from_numpy(pixels).to(self._dtype)
        return ProcessedImage(values, layout, num_tokens, content.hexdigest(), seen, placeholder)

    def expected_image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens that the images of a prompt, of these widths and heights, will be, marks included.

        No image is processed for it.
        """
        among = len(sizes) > 1 and self._family.differs_among_several
        expected = self._family.expected_tokens_of_one_of_several if among else self._family.expected_tokens
        return sum(self._length(expected(self.files, width, height)) for width, height in sizes)

    def _length(self, stands: Placeholder | int) -> int:
        if isinstance(stands, int):
            return stands
        with_one_a_run = self.tokenizer(stands.text, add_special_tokens=False)["input_ids"]
        return len(with_one_a_run) - len(stands.runs) + stands.num_tokens

    def places_for_images(self, prompt: Prompt) -> int:
        """How many images the text of a prompt has a place for."""
        return prompt.text.count(self._written)

    def tokenize_prompt(self, messages: list[Message]) -> Prompt:
        """Render and tokenise what the model is asked. Raises UserError if the template refuses it."""
        text = self.render(messages, add_generation_prompt=True)
        # As transformers does: a template that writes the BOS itself must not get a second one.
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos is not None and text.startswith(bos))
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return Prompt(text, np.array(ids, np.int64), add_special_tokens)

    def with_images(self, prompt: Prompt, images: tuple[ProcessedImage, ...]) -> np.ndarray:
        """The prompt's ids, what stands for each image in the place of what the template wrote.

        Raises:
            UserError: if the prompt has another number of placeholders than there are images.
        """
        ids = prompt.ids
        if (written := self.places_for_images(prompt)) != len(images):
            raise self._miscounted(written, self._written, len(images))
        if self._written != self.image_token and (found := prompt.text.count(self.image_token)):
            raise self._miscounted(found, self.image_token, 0)
        if self._written != self.image_token or any(image.placeholder is not None for image in images):
            # Marks around a run of placeholders may join the text beside them, but its length changes no other token.
            stands = [self.image_token if image.placeholder is None else image.placeholder.text for image in images]
            pieces = prompt.text.split(self._written)
            text = "".join(part for pair in zip(pieces, [*stands, ""], strict=True) for part in pair)
            ids = np.array(self.tokenizer(text, add_special_tokens=prompt.add_special_tokens)["input_ids"], np.int64)
        placeholders = ids == self.image_token_id
        lengths = [length for image in images for length in _run_lengths(image)]
        if placeholders.sum() != len(lengths):
            raise self._miscounted(int(placeholders.sum()), self.image_token, len(lengths))
        times = np.ones(len(ids), np.int64)
        times[placeholders] = lengths
        return ids.repeat(times)

    def _miscounted(self, found: int, token: str, wanted: int) -> UserError:
        return UserError(
            f"the rendered prompt holds {found} '{token}' for {wanted} image(s); remove '{token}' from the row's text"
        )

    def image_runs(self, ids: np.ndarray, images: tuple[ProcessedImage, ...]) -> tuple[tuple[Run, ...], ...]:
        """Where the placeholders of images stand in what :meth:`with_images` returned."""
        places, first, found = np.flatnonzero(ids == self.image_token_id), 0, []
        for image in images:
            runs = []
            for length in _run_lengths(image):
                runs.append((int(places[first]), length))
                first += length
            found.append(tuple(runs))
        return tuple(found)

    def _completion(
        self, pair: PreferencePair, side: str, prompt: Prompt, weights: TokenWeights
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) and weights (tokens,) of one completion."""
        messages = getattr(pair, side)
        full = self._heads.as_asked(self.render([*pair.prompt, *messages], add_generation_prompt=False), prompt.text)
        if not full.startswith(prompt.text):
            raise UserError("the chat template renders the prompt differently once an answer follows it")
        text = full[len(prompt.text) :]
        for token in {self.image_token, self._written}:
            if token in text:
                raise UserError(f"'{side}' contains '{token}'")
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
            weigh_changes(token_weights, pair, side, text, offsets, weights.changed)
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
            after = after.removesuffix(self._heads.asked) + self._heads.answered  # another answer follows there
            before, after = (self._heads.as_asked(text, prompt_text) for text in (before, after))
            spans.append((len(before) - len(prompt_text), len(after) - len(prompt_text)))
        return spans

    def _path(
        self, prompt: Prompt, images: tuple[ProcessedImage, ...], ids: np.ndarray, token_weights: np.ndarray
    ) -> TokenPath:
        prompt_ids = self.with_images(prompt, images)
        input_ids = np.concatenate([prompt_ids, ids])
        runs = self.image_runs(prompt_ids, images)
        positions = self._family.positions(self.files, len(input_ids), images, runs)
        blocks = tuple(run for of_image in runs for run in of_image) if self._family.both_ways else ()
        return TokenPath(input_ids, positions, len(prompt_ids), token_weights, images, runs, blocks)


def _run_lengths(image: ProcessedImage) -> tuple[int, ...]:
    return (image.num_tokens,) if image.placeholder is None else image.placeholder.runs


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
