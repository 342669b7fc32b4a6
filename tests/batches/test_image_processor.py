"""Pixels, image tokens and the part of a picture that is seen are those of the model's own image processor."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from packaging.version import Version
from PIL import Image, ImageOps

from tests import oracles
from vapr.batches.image_processor import seen_box
from vapr.batches.tokenize import Processor
from vapr.cli import main
from vapr.data.images import as_rgb
from vapr.errors import UserError
from vapr.pages.page import thumbnail

HIDDEN = (200, 30, 40)
WHITE = (255, 255, 255)
TRANSPARENCY_IS_WHITE = Version(transformers.__version__) >= Version("5.21")


def processor_of(folder) -> Processor:
    return Processor(str(folder), transformers.AutoConfig.from_pretrained(folder), "pil")


def picture(mode: str) -> Image.Image:
    """Noise, 70 x 50; the left half of what can be transparent is, and hides a red."""
    colours = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))
    colours.paste(HIDDEN, (0, 0, 35, 50))
    alpha = Image.new("L", (70, 50), 255)
    alpha.paste(0, (0, 0, 35, 50))
    alpha.paste(128, (35, 0, 45, 50))
    if mode == "RGBA":
        colours.putalpha(alpha)
    elif mode == "LA":
        colours = colours.convert("L")
        colours.putalpha(alpha)
    elif mode == "PA":
        colours = colours.convert("P")
        colours.putalpha(alpha)
    elif mode.startswith("P"):
        colours = colours.quantize(16)
        red = colours.getpixel((0, 0))
        colours.info["transparency"] = red if mode == "P index" else bytes(0 if n == red else 200 for n in range(16))
    elif mode == "RGB key":
        colours.info["transparency"] = HIDDEN
    elif mode == "L key":
        colours = colours.convert("L")
        colours.info["transparency"] = colours.getpixel((0, 0))
    else:
        colours = colours.convert(mode)
    return colours


def write(image: Image.Image, file, turned: bool) -> None:
    exif = image.getexif()
    if turned:
        exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    image.save(file, exif=exif)


MODES = {
    "RGBA": "png", "LA": "png", "P index": "png", "P table": "png", "RGB key": "png", "L key": "png", "PA": "tif",
    "L": "png", "1": "png", "RGB": "jpg", "CMYK": "jpg", "YCbCr": "jpg",
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize("mode", MODES)
def test_pixels_are_those_the_image_processor_gives(family, tiny, tmp_path, mode, turned):
    file = tmp_path / f"picture.{MODES[mode]}"
    try:
        write(picture(mode), file, turned)
    except OSError:
        pytest.skip(f"Pillow writes no {mode} here")
    theirs = oracles.hugging_face_processor(tiny(family), family).image_processor
    with Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened)
        assert upright.size == ((50, 70) if turned else (70, 50))
        expected = theirs(images=[upright], return_tensors="np")["pixel_values"]
    assert np.array_equal(processor_of(tiny(family)).process_image(file).pixel_values, expected)


TRANSPARENT = ("RGBA", "LA", "P index", "P table", "RGB key", "L key")


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_is_white_from_transformers_5_21_on_and_the_hidden_colour_before(tiny, tmp_path, mode):
    """Seen in the pixels at the left edge, undone by hand: mean and spread of CLIP's colours."""
    file = tmp_path / "picture.png"
    picture(mode).crop((0, 0, 50, 50)).save(file)
    pixels = processor_of(tiny("llava")).process_image(file).pixel_values[0, :, 28, 2]
    mean, spread = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    hidden = Image.new("RGB", (1, 1), HIDDEN)
    colour = np.asarray((hidden.convert("L") if mode in ("LA", "L key") else hidden).convert("RGB"))[0, 0]
    expected = np.array(WHITE if TRANSPARENCY_IS_WHITE else colour)
    assert np.abs((pixels * spread + mean) * 255 - expected).max() < 6  # a palette of 16 colours is not exact


@pytest.mark.parametrize("mode", [*TRANSPARENT, "PA", "L", "1", "CMYK"])
def test_pages_show_the_colours_that_the_model_sees(mode):
    image = picture(mode)
    sees = transformers.CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False
    )  # fmt: skip
    expected = sees(images=[image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.array_equal(np.asarray(as_rgb(image)), expected)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(thumbnail(image).split(",")[1]))))
    assert np.abs(shown[20:30, 5:20].mean((0, 1)) - expected[20:30, 5:20].mean((0, 1))).max() < 5  # of JPEG


def edit(folder, tmp_path, **files):
    """A copy of a model folder, weights included, with JSON files changed by functions."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    for name, change in files.items():
        file = copy / f"{name}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llava", {"image_processor_type": "CLIPImageProcessorFast"}),
        ("llava", {"image_processor_type": "CLIPImageProcessorPil"}),
        ("llava", {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}),
        ("qwen2_5_vl", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
    ],
)
def test_image_processors_by_other_names_are_those_auto_resolves(family, settings, tiny, tmp_path, photo_root):
    def rename(content):
        content = content.get("image_processor", content)
        for name, value in settings.items():
            content[name] = value
        if settings["image_processor_type"] is None:
            del content["image_processor_type"]

    file = "processor_config" if family == "llava" else "preprocessor_config"
    folder = edit(tiny(family), tmp_path, **{file: rename})
    same, other = (processor_of(f).process_image(photo_root / "coffee.png") for f in (tiny(family), folder))
    assert same.content_hash == other.content_hash


@pytest.mark.parametrize("name", ["Qwen2_5_VLImageProcessor", "NoSuchImageProcessor"])
def test_an_image_processor_that_transformers_refuses_is_refused_with_the_way_out(name, tiny, tmp_path):
    rename = lambda content: content.update(image_processor_type=name)
    folder = edit(tiny("qwen2_5_vl"), tmp_path, preprocessor_config=rename)
    with pytest.raises(UserError) as refused:
        processor_of(folder)
    assert "does not load its image processor (Unrecognized image processor in" in str(refused.value)
    assert "in preprocessor_config.json set image_processor_type to Qwen2VLImageProcessor" in str(refused.value)
    assert "torchvision" not in str(refused.value) and "\n" not in str(refused.value)


def full(content):
    content["vision_feature_select_strategy"] = "full"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"processor_config": lambda c: c.pop("num_additional_image_tokens")},
            "gets 15 tokens in the prompt but 16 features from the model (config.json, vision_feature_select_strategy: "
            "default); in processor_config.json set num_additional_image_tokens: 1 (it is absent)",
        ),
        (
            {"processor_config": full},
            "gets 17 tokens in the prompt but 16 features from the model (config.json, vision_feature_select_strategy: "
            "default); in processor_config.json set vision_feature_select_strategy: default (it is full)",
        ),
        (
            {"config": full},
            "gets 16 tokens in the prompt but 17 features from the model (config.json, vision_feature_select_strategy: "
            "full); in processor_config.json set vision_feature_select_strategy: full (it is default)",
        ),
        (
            {"processor_config": lambda c: c.update(patch_size=28)},
            "gets 4 tokens in the prompt but 16 features from the model (config.json, vision_feature_select_strategy: "
            "default); in processor_config.json set patch_size: 14 (it is 28)",
        ),
        (
            {"processor_config": lambda c: c["image_processor"]["crop_size"].update(height=28, width=28)},
            "the image processor gives 28 x 28 pixels but the vision tower takes 56 x 56; correct size and crop_size",
        ),
    ],
    ids=["no additional token", "full in the processor", "full in the model", "patch size", "crop size"],
)
@pytest.mark.parametrize("command", ["data", "train", "prepare"])
def test_a_llava_whose_processor_and_model_disagree_is_one_line(
    command, changes, message, tiny, make_config, photo_root, tmp_path
):
    folder = edit(tiny("llava"), tmp_path, **changes)
    make_config()  # writes the pairs
    file = tmp_path / "run.yaml"
    settings = {
        "run_dir": str(tmp_path / "run"),
        "policy": {"model": str(folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root)},
    }
    file.write_text(json.dumps(settings))
    result = CliRunner().invoke(main, [command, str(file)])
    assert result.exit_code == 2
    line = result.output.strip().splitlines()[-1]
    assert line.startswith(f"Error: {folder}: ") and message in line


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"processor_config": lambda c: (full(c), c.update(num_additional_image_tokens=0))}, 16),
        ({"processor_config": full, "config": full}, 17),
    ],
    ids=["no additional token, none dropped", "full in both"],
)
def test_settings_that_come_to_the_same_number_are_taken(changes, tokens, tiny, tmp_path, photo_root):
    folder = edit(tiny("llava"), tmp_path, **changes)
    assert processor_of(folder).process_image(photo_root / "coffee.png").num_tokens == tokens


def test_llava_sees_columns_80_to_559_of_a_picture_640_wide(tiny):
    llava_1_5 = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )  # fmt: skip
    assert seen_box(llava_1_5, 640, 480) == (80, 0, 560, 480)
    assert seen_box(llava_1_5, 480, 640) == (0, 80, 480, 560)
    assert seen_box(llava_1_5, 336, 336) == (0, 0, 336, 336)
    assert seen_box(transformers.Qwen2VLImageProcessorPil(), 640, 480) == (0, 0, 640, 480)
    # By the pixels: a white column outside changes nothing, one inside does.
    black = llava_1_5(images=[Image.new("RGB", (640, 480))], return_tensors="np")["pixel_values"]
    for column, seen in ((70, False), (85, True), (554, True), (570, False)):
        striped = Image.new("RGB", (640, 480))
        striped.paste(WHITE, (column, 0, column + 1, 480))
        assert np.array_equal(llava_1_5(images=[striped], return_tensors="np")["pixel_values"], black) is not seen
    assert any("columns 80 to 559" in note for note in processor_of(tiny("llava")).notes)
    assert not processor_of(tiny("qwen2_5_vl")).notes
