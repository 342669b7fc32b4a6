"""Images whose tokens are several runs between marks: which tokens are the same, and where features go."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image

from tests import oracles
from tests.evaluation.generation.test_answer import SETTINGS
from vapr.batches.forest import path_keys
from vapr.batches.model_config import load_model_config
from vapr.batches.packing import count_tokens, fill_packs, pack
from vapr.batches.tokenize import Processor
from vapr.config import LoraConfig, PackingConfig, PolicyConfig, TrainConfig
from vapr.data.pair import PreferencePair
from vapr.errors import UserError
from vapr.evaluation.generation.answer import answer_questions
from vapr.evaluation.generation.prompts import messages_of
from vapr.evaluation.scoring.prediction import Question
from vapr.families import FAMILIES
from vapr.model.generation import as_transformers
from vapr.model.image_features import ImageFeatures
from vapr.model.logps import completion_logps, per_completion, token_logps
from vapr.model.policy import image_features, load_policy
from vapr.training import trainer
from vapr.training.export import export
from vapr.training.zero_passes import _tiny_image

SEVERAL_RUNS = ("idefics3", "smolvlm", "llava_pixtral", "mistral3", "ministral3")
CPU = torch.device("cpu")


@pytest.fixture(params=SEVERAL_RUNS)
def family(request) -> str:
    return request.param


@pytest.fixture
def processor(tiny, family) -> Processor:
    return Processor(str(tiny(family)), load_model_config(str(tiny(family))), "pil")


def policy_of(folder, **options):
    return load_policy(PolicyConfig(model=str(folder), dtype="float32", **options), CPU)


def picture(width: int = 112, height: int = 112, changed: tuple[int, int] | None = None) -> bytes:
    """A PNG with colours in both directions; ``changed``: a square of 8 pixels from (left, top) on is white."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * 7 + y * 3) % 256], -1).astype(np.uint8)
    if changed is not None:
        left, top = changed
        pixels[top : top + 8, left : left + 8] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pair_of(*images: bytes, id: str = "t", question: str = "What is it?", chosen: str = "A cat.") -> PreferencePair:
    said = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}
    asked = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    return PreferencePair(
        id=id, images=images, prompt=({"role": "user", "content": asked},), chosen=(said("assistant", chosen),),
        rejected=(said("assistant", "A dog."),), where="t.jsonl:1",
    )  # fmt: skip


def logps_of(policy, batch, features=None):
    return completion_logps(per_completion(token_logps(policy, batch, features), batch), batch)


def test_an_image_is_several_runs_with_marks_between(processor):
    path = processor.tokenize_pair(pair_of(picture())).paths[0]
    [runs] = path.image_runs
    assert len(runs) > 2
    places = {start + n for start, length in runs for n in range(length)}
    assert places == set(np.flatnonzero(path.input_ids == processor.image_token_id).tolist())
    gaps = [after - (start + length) for (start, length), (after, _) in itertools.pairwise(runs)]
    assert min(gaps) > 0


@pytest.mark.parametrize("changed", [(0, 0), (100, 0), (0, 100), (100, 100)], ids=str)
def test_pictures_of_one_size_never_share_a_token_of_theirs(processor, changed):
    """Wherever they differ: in the first tile or row, or in the last, whose features alone it changes in some towers."""
    pairs = [
        processor.tokenize_pair(pair_of(picture(), id="a")),
        processor.tokenize_pair(pair_of(picture(changed=changed), id="b")),
    ]
    first, second = (pair.paths[0] for pair in pairs)
    assert np.array_equal(first.input_ids, second.input_ids)
    numbers: dict[str, int] = {}
    alike = path_keys(first, numbers) == path_keys(second, numbers)
    assert alike.tolist() == (first.input_ids != processor.image_token_id).tolist()
    batch = pack(pairs, "image")
    assert len(batch.images) == 2
    assert batch.num_tokens == sum(count_tokens([pair], "pair") for pair in pairs)  # trees of their own


def test_pairs_that_show_one_picture_share_it_with_its_marks(processor):
    pairs = [
        processor.tokenize_pair(pair_of(picture(), id=id, chosen=said)) for id, said in (("a", "Red."), ("b", "Blue."))
    ]
    batch = pack(pairs, "image")
    prompt = pairs[0].paths[0].completion_start
    completions = [len(path.input_ids) - prompt for pair in pairs for path in pair.paths]
    assert len(batch.images) == 1
    assert prompt < batch.num_tokens <= prompt + sum(completions)
    assert len(batch.image_tokens) == batch.images[0].num_tokens


def test_a_second_picture_forks_where_its_tokens_begin(tiny, family, processor):
    """Two pictures a prompt; pairs share the first one, the marks and no token of the second."""
    one, two, three = picture(), picture(changed=(50, 50)), picture(changed=(90, 20))
    pairs = [
        processor.tokenize_pair(pair_of(one, other, id=id))
        for id, other in (("a", two), ("b", three), ("c", one))
    ]  # fmt: skip
    batch = pack(pairs, "image")
    assert len(batch.images) == 3
    second = pairs[0].paths[0].image_runs[1][0][0]
    assert batch.cu_seqlens[1] == second  # the segment above the fork ends before the second picture
    policy = policy_of(tiny(family))
    truth = oracles.pair_logps(oracles.load_model(tiny(family), family), family, batch)
    torch.testing.assert_close(logps_of(policy, batch), truth, rtol=1e-5, atol=1e-5)
    assert (truth[0] - truth[1]).abs().min() > 1e-4  # the second picture matters


def test_every_run_gets_its_own_features(tiny, family, processor):
    """Features of two runs exchanged change the log-probs; so a mix-up would show."""
    policy = policy_of(tiny(family))
    batch = pack([processor.tokenize_pair(pair_of(picture()))])
    features = image_features(policy, batch.images)
    length = batch.pairs[0].paths[0].image_runs[0][0][1]
    exchanged = torch.cat([features[length : 2 * length], features[:length], features[2 * length :]])
    assert (logps_of(policy, batch, exchanged) - logps_of(policy, batch, features)).abs().min() > 1e-4


def test_cached_features_are_the_same(tiny, family, processor, tmp_path):
    policy = policy_of(tiny(family), lora=LoraConfig(rank=4, alpha=8))
    pairs = [pair_of(picture(), picture(60, 112), id="a"), pair_of(picture(changed=(8, 8)), id="b")]
    batch = pack([processor.tokenize_pair(pair) for pair in pairs])
    truth = logps_of(policy, batch)
    for misses, hits in ((3, 0), (3, 3)):
        features = ImageFeatures(policy, str(tmp_path)) if not hits else features  # noqa: F821
        assert torch.equal(logps_of(policy, batch, features.of_batch(batch)), truth)
        assert (features.misses, features.hits) == (misses, hits)


MARKS = {
    "idefics3": "<row_1_col_2> and <fake_token_around_image>, <global-img>?",
    "smolvlm": "<row_1_col_2> and <fake_token_around_image>, <global-img>?",
    **dict.fromkeys(oracles.PIXTRAL, "[IMG_BREAK] and [IMG_END]?"),
}


def test_marks_that_a_user_types_are_the_tokens_they_are_at_inference(tiny, family, processor):
    """They stand for no image: ids are transformers' own, and so are log-probs."""
    pair = pair_of(picture(), question=f"What is {MARKS[family]}", chosen=MARKS[family])
    tokenized = processor.tokenize_pair(pair)
    path = tokenized.paths[0]
    theirs = oracles.hugging_face_processor(tiny(family), family)
    shown = [{"type": "image", "image": Image.open(io.BytesIO(pair.images[0]))}, pair.prompt[0]["content"][1]]
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": shown}], add_generation_prompt=True, tokenize=True, return_dict=True
    )  # fmt: skip
    assert path.input_ids[: path.completion_start].tolist() == list(expected["input_ids"][0])
    batch = pack([tokenized], "image")
    truth = oracles.pair_logps(oracles.load_model(tiny(family), family), family, batch)
    torch.testing.assert_close(logps_of(policy_of(tiny(family)), batch), truth, rtol=1e-5, atol=1e-5)


def test_a_placeholder_that_a_user_types_is_refused_in_one_line(processor):
    token = processor.image_token
    for pair, message in (
        (pair_of(picture(), question=f"What is {token}?"), f"holds 2 '{token}' for 1 image"),
        (pair_of(picture(), chosen=f"It is {token}."), f"'chosen' contains '{token}'"),
    ):
        with pytest.raises(UserError) as caught:
            processor.tokenize_pair(pair)
        assert message in str(caught.value).replace("\\", "") and "\n" not in str(caught.value)


SIZES = [(1, 1), (3, 2), (55, 57), (112, 112), (113, 112), (200, 31), (31, 200), (400, 100), (90, 61), (640, 480)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_odd_sizes_are_what_transformers_makes_of_them(tiny, family, processor, size):
    theirs = oracles.hugging_face_processor(tiny(family), family)
    pictures = [Image.open(io.BytesIO(picture(*size))), Image.open(io.BytesIO(picture(size[1], size[0])))]
    content = [*({"type": "image", "image": image} for image in pictures), {"type": "text", "text": "Which is wide?"}]
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )  # fmt: skip
    path = processor.tokenize_pair(pair_of(picture(*size), picture(*size[::-1]), question="Which is wide?")).paths[0]
    assert path.input_ids[: path.completion_start].tolist() == list(expected["input_ids"][0])
    ours = oracles.pixel_values(family, path.images).numpy()
    assert np.array_equal(ours, np.asarray(expected["pixel_values"]).reshape(ours.shape))
    for image, (width, height) in zip(path.images, (size, size[::-1]), strict=True):
        assert image.num_tokens <= processor.expected_image_tokens([(width, height)])
    together = processor.expected_image_tokens([size, size[::-1]])
    rest = processor.tokenize_prompt(list(pair_of(picture(), picture(), question="Which is wide?").prompt)).ids
    assert abs(path.completion_start - (len(rest) - 2 + together)) <= 2  # a mark may join the text beside it


def test_a_picture_of_too_many_tiles_for_a_pack_is_one_line(make_config, family, photo_rows):
    row = next(row for row in photo_rows if row.get("images"))
    config = make_config(family=family, rows=[row], packing={"max_tokens": 20})
    with pytest.raises(UserError, match="packing.max_tokens is 20") as caught:
        trainer.train(config)
    assert "\n" not in str(caught.value)


def test_the_spare_image_runs_through_tower_and_projector(tiny, family):
    policy = policy_of(tiny(family), train=TrainConfig(projector=True, vision_tower=True))
    spare = _tiny_image(policy)
    features = image_features(policy, [spare])
    assert features.shape == (spare.num_tokens, policy.head.shape[1])
    features.sum().backward()
    trained = policy.trained_parameters()
    used = {name for name, p in trained.items() if FAMILIES[policy.family].part_of(name) != "language_model"}
    assert all(trained[name].grad is not None for name in used)


QUESTIONS = [
    Question(benchmark="pope", id=f"q{n}", question=text, answer="yes", images=images)
    for n, (text, images) in enumerate(
        [
            ("Is there a cat?", (picture(60, 60),)),
            ("Which is wider?", (picture(112, 40), picture(40, 112))),
            ("Name a colour.", ()),
            ("How many of them are there on the table?", (picture(changed=(20, 20)),)),
        ]
    )
]


def said_alone(model, folder: Path, family: str, question: Question) -> str:
    """What plain transformers answers to one question."""
    processor = oracles.hugging_face_processor(folder, family)
    shown = iter([Image.open(io.BytesIO(image)) for image in question.images])
    messages = [
        {**m, "content": [{**p, "image": next(shown)} if p["type"] == "image" else p for p in m["content"]]}
        for m in messages_of(question)
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True,
        **({} if family in oracles.PIXTRAL else {"return_tensors": "pt"}),
    )  # fmt: skip
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_batches_answer_as_each_question_alone_does(tiny, family, processor):
    model = oracles.CLASSES[family].from_pretrained(tiny(family), dtype=torch.float32).eval()
    truth = [said_alone(model, tiny(family), family, question) for question in QUESTIONS]
    said = [one.prediction for one in answer_questions(model, processor, QUESTIONS, SETTINGS, quiet=True)]
    assert said == truth and len(set(said)) == len(said)
    policy = policy_of(tiny(family))
    with as_transformers(policy) as base:  # while it trains
        assert [one.prediction for one in answer_questions(base, processor, QUESTIONS, SETTINGS, quiet=True)] == truth


def test_a_run_trains_and_its_export_loads_in_plain_transformers(make_config, family, tmp_path, photo_pairs):
    config = make_config(family=family, features={"cache_dir": str(tmp_path / "features")})
    trainer.train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < losses[0]
    export(tmp_path / "run", tmp_path / "whole")
    exported = oracles.load_model(tmp_path / "whole", family)
    trained = oracles.load_model(Path(config.policy.model), family)
    adapted = peft.PeftModel.from_pretrained(trained, tmp_path / "run" / "final")
    processor = Processor(str(tmp_path / "whole"), transformers.AutoConfig.from_pretrained(tmp_path / "whole"), "pil")
    batch = pack([processor.tokenize_pair(photo_pairs[0])])
    with torch.no_grad():
        got, truth = (oracles.pair_logps(model, family, batch) for model in (exported, adapted))
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)


def test_packs_hold_what_they_may(processor):
    """Marks count as tokens of a pack."""
    pairs = [processor.tokenize_pair(pair_of(picture(changed=(8 * n, 0)), id=str(n))) for n in range(4)]
    one = count_tokens(pairs[:1], "image")
    packs = fill_packs(pairs, PackingConfig(max_tokens=2 * one, share="image"))
    assert [pack(members, "image").num_tokens for members in packs] == [2 * one, 2 * one]
