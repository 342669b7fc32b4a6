"""How fast vapr's answers come beside plain ``generate``: the same questions, pictures and batches, in one process.

    python -m bench.generation

How to read the rows: bench/README.md.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from PIL import Image

from bench.arms import trl_processor
from bench.data_rows import write_photo
from bench.record import measure, record
from bench.workloads import SHAPES, Subject
from vapr.evaluation.generation.answer import answer_questions
from vapr.evaluation.generation.prompts import Asked, in_batches, messages_of, tokenize_questions
from vapr.evaluation.generation.settings import Settings
from vapr.evaluation.scoring.prediction import Question

MODELS = ("small-qwen2.5-vl", "small-llava")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of few questions; nothing is recorded")
    options = parser.parse_args()
    if options.quick:
        options.questions, options.batch_size, options.max_new_tokens, options.rounds = 4, 2, 4, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            for row in compare(name, Path(folder), device, options):
                print(row if options.quick else record("generation", **row), flush=True)


def compare(name: str, folder: Path, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all arms on one model; their answers are checked to be the same."""
    subject = Subject(SHAPES[name], folder / "model", device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = subject.model(dtype).eval()
    settings = Settings(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    questions = ask(folder, subject.words, options.questions)
    arms = Arms(subject, model, questions, settings)
    runs: dict[str, Callable[[], list[str]]] = {
        "vapr": arms.vapr, "generate": arms.plain, "generate, inputs ready": arms.ready,
    }  # fmt: skip
    said = {arm: run() for arm, run in runs.items()}
    same = {arm: sum(a == b for a, b in zip(texts, said["generate"], strict=True)) for arm, texts in said.items()}
    if device.type == "cpu" and set(same.values()) != {len(questions)}:
        raise SystemExit(f"answers differ: {same} of {len(questions)} are those of plain generate")
    cpu: dict[str, list[float]] = {arm: [] for arm in runs}
    timings = measure(
        {arm: watched(run, cpu[arm]) for arm, run in runs.items()}, rounds=options.rounds, warmup=1, device=device
    )
    common = {
        "model": name, "dtype": str(dtype).removeprefix("torch."), "questions": len(questions),
        "batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens,
        "load_average": os.getloadavg()[0], "processes": runnable(),
    }  # fmt: skip
    plain, plain_cpu = timings["generate"].p50, statistics.median(cpu["generate"])
    return [
        {
            **common, "arm": arm, **timing.fields(), "questions_per_second": len(questions) / timing.p50,
            "to_generate": plain / timing.p50, "cpu_seconds_p50": statistics.median(cpu[arm]),
            "cpu_to_generate": plain_cpu / statistics.median(cpu[arm]), "same_answers": same[arm],
        }
        for arm, timing in timings.items()
    ]  # fmt: skip


class Arms:
    """Three ways to the same answers."""

    def __init__(self, subject: Subject, model: Any, questions: list[Question], settings: Settings) -> None:
        self.processor = subject.new_processor()
        self.model, self.questions, self.settings = model, questions, settings
        self.batches = in_batches(tokenize_questions(questions, self.processor), settings.batch_size or 1)
        self.plain_processor = trl_processor(self.processor, subject.folder)
        self.plain_processor.tokenizer.padding_side = "left"
        self.inputs = [self.prepare(batch) for batch in self.batches]

    def vapr(self) -> list[str]:
        """What vapr eval does, from files to texts; no picture is remembered from the round before."""
        self.processor.remember_images(512 * 2**20)
        answers = answer_questions(self.model, self.processor, self.questions, self.settings, quiet=True)
        return [answer.prediction for answer in answers]

    def plain(self) -> list[str]:
        """transformers' processor, generate and batch_decode, one batch after another."""
        return self._in_order([self._generate(self.prepare(batch)) for batch in self.batches])

    def ready(self) -> list[str]:
        """The same with every batch in memory already: generate alone."""
        return self._in_order([self._generate(inputs) for inputs in self.inputs])

    def prepare(self, batch: list[Asked]) -> Any:
        template = self.plain_processor.apply_chat_template
        texts = [template(messages_of(one.question), add_generation_prompt=True) for one in batch]
        images = [[Image.open(image).convert("RGB") for image in one.images] for one in batch]
        inputs = self.plain_processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _generate(self, inputs: Any) -> list[str]:
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=self.settings.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.plain_processor.batch_decode(new, skip_special_tokens=True)]

    def _in_order(self, texts: list[list[str]]) -> list[str]:
        by_id = {
            one.question.id: text
            for batch, said in zip(self.batches, texts, strict=True)
            for one, text in zip(batch, said, strict=True)
        }
        return [by_id[question.id] for question in self.questions]


def ask(folder: Path, words: list[str], count: int) -> list[Question]:
    """Questions of 8 to 20 words with a photograph each, half of which are asked about twice."""
    draws, noise = random.Random(0), np.random.default_rng(0)
    photos = [write_photo(folder / f"{n}.jpg", noise) for n in range(max(1, count * 2 // 3))]
    return [
        Question(
            benchmark="pope", id=str(n), question=" ".join(draws.choices(words, k=draws.randint(8, 20))),
            answer="yes", images=(photos[n % len(photos)],),
        )
        for n in range(count)
    ]  # fmt: skip


def watched(run: Callable[[], Any], cpu: list[float]) -> Callable[[], Any]:
    """The run, which adds the CPU seconds of all its threads to a list: they do not grow with what runs beside."""

    def watch() -> Any:
        began = time.process_time()
        run()
        cpu.append(time.process_time() - began)

    return watch


def runnable() -> int:
    """Processes of this machine that run or wait for a core now, this one included."""
    with open("/proc/loadavg", encoding="ascii") as file:
        return int(file.read().split()[3].split("/")[0])


if __name__ == "__main__":
    main()
