"""Mistakes that users make: one line on stderr that says where, what and the way out; exit code 2; no traceback."""

import dataclasses
import io
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from vapr.cli import main
from vapr.config import LossConfig
from vapr.data.pairs import write_pairs
from vapr.training import run_dir, trainer

ROW = {"images": ["cat.png"], "prompt": "What animal is this?", "chosen": "A cat.", "rejected": "A dog."}


@pytest.fixture
def work(tiny, tmp_path) -> Path:
    """A folder with a config that runs: four rows, one picture."""
    Image.effect_noise((56, 40), 60).convert("RGB").save(tmp_path / "cat.png")
    write_pairs(tmp_path / "pairs.jsonl", [{**ROW, "id": str(n), "chosen": f"A cat {n}."} for n in range(4)])
    raw = {
        "run_dir": str(tmp_path / "run"),
        "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32", "lora": {"rank": 2}},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "workers": 0},
        "optim": {"pairs_per_step": 2},
        "reference": {"cache_dir": str(tmp_path / "reference")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def vapr(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # what a user would see as a traceback
    return result.exit_code, result.stderr


def assert_refused(message: str, *arguments: object) -> None:
    code, stderr = vapr(*arguments)
    assert code == 2, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and stderr.rstrip().endswith(lines[0]) and "Traceback" not in stderr, stderr
    assert message in lines[0], lines[0]


def test_the_config_of_these_tests_runs(work):
    assert vapr("train", work / "run.yaml")[0] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losss=1", "unknown key 'losss'; did you mean 'loss'?"),
        ("data.imageroot=x", "unknown key 'data.imageroot'; did you mean 'image_root'?"),
        ("policy.lora.rnk=1", "unknown key 'policy.lora.rnk'; did you mean 'rank'?"),
        ("zzz=1", "unknown key 'zzz'; known keys here: run_dir, policy"),
        ("optim.epochs=many", "optim.epochs: should be a valid integer, got 'many'"),
        ("optim.lr=[1]", "optim.lr: should be a valid number, got [1]"),
        ("optim.lr=.nan", "optim.lr: should be a finite number"),
        ("policy=7", "policy: a mapping of keys to values is needed here, got 7"),
        ("data.shuffle=perhaps", "data.shuffle: should be a valid boolean"),
        ("optim.lr=-1", "optim.lr must be > 0, got -1"),
        ("loss.beta=0", "loss.beta must be > 0, got 0"),
        ("optim.pairs_per_step=0", "optim.pairs_per_step must be at least 1, got 0"),
        ("packing.max_tokens=-5", "packing.max_tokens must be at least 1, got -5"),
        ("data.workers=-1", "data.workers must be null or at least 0 and at most 128, got -1"),
        ("loss.kind=ppo", "should be 'sigmoid', 'robust'"),
        ("data.workers=1000000", "data.workers must be null or at least 0 and at most 128, got 1000000"),
        ("data.format=LLaVA", "data.format: should be 'auto', 'vapr', 'trl', 'llava', 'povid'"),
        ("data.train=[{path: x, format: povids}]", "data.train.0.format: should be 'auto', 'vapr', 'trl', 'llava', 'povid'"),
        ("data.columns={answer: x}", "data.columns: unknown key 'answer'; known: prompt, chosen"),
        ("data.columns={promt: x}", "data.columns: unknown key 'promt'; did you mean 'prompt'?"),
        ("data.columns={prompt: ask, chosen: chosen, rejected: rejected}", "has no column 'ask'; there are chosen, id"),
        ("data.train=7", "data.train: should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those, got 7"),
        ("data.train=[{path: x, wieght: 2}]", "unknown key 'data.train.0.wieght'; did you mean 'weight'?"),
        ("data.train=[]", "data.train: should be a path or hub id, a mapping {path: ..., weight: ...}, or a list of those, got []"),
        ("data.train=[{path: pairs.jsonl, weight: 0}]", "data.train.0.weight must be > 0 and at most 1,000, got 0"),
        ("data.train={weight: 2}", "'data.train.path' is missing"),
        ("policy.train.language_model=false", "policy.train freezes every part"),
        ("features={cache: true, cach_dir: x}", "unknown key 'features.cach_dir'; did you mean 'cache_dir'?"),
        ("run_dir=null", "run_dir: should be a valid string, got None"),
        ("a=b=c:", "unknown key 'a'"),
        ("justakey", "--set justakey: write --set key.subkey=value"),
    ],
    ids=str,
)  # fmt: skip
def test_config_values(work, override, message):
    assert_refused(message, "train", work / "run.yaml", "--set", override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "run.yaml: a config is a mapping of keys to values"),
        (b"- a\n- b\n", "run.yaml: a config is a mapping of keys to values"),
        (b"run_dir: [\n", "run.yaml: not valid YAML"),
        (b"\x89PNG\xff\xfe", "run.yaml: cannot be read as a text file"),
        (b"run_dir: x\ndata: {train: y}\n", "run.yaml: 'policy' is missing"),
        (b"run_dir: x\npolicy: {model: y}\ndata: {}\n", "run.yaml: 'data.train' is missing"),
    ],
    ids=str,
)
def test_config_files(work, content, message):
    (work / "run.yaml").write_bytes(content)
    assert_refused(message, "train", work / "run.yaml")


def png_of_size(width: int, height: int) -> bytes:
    """A valid header of a picture of any size, with no pixels behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


NOISE = Image.effect_noise((64, 64), 60).convert("RGB")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "image 'bad.png' not found (looked for"),
        (b"", "is not an image file"),
        (b"hello, this is text\n", "is not an image file"),
        (encoded(NOISE, "PNG")[:400], "cannot be read"),
        (encoded(NOISE, "JPEG")[:500], "cannot be read"),
        (png_of_size(0, 5), "is not an image file"),
        (png_of_size(100_000, 100_000), "may be a decompression bomb"),
        (png_of_size(12_000, 12_000), "may be a decompression bomb: 12000 x 12000 pixels; scale it down"),
        (encoded(Image.new("I;16", (40, 40)), "PNG"), "has mode I;16, which RGB would clip; save it as 8-bit RGB"),
        (encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(9)]), "is animated (2 frames); save one frame"),
        (encoded(Image.new("RGB", (4000, 10)), "PNG"), "is refused by the image processor: absolute aspect ratio must be smaller than 200"),
    ],
    ids=["missing", "empty", "text", "cut PNG", "cut JPEG", "no width", "bomb", "warned bomb", "16 bit", "animated", "too long"],
)  # fmt: skip
def test_images(work, content, message):
    if content is not None:
        (work / "bad.png").write_bytes(content)
    rows = [{**ROW, "id": "fine"}, {**ROW, "id": "row-2", "images": ["bad.png"], "chosen": "Another."}]
    write_pairs(work / "pairs.jsonl", rows)
    code, stderr = vapr("train", work / "run.yaml")
    assert code == 2 and f"Error: {work}/pairs.jsonl:2: " in stderr and message in stderr, stderr
    assert len(stderr.strip().splitlines()) == 1 and "Traceback" not in stderr
    # skipped on request: counted, listed, shown
    code, stderr = vapr("train", work / "run.yaml", "--set", "data.on_bad_row=skip")
    assert code == 0, stderr
    [(place, reason)] = json.loads((work / "run" / "skipped.json").read_text()).items()
    assert place == f"{work}/pairs.jsonl:2" and message in reason
    assert "1 pair, by reason" in (work / "run" / "report.html").read_text()


def test_images_out_of_their_root(work, tmp_path):
    (work / "inside").mkdir()
    shutil.copy(work / "cat.png", work / "inside" / "cat.png")
    (work / "inside" / "link.png").symlink_to(work / "cat.png")
    for image in ("../cat.png", str(work / "cat.png"), "link.png"):
        write_pairs(work / "pairs.jsonl", [{**ROW, "images": ["cat.png"]}, {**ROW, "id": "b", "images": [image]}])
        message = f"pairs.jsonl:2: image '{image}' lies outside data.image_root ({work / 'inside'})"
        assert_refused(message, "train", work / "run.yaml", "--set", f"data.image_root={work / 'inside'}")


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": None}, "'rejected' is missing; a pair needs prompt, chosen and rejected (this row has images, prompt, chosen"),
        ({"chosen": None, "rejected": None, "good": "x", "bad": "y"}, "data.columns can map other names"),
        ({"chosen": ""}, "'chosen' is empty"),
        ({"rejected": " \n"}, "'rejected' is empty"),
        ({"rejected": "A cat."}, "chosen and rejected are the same text; there is nothing to prefer"),
        ({"chosen": 7}, "'chosen' must be text or a list of messages, got 7"),
        ({"prompt": {"a": 1}}, "'prompt' holds a message without role and content"),
        ({"category": 5}, "'category' must be text, got 5"),
        ({"weight": "2"}, "'weight' must be a number of at least 0, got '2'"),
        ({"prompt": [{"role": "assistant", "content": "Hi."}]}, "'prompt' must be user and assistant in turn and end with user"),
        ({"prompt": [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "?"}]}]}, "the prompt places 2 image(s) but the row has 1"),
        ({"prompt": "<image> What?"}, "'prompt' holds '<image>' as text"),
        ({"chosen": "See <|image_pad|>."}, "'chosen' contains '<|image_pad|>'"),
        ({"prompt": "See <|image_pad|>."}, "the rendered prompt holds 2 '<|image_pad|>' for 1 image(s)"),
        ({"chosen": [{"role": "assistant", "content": "A."}, {"role": "assistant", "content": "B."}]}, "go on in turns and end with one, got assistant, assistant"),
        ({"chosen": "word " * 9000}, "tokens but packing.max_tokens is 8,192 (nothing is truncated); raise it, or set data.too_long: skip"),
        ({"images": None, "image_path": "cat.png"}, "'image_path' looks like an image, but this format has 'images'; map it with data.columns"),
        ({"rejected_images": []}, "'rejected_images' has 0 image(s) but 'images' has 1"),
        ({"id": "fine"}, "id 'fine' was already used at"),
        ({"images": [3]}, "an image must be a path or {'bytes', 'path'}, got 3"),
        ({"images": {"any_of": []}}, "an image must be a path or {'bytes', 'path'}, got None"),
        ({"images": ["x" * 5000]}, "is no path; save it to a file"),
        ({"id": "half \ud83d"}, "'id' holds half a character"),
    ],
    ids=str,
)  # fmt: skip
def test_rows(work, changes, message):
    row = {key: value for key, value in {**ROW, "id": "row-2", **changes}.items() if value is not None}
    (work / "pairs.jsonl").write_text(json.dumps({**ROW, "id": "fine"}) + "\n" + json.dumps(row) + "\n")
    code, stderr = vapr("train", work / "run.yaml")
    assert code == 2 and f"Error: {work}/pairs.jsonl:2: " in stderr and message in stderr, stderr
    assert len(stderr.strip().splitlines()) == 1


GOOD = json.dumps({**ROW, "id": "fine"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl: no pairs in it"),
        ("x.jsonl", b"\n \n\n", "x.jsonl: no pairs in it"),
        ("x.jsonl", GOOD + GOOD[:40], "x.jsonl:2: not valid JSON"),
        ("x.jsonl", GOOD * 0 + bytes(range(256)) * 20, "x.jsonl: not a text file"),
        ("x.jsonl", GOOD + "{\"prompt\": \"é\"}\n".encode("latin-1"), "x.jsonl:2: not UTF-8 text"),
        ("x.jsonl", GOOD.decode().encode("utf-16"), "x.jsonl: not a text file"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1: not a row: JSON nested too deeply"),
        ("x.jsonl", b"{\"id\": " + b"9" * 5000 + b"}\n", "x.jsonl:1: not readable as JSON (Exceeds the limit"),
        ("x.jsonl", b"null\n", "x.jsonl:1: a row must be an object"),
        ("x.json", b"", "x.json:1: not valid JSON"),
        ("x.json", b"[" + GOOD + b",", "x.json:2: not valid JSON"),
        ("x.json", b"{\"a\": 1}", "x.json: a .json file of pairs is one list of rows"),
        ("x.json", "[\"é\"]".encode("latin-1"), "x.json: not UTF-8 text"),
        ("x.parquet", b"PAR1 but not really PAR1", "x.parquet: not a readable parquet file"),
        ("x.arrow", b"no arrow at all" * 9, "x.arrow: not a readable arrow file"),
        ("x.tar", b"no tar at all" * 99, "x.tar: not a readable tar file"),
        ("x.csv", GOOD, "x.csv: unknown file type; use .jsonl, .json, .parquet, .arrow, .tar"),
        ("dataset_info.json", b"{\"a\": {\"file_name\": \"x\"}}", "no entry with \"ranking\": true"),
        ("dataset_info.json", b"{\"a\": {\"ranking\": true, \"file_name\": 3}}", "file_name, columns and tags must be names"),
        ("dataset_info.json", b"[", "dataset_info.json: not a readable dataset_info.json"),
    ],
    ids=str,
)  # fmt: skip
def test_files(work, name, content, message):
    (work / name).write_bytes(content)
    assert_refused(message, "train", work / "run.yaml", "--set", f"data.train={work / name}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
        ("/nowhere/*.jsonl", "/nowhere/*.jsonl: no .jsonl, .json, .parquet, .arrow, .tar file there"),
        (
            "someone/no-such-data-set",
            "someone/no-such-data-set: no such file or folder here, and the hub gave no data set",
        ),
    ],
)
def test_sources(work, source, message):
    assert_refused(message, "train", work / "run.yaml", "--set", f"data.train={source}")


def test_an_empty_folder(work):
    (work / "empty").mkdir()
    assert_refused("empty: no .jsonl", "train", work / "run.yaml", "--set", f"data.train={work / 'empty'}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is a folder without config.json; give a Hugging Face model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no readable model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "is not supported; vapr trains llava"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "does not load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "does not load"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer or image processor does not load"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "tokenizer or image processor does not load"),
    ],
    ids=["no config", "half a config", "another model", "half the weights", "no weights", "no tokenizer", "no processor"],
)  # fmt: skip
def test_model_folders(work, tiny, damage, message):
    shutil.copytree(tiny("qwen2_5_vl"), work / "model")
    damage(work / "model")
    assert_refused(message, "train", work / "run.yaml", "--set", f"policy.model={work / 'model'}")


def test_damaged_and_changed_runs(work):
    assert vapr("train", work / "run.yaml", "--set", "checkpoint.every=1")[0] == 0
    assert_refused("holds a run; continue it with --resume, or give another run_dir", "train", work / "run.yaml")
    shutil.rmtree(work / "run" / "final")
    resume = ("train", work / "run.yaml", "--resume", "--set", "checkpoint.every=1")
    assert_refused("was started with optim.lr: 5e-06 (now 1.0)", *resume, "--set", "optim.lr=1")
    newest = sorted((work / "run" / "checkpoints").iterdir())[-1]
    weights = load_file(newest / "weights.safetensors")
    (newest / "SHA256SUMS").unlink()  # as an older version leaves it
    save_file({name: weight[:1] for name, weight in weights.items()}, newest / "weights.safetensors")
    assert_refused(f"{newest}: the checkpoint belongs to another model: 'model.", *resume)
    save_file(weights, newest / "weights.safetensors")
    config = (work / "run" / "config.yaml").read_text()
    (work / "run" / "config.yaml").write_text("{\n" + config)
    assert_refused("run/config.yaml: cannot be read", *resume)
    (work / "run" / "config.yaml").write_text(config)
    assert vapr(*resume)[0] == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 KiB, where one may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("section", ["run_dir", "reference.cache_dir", "features.cache_dir"])
def test_a_full_disk(work, small_disk, section):
    (small_disk / "filler").write_bytes(
        b"0" * {"run_dir": 270_000, "reference.cache_dir": 295_000, "features.cache_dir": 303_000}[section]
    )
    overrides = ["--set", f"{section}={small_disk / 'x'}", "--set", "checkpoint.every=1"]
    if section == "features.cache_dir":
        overrides += ["--set", "features.cache=true", "--set", "optim.pairs_per_step=1"]
    code, stderr = vapr("train", work / "run.yaml", *overrides)
    [line] = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert code == 2 and ("No space left on device" in line or "do not fit" in line), stderr
    (small_disk / "filler").unlink()
    if section == "run_dir":
        subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    code, stderr = vapr("train", work / "run.yaml", *overrides, "--resume")
    assert code == 0, stderr


def test_convert(work):
    source = work / "pairs.jsonl"
    assert_refused(
        "--to csv: unknown format; vapr writes vapr, trl", "convert", source, "--to", "csv", "--out", work / "o.json"
    )
    assert_refused("povid is written as .json", "convert", source, "--to", "povid", "--out", work / "o.jsonl")
    assert_refused("already exists", "convert", source, "--to", "trl", "--out", source)
    assert_refused(
        "--column prompt: write --column prompt=question",
        "convert",
        source,
        "--to",
        "trl",
        "--out",
        work / "o.jsonl",
        "--column",
        "prompt",
    )
    assert_refused(
        "unknown format 'x'; known: auto, vapr",
        "convert",
        source,
        "--to",
        "trl",
        "--out",
        work / "o.jsonl",
        "--format",
        "x",
    )
    assert_refused("/proc/o.jsonl: cannot be written", "convert", source, "--to", "trl", "--out", "/proc/o.jsonl")


def test_a_run_of_an_older_version_lacks_keys_and_goes_on(make_config, tmp_path):
    terms = [LossConfig(), LossConfig(kind="dpop", weight=0.5)]
    config = dataclasses.replace(make_config(), loss=terms)
    values = config.as_dict()
    for section, key in (("policy", "base_weights"), ("optim", "kind")):
        del values[section][key]
    for term in values["loss"]:
        for key in ("margin_weight", "delta", "consistency", "second_image"):
            del term[key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert run_dir._difference(tmp_path / "config.yaml", config) is None
    now = dataclasses.replace(config, loss=[terms[0], dataclasses.replace(terms[1], margin_weight=0.5)])
    assert run_dir._difference(tmp_path / "config.yaml", now) == "loss.1.margin_weight: 0.0 (now 0.5)"


def test_what_a_killed_process_left_half_written_goes(make_config):
    config = make_config()
    run = Path(config.run_dir)
    trainer.train(config)
    shutil.rmtree(run / "final")
    (run / "report.html.0123abcd.tmp").write_text("half a page")
    trainer.train(config, resume=True)
    assert not list(run.glob("*.tmp"))
    assert "</html>" in (run / "report.html").read_text()
