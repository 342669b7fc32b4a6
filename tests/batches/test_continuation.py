"""Completion ids are those of the whole conversation as one text, cut where the prompt ends; the model's stop is one."""

import dataclasses
import functools
import json
import random
import shutil

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from tokenizers import pre_tokenizers

from tests import oracles, real_tokenizers
from tests.batches.test_tokenize import text_pair
from vapr.batches.continuation import continuation
from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor
from vapr.cli import main
from vapr.config import TokenWeights
from vapr.data.images import read_image
from vapr.errors import UserError


def processor_of(folder) -> Processor:
    return Processor(str(folder), transformers.AutoConfig.from_pretrained(folder), "pil")


@functools.cache
def their_processor(folder, family: str) -> transformers.ProcessorMixin:
    return oracles.hugging_face_processor(folder, family)


def whole_conversation(folder, family: str, pair, side: str) -> list[int]:
    """The conversation as one text through transformers' own processor; llava-hf's last space is the model's stop."""
    theirs = their_processor(folder, family)
    messages = [*pair.prompt, *getattr(pair, side)]
    text = theirs.apply_chat_template(messages, tokenize=False)
    if family == "llava":
        assert text.endswith(" ")
        text = text[:-1] + "</s>"
    images = [read_image(image) for image in pair.images]
    return theirs(text=[text], images=images or None)["input_ids"][0]


def completion(processor: Processor, answer: str) -> list[int]:
    path = processor.tokenize_pair(text_pair(answer, "Something else.")).paths[0]
    return path.input_ids[path.completion_start :].tolist()


def test_yes_is_the_one_piece_that_the_model_emits(real_llava):
    processor = processor_of(real_llava)
    assert completion(processor, "Yes") == [5592, 2]
    assert completion(processor, "No") == [processor.tokenizer.convert_tokens_to_ids("▁No"), 2]
    # Alone it would be the marks of two spaces, and a piece that stands within words.
    assert processor.tokenizer(" Yes", add_special_tokens=False)["input_ids"] == [259, 5613]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_ids_are_those_of_the_whole_conversation(family, side, tiny, photo_pairs):
    processor = processor_of(tiny(family))
    for pair in photo_pairs:
        path = processor.tokenize_pair(pair).paths[side == "rejected"]
        assert path.input_ids.tolist() == whole_conversation(tiny(family), family, pair, side)


def test_ids_are_those_of_the_whole_conversation_with_real_pieces(real_llava, photo_pairs):
    processor = processor_of(real_llava)
    for pair in photo_pairs:
        path = processor.tokenize_pair(pair).paths[0]
        assert path.input_ids.tolist() == whole_conversation(real_llava, "llava", pair, "chosen")
        assert (path.input_ids == 1).sum() == 1 == path.input_ids[0]  # BOS, for image rows too
        assert (path.input_ids == 2).sum() == 1 and path.input_ids[-1] == 2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwens_ids_are_those_of_the_answer_alone(family, tiny, photo_pairs):
    """What byte-level tokenizers always gave: nothing of a prompt merges with an answer."""
    processor = processor_of(tiny(family))
    for pair in photo_pairs:
        for path, messages in zip(processor.tokenize_pair(pair).paths, (pair.chosen, pair.rejected), strict=True):
            answer = "".join(part["text"] for part in messages[0]["content"]) + "<|im_end|>\n"
            alone = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert path.input_ids[path.completion_start :].tolist() == alone


def metaspace_llama() -> transformers.PreTrainedTokenizerFast:
    """As LlamaTokenizer without its legacy: only the first word of a text gets a mark."""
    tokenizer = real_tokenizers.real_llama()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


@pytest.fixture(params=["real llama", "llama by metaspace", "tiny llava", "tiny qwen", "smollm2"])
def tokenizer(request, tiny, small_llm):
    match request.param:
        case "real llama":
            return real_tokenizers.real_llama()
        case "llama by metaspace":
            return metaspace_llama()
        case "smollm2":
            return transformers.AutoTokenizer.from_pretrained(small_llm)
        case other:
            return transformers.AutoTokenizer.from_pretrained(tiny("llava" if "llava" in other else "qwen2_5_vl"))


PROMPTS = (
    "USER: Is it red? ASSISTANT:",
    "USER: Is it red? ASSISTANT: ",
    "assistant\n",
    "Say 1",
    "It is (",
    "One\n\n",
    "Caf\u00e9",
    "don",
    "x  ",
    "",
)
STARTS = (
    "Yes",
    " Yes",
    "  two",
    "\nNo",
    "\n\n\nNo",
    "12",
    " 3",
    "'t",
    "!?",
    "://x",
    ")",
    "\t",
    "\r\n",
    "猫",
    " 🙂",
    "e\u0301",
    "",
    " ",
)


def check_continuation(tokenizer, prompt: str, answer: str) -> bool:
    """Whether a piece spanned the cut."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids, offsets = continuation(tokenizer, np.array(prompt_ids, np.int64), prompt, answer, add_special_tokens=True)
    whole = tokenizer(prompt + answer)["input_ids"]
    assert tokenizer.decode([*prompt_ids, *ids]) == tokenizer.decode(whole)
    spans = whole[: len(prompt_ids)] != prompt_ids
    if not spans:
        assert ids == whole[len(prompt_ids) :]
    # Every character of the answer belongs to a token, in order.
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    covered = {n for first, last in offsets for n in range(first, last)}
    assert {n for n, character in enumerate(answer) if not character.isspace()} <= covered <= set(range(len(answer)))
    return spans


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_prompt_and_completion_decode_to_the_conversation(tokenizer, prompt):
    for answer in STARTS:
        check_continuation(tokenizer, prompt, answer)
        check_continuation(tokenizer, prompt, f"{answer} it is red.")


def test_whatever_the_texts_are(tokenizer):
    random_ = random.Random(7)
    letters = "abY ' \n0123.,:-!()é猫🙂\t▁"
    spanned = 0
    for _ in range(400):
        text = "".join(random_.choices(letters, k=random_.randint(2, 14)))
        cut = random_.randint(0, len(text))
        spanned += check_continuation(tokenizer, text[:cut], text[cut:])
    assert spanned


def test_a_piece_that_spans_the_cut_leaves_the_prompt_its_ids():
    """A prompt that ends with a space: inference has its mark, so the model goes on without one."""
    tokenizer = real_tokenizers.real_llama()
    prompt = "ASSISTANT: "
    prompt_ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt_ids)[-1] == "▁"
    ids, offsets = continuation(tokenizer, np.array(prompt_ids), prompt, "Yes, it", add_special_tokens=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["Yes", ",", "▁it"]
    assert offsets == [(0, 3), (3, 4), (4, 7)]


def test_weights_fall_on_the_changed_piece_and_on_nothing_else(real_llava):
    processor = processor_of(real_llava)
    pair = text_pair("A red cat.", "A green cat.")
    path = processor.tokenize_pair(pair, TokenWeights(changed=3.0, unchanged=0.5)).paths[1]
    pieces = processor.tokenizer.convert_ids_to_tokens(path.input_ids[path.completion_start :])
    assert dict(zip(pieces, path.token_weights.tolist(), strict=True)) == {
        "▁A": 0.5, "▁green": 3.0, "▁cat": 0.5, ".": 0.5, "</s>": 0.5
    }  # fmt: skip
    first = processor.tokenize_pair(text_pair("Yes", "No"), TokenWeights(changed=3.0, unchanged=0.5)).paths[0]
    assert first.token_weights.tolist() == [3.0, 0.5]


def test_only_the_last_of_several_turns_ends_with_the_stop(real_llava):
    """Before it the conversation is what inference shows: turns without the token."""
    said = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}
    turns = (said("assistant", "Two cats."), said("user", "Sure?"), said("assistant", "Yes, two."))
    pair = dataclasses.replace(text_pair("x", "y"), chosen=turns)
    processor = processor_of(real_llava)
    path = processor.tokenize_pair(pair).paths[0]
    assert path.input_ids.tolist() == whole_conversation(real_llava, "llava", pair, "chosen")
    ids = path.input_ids[path.completion_start :]
    assert processor.tokenizer.decode(ids[path.token_weights == 1]) == "Two cats. Yes, two.</s>"


def edited(folder, tmp_path, **files):
    """A copy of a model folder with JSON files changed (a function), replaced (text) or removed (None)."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    for name, change in files.items():
        file = copy / (name.replace("_json", ".json").replace("_jinja", ".jinja"))
        if change is None:
            file.unlink()
        elif isinstance(change, str):
            file.write_text(change)
        else:
            content = json.loads(file.read_text())
            change(content)
            file.write_text(json.dumps(content))
    return copy


ENDS = "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ p.get('text', '<image>') }}{% endfor %}%s{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.parametrize(
    ("end", "said", "note"),
    [
        (" ", "▁Yes </s>", "' '"),
        (" \n", "▁Yes </s>", "' \\n'"),
        ("", "▁Yes </s>", "nothing"),
        ("</s>", "▁Yes </s>", None),
        ("</s>\n", "▁Yes </s> ▁ <0x0A>", None),
        (" |\n", "▁Yes ▁| </s>", "' |\\n'"),
    ],
)
def test_the_end_of_turn_is_scored_as_the_model_has_to_say_it(real_llava, tmp_path, end, said, note):
    folder = edited(real_llava, tmp_path, chat_template_jinja=ENDS.replace("%s", end))
    processor = processor_of(folder)
    assert " ".join(processor.tokenizer.convert_ids_to_tokens(completion(processor, "Yes"))) == said
    told = [line for line in processor.notes if "where the model stops" in line]
    assert len(told) == (note is not None)
    if note is not None:
        assert told == [f"the chat template ends an answer with {note}; </s> is scored there, where the model stops"]


def test_white_space_of_the_answer_itself_is_kept(real_llava):
    processor = processor_of(real_llava)
    assert processor.tokenizer.convert_ids_to_tokens(completion(processor, "Yes ")) == ["▁Yes", "▁", "</s>"]


def test_the_stop_is_the_generation_configs(real_llava, tmp_path):
    """``eos_token_id`` is a list there, as Llama 3's: of several the tokenizer's own ends a turn."""
    folder = edited(real_llava, tmp_path, generation_config_json=lambda c: c.update(eos_token_id=[5, 2]))
    assert completion(processor_of(folder), "Yes") == [5592, 2]
    shutil.rmtree(folder)
    folder = edited(real_llava, tmp_path, generation_config_json=lambda c: c.update(eos_token_id=7))
    assert completion(processor_of(folder), "Yes") == [5592, 7]
    shutil.rmtree(folder)
    folder = edited(real_llava, tmp_path, generation_config_json=None)
    assert completion(processor_of(folder), "Yes") == [5592, 2]


def test_a_model_that_never_stops_is_refused(real_llava, tmp_path):
    folder = edited(
        real_llava, tmp_path, generation_config_json=None, config_json=lambda c: c["text_config"].update(eos_token_id=None),
        tokenizer_config_json=lambda c: c.pop("eos_token"),
    )  # fmt: skip
    with pytest.raises(UserError, match="edited: neither generation_config.json, config.json nor the tokenizer names"):
        processor_of(folder)


def test_a_folder_without_its_tokenizer_is_refused(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen2_vl"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="the tokenizer has no token .*its files are missing or another model's"):
        Processor(str(folder), load_model_config(str(folder)))


def test_of_several_chat_templates_the_default_is_taken(tiny, family, tmp_path, photo_pairs):
    """As transformers takes it, from ``additional_chat_templates/`` or a list in the tokenizer's config."""
    expected = [path.input_ids.tolist() for path in processor_of(tiny(family)).tokenize_pair(photo_pairs[0]).paths]
    template = (tiny(family) / "chat_template.jinja").read_text()
    folder = tmp_path / "folder of templates"
    shutil.copytree(tiny(family), folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("no use")
    listed = edited(
        tiny(family), tmp_path, chat_template_jinja=None,
        tokenizer_config_json=lambda c: c.update(
            chat_template=[{"name": "rag", "template": "no use"}, {"name": "default", "template": template}]
        ),
    )  # fmt: skip
    for named in (folder, listed):
        paths = processor_of(named).tokenize_pair(photo_pairs[0]).paths
        assert [path.input_ids.tolist() for path in paths] == expected


def test_chat_templates_without_a_default_are_refused(tiny, family, tmp_path):
    one = edited(
        tiny(family), tmp_path, chat_template_jinja=None,
        tokenizer_config_json=lambda c: c.update(chat_template=[{"name": "rag", "template": "no use"}]),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"none of its chat templates is called 'default' \(there are rag\)"):
        processor_of(one)


def test_a_conversation_that_the_template_refuses_names_the_row(tiny, tmp_path):
    template = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + ENDS.replace("%s", " ")
    processor = processor_of(edited(tiny("llava"), tmp_path, chat_template_jinja=template))
    pair = text_pair("Yes", "No")
    pair = dataclasses.replace(pair, prompt=(*pair.prompt, *pair.chosen, *pair.prompt))
    with pytest.raises(
        UserError, match="t.jsonl:1: row 't': the chat template refuses the conversation: one turn only"
    ):
        processor.tokenize_pair(pair)


@pytest.mark.parametrize("command", ["data", "train", "prepare"])
def test_the_log_says_once_how_a_turn_ends(command, make_config, tmp_path):
    made = make_config(family="llava")
    settings = {
        "run_dir": made.run_dir,
        "policy": {"model": made.policy.model, "dtype": "float32", "lora": {"rank": 2}},
        "data": {"train": made.data.train, "eval": made.data.train, "image_root": made.data.image_root, "workers": 0},
        "optim": {"pairs_per_step": 8, "max_steps": 1},
        "reference": {"cache_dir": str(tmp_path / "reference")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    result = CliRunner().invoke(main, [command, str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.output
    for said in ("</s> is scored there, where the model stops", "of 640 x 480, columns 80 to 559"):
        assert result.output.count(said) == 1, result.output
