"""Hard mode for every test, and tiny policies of every family."""

import importlib
import json
import os
import signal
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; threads that spin for a core slow all of them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    # Triton decides when it is imported whether kernels are compiled or interpreted. Tests of kernels ask for the
    # interpreter with the fixture ``device``; everything else takes the naive twins, as a user's CPU does, and so do
    # the processes that tests start.
    os.environ["TRITON_INTERPRET"] = "1"
from vapr_kernels import launch, matmul

if os.environ.pop("TRITON_INTERPRET", None) and launch.installed:
    launch.triton.knobs.propagate_env = False  # else the next line sets the variable again
    launch.triton.knobs.runtime.interpret = True
    launch.interpret = False

from tests import language_models, real_tokenizers
from tests.fake_server import FakeServer
from vapr.config import Config
from vapr.data.pair import PreferencePair
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.demo.tiny_policy import build_tiny_policy

pytest.register_assert_rewrite("tests.editing.edit_jobs", "tests.editing.edit_command", "tests.plan.counted_step")

PHOTO_PAIRS = Path(__file__).parent / "data" / "photos.jsonl"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to Ctrl-C
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")
"""On which whatever depends on a family is tested."""

EVERY_FAMILY = (
    *FAMILIES, "qwen3_vl", "qwen3_vl_moe", "idefics3", "smolvlm", "llava_pixtral", "mistral3", "ministral3",
    "llava_next", "llava_onevision", "internvl", "gemma3",
)  # fmt: skip
"""On which tokens, pixels, positions and exactness are tested."""


def pytest_report_header() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "numpy"))


@pytest.fixture(autouse=True)
def _hard_mode(tmp_path_factory, monkeypatch):
    """Fixed seed, fresh memory that holds NaN, a cache folder of the test run's own, and as many threads as before."""
    num_threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    torch.use_deterministic_algorithms(False)
    # Other numbers of threads round differently, and tests compare bytes with those of processes of their own.
    torch.set_num_threads(num_threads)


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """Where kernels are tested: the GPU, or the CPU with Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not launch.installed:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(launch, "interpret", True)
    return torch.device("cpu")


ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@pytest.fixture
def by_onednn(monkeypatch) -> list[tuple[int, ...]]:
    """Send every product in fp32 to oneDNN, on any CPU; the shapes (rows, inner, columns) that it was asked for."""
    if ONEDNN is None:
        pytest.skip("this PyTorch has no oneDNN")
    asked: list[tuple[int, ...]] = []

    def product(a, b, *rest):
        asked.append((*a.shape, len(b)))
        return ONEDNN(a, b, *rest)

    monkeypatch.setattr(matmul, "LARGE", 0)
    monkeypatch.setattr(matmul, "_onednn", lambda: product)
    return asked


@pytest.fixture
def few_rows(monkeypatch) -> None:
    """Let MLPs be computed again on 50 rows at a time, so that a small pack has several such parts."""
    monkeypatch.setattr(importlib.import_module("vapr_kernels.gated_mlp"), "ROWS", 50)


@pytest.fixture(scope="session")
def photo_root() -> Path:
    """The photographs that scikit-image packages."""
    skimage = pytest.importorskip("skimage")
    return Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="session")
def photo_pairs(photo_root) -> list[PreferencePair]:
    return list(read_pairs(PHOTO_PAIRS, image_root=photo_root))


@pytest.fixture(scope="session")
def photo_rows() -> list[dict]:
    return [json.loads(line) for line in PHOTO_PAIRS.read_text().splitlines()]


@pytest.fixture(scope="session")
def corpus(photo_pairs) -> list[str]:
    messages = [m for pair in photo_pairs for m in (*pair.prompt, *pair.chosen, *pair.rejected)]
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, corpus):
    """``tiny(family)`` -> folder of a random model; weights large enough that attention and positions matter."""
    folders: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp("policies") / family
            folders[family] = build_tiny_policy(family, folder, corpus, initializer_range=0.15)
        return folders[family]

    return build


@pytest.fixture(scope="session")
def small_llm(corpus) -> Path:
    """Folder of a small instruction-tuned language model, kept in the user's cache; see tests/language_models.py."""
    return language_models.small_llm(Path.home() / ".cache" / "vapr-tests", corpus)


@pytest.fixture(scope="session")
def real_llava(tiny, tmp_path_factory) -> Path:
    """Folder of a LLaVA without weights whose tokenizer is a real one of Llama's kind."""
    return real_tokenizers.llava_folder(tiny("llava"), tmp_path_factory.mktemp("real") / "llava")


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def make_config(tiny, photo_rows, photo_root, tmp_path):
    """A config of six steps on 24 pairs; ``changes`` replace whole sections."""

    def make(name: str = "run", family: str = "qwen2_5_vl", rows=None, lora: bool = True, **changes) -> Config:
        data = tmp_path / "pairs.jsonl"
        if not data.exists() or rows is not None:
            write_pairs(data, rows or photo_rows[:24])
        policy = {"model": str(tiny(family)), "dtype": "float32", **({"lora": {"rank": 4, "alpha": 8}} if lora else {})}
        raw = {
            "run_dir": str(tmp_path / name),
            "policy": policy,
            "data": {"train": str(data), "image_root": str(photo_root)},
            "optim": {"lr": 1e-3, "pairs_per_step": 8, "epochs": 2},
            "reference": {"cache_dir": str(tmp_path / "reference")},
            "checkpoint": {"every": 2, "keep": 2},
        }
        return Config.parse({**raw, **changes})

    return make


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory) -> Path:
    """120 small pictures, ``a/0.png`` to ``b/59.png``."""
    folder = tmp_path_factory.mktemp("pictures")
    for place in ("a", "b"):
        (folder / place).mkdir()
        for n in range(60):
            Image.new("RGB", (28, 28), (4 * n, 90, 40)).save(folder / place / f"{n}.png")
    return folder


@pytest.fixture
def serve():
    """``serve(answer, models)`` -> a running FakeServer."""
    servers = []

    def start(*arguments, **options) -> FakeServer:
        servers.append(FakeServer(*arguments, **options).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()
