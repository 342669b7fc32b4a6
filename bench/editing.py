"""What vapr edit costs beside the language model, and how it grows with the source.

    python -m bench.editing overhead        # against vLLM alone on the same prompts; needs vLLM
    python -m bench.editing scale           # the rules editor on 10,000 to 1,000,000 rows; no GPU needed
    python -m bench.editing replies         # replies kept and found among 10,000 to 1,000,000; no GPU, no vLLM

How to read the rows: bench/README.md.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from bench.data_arms import resident_mib
from bench.editing_rows import open_rows, rows, write_images, write_rows
from bench.record import REPOSITORY, measure, record

SECONDS_BETWEEN_SAMPLES = 0.5
SMALL_MODEL = Path.home() / ".cache" / "vapr-tests" / "smollm2-135m-instruct"
"""Where the tests keep SmolLM2-135M-Instruct."""


def main() -> None:
    options = parse_options()
    keep: Callable[..., dict[str, Any]] = (lambda _, **fields: fields) if options.quick else record
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), options.images)
        if options.part == "overhead":
            overhead(options, Path(folder), images, keep)
        elif options.part == "replies":
            replies(options.rows, Path(folder), keep)
        else:
            for num_rows in options.rows:
                scale(num_rows, options.workers, Path(folder), images, keep)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("overhead", "scale", "replies"))
    parser.add_argument("--model", default=str(SMALL_MODEL), help="overhead: folder or hub id of the language model")
    parser.add_argument("--turns", type=int, default=None, help="overhead: answers of the unit, all asked")
    parser.add_argument("--rounds", type=int, default=None, help="overhead: times each arm is timed")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=None, help="scale: rows of each file; replies: how many are kept"
    )
    parser.add_argument("--workers", type=int, default=2, help="scale: processes")
    parser.add_argument("--images", type=int, default=1_000, help="distinct images")
    parser.add_argument("--quick", action="store_true", help="small numbers; nothing is recorded")
    options = parser.parse_args()
    options.turns = options.turns or (8 if options.quick else 256)
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.rows = options.rows or ([2_000] if options.quick else [10_000, 100_000, 1_000_000])
    return options


# Overhead


def overhead(options: argparse.Namespace, folder: Path, images: list[str], keep: Callable[..., dict[str, Any]]) -> None:
    """A unit of vapr edit, the part of it that asks, and vLLM's own chat on the same prompts, one each a round."""
    from bench.editing_arms import Asking, Bare, Known, WholeUnit, WholeUnitKept, timed_alone
    from vapr.editing.config import EditConfig
    from vapr.editing.draft.editor import Editor
    from vapr.editing.job.start import Start, open_editor

    source = write_rows(folder / "open.jsonl", open_rows(options.turns, images))
    settings = ("ask.attempts=1", "ask.max_tokens=128", "engine.max_model_len=2048")
    config = EditConfig.load(None, settings)
    start = Start(source=str(source), folder=folder, editor=options.model, config=config, cache=False)
    with open_editor(start) as editor:
        llm = editor.mix.models[0]
        known = Known(llm)
        alone = WholeUnit(start, Editor(config, editor.categories, known), folder)
        alone.prepare()
        alone()
        if len(known.requests) != options.turns:
            raise RuntimeError(
                f"{len(known.requests)} requests for {options.turns} answers: not all of them were asked"
            )
        arms = {
            "vapr edit": WholeUnit(start, editor, folder),
            "vapr edit, replies kept": WholeUnitKept(start, editor, folder),
            "vapr ask": Asking(llm, known.requests),
            "vLLM chat": Bare(llm, known.requests), "vapr alone": alone,
        }  # fmt: skip
        timings = measure(arms, rounds=options.rounds, warmup=1, device=torch.device("cpu"), clock=timed_alone)
        if len({arm.generated for arm in arms.values()}) > 1:
            raise RuntimeError(f"not the same work: { ({name: arm.generated for name, arm in arms.items()}) } tokens")
        for name, timing in timings.items():
            fields = {
                "part": "overhead", "arm": name, "model": llm.name, "engine": llm.engine,
                "turns": options.turns, "generated_tokens": arms[name].generated, **timing.fields(),
                "ms_per_turn": 1e3 * timing.p50 / options.turns,
            }  # fmt: skip
            if name != "vapr alone":
                shares = [a / b - 1 for a, b in zip(timing.seconds, timings["vLLM chat"].seconds, strict=True)]
                fields["overhead_percent"] = 100 * statistics.median(shares)
            print(json.dumps(keep("editing", **fields)), flush=True)


# Scale


def scale(num_rows: int, workers: int, folder: Path, images: list[str], keep: Callable[..., dict[str, Any]]) -> None:
    """A whole ``vapr edit --editor rules``, from a new process to its end, watched from outside."""
    source = write_rows(folder / f"rows-{num_rows}.jsonl", rows(num_rows, images))
    out = folder / f"job-{num_rows}"
    command = [sys.executable, "-m", "vapr.cli", "edit", str(source), "--out", str(out), "--workers", str(workers)]
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    # An empty cache: the index of the rows is built anew, as in a first run.
    caches = {"XDG_CACHE_HOME": str(folder / f"cache-{num_rows}")}
    environment = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (folder / "log").open("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen([*command, "--json"], env=environment, stdout=subprocess.DEVNULL, stderr=log)
        watched = watch(process, out / "scan.json", began)
        if process.returncode:
            raise RuntimeError(f"vapr edit ended with {process.returncode}:\n{Path(log.name).read_text()[-3000:]}")
    ledger = json.loads((out / "ledger.json").read_text())
    fields = {
        "part": "scale", "editor": "rules", "rows": num_rows, "workers": workers, "images": len(images),
        "source_mib": source.stat().st_size / 2**20, "turns": ledger["turns"]["done"], "accepted": ledger["accepted"],
        **watched, "rows_per_second": num_rows / watched["seconds"],
        "edited_per_second": ledger["turns"]["done"] / (watched["seconds"] - watched["scan_seconds"]),
        "out_mib": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**20,
    }  # fmt: skip
    print(json.dumps(keep("editing", **fields)), flush=True)
    source.unlink()


# Replies that are kept

SHARD = 5_000


def replies(counts: list[int], folder: Path, keep: Callable[..., dict[str, Any]]) -> None:
    """Keep replies of a model that needs no time, a shard after the other, and find each shard's again."""
    from bench.editing_arms import Instant
    from vapr.editing.draft import prompts
    from vapr.editing.rules.categories import load_categories
    from vapr.llm.cached import CachedModel
    from vapr.llm.reply_cache import ReplyCache
    from vapr.llm.request import Request

    category = load_categories()["object"]
    schema, system = prompts.edit_schema(category), "Change one detail of the answer and keep everything else. " * 60
    cache = ReplyCache(str(folder / "kept"))
    llm = CachedModel(Instant(), cache, lambda llm: None)
    at = 0
    for count in counts:
        kept = found = bare = 0.0
        began_at = at
        while at < count:
            requests = [
                Request(({"role": "system", "content": system}, {"role": "user", "content": f"The cup {n} is blue."}),
                        schema, seed=n, max_tokens=512, temperature=0.7)
                for n in range(at, min(at + SHARD, count))
            ]  # fmt: skip
            times = []
            for model in (Instant(), llm, llm):
                began = time.perf_counter()
                model.ask(requests)
                times.append(time.perf_counter() - began)
            bare, kept, found = bare + times[0], kept + times[1], found + times[2]
            at += len(requests)
        memory = resident_mib(os.getpid())
        fields = {
            "part": "replies", "replies": count, "timed": count - began_at,
            "us_per_kept": 1e6 * (kept - bare) / (count - began_at),
            "us_per_found": 1e6 * found / (count - began_at),
            "private_mib": memory["all"] - memory["file"], "file_mib": cache.file.stat().st_size / 2**20,
        }  # fmt: skip
        print(json.dumps(keep("editing", **fields)), flush=True)
    if cache.fault:
        raise RuntimeError(cache.fault)


def watch(process: subprocess.Popen, scan: Path, began: float) -> dict[str, float]:
    """Seconds until the scan is there and until the process has ended, and the most memory that it and its children
    had at one time; ``peak_private_mib`` leaves out pages of mapped files, which the system may take back."""
    scan_seconds, peak, private = 0.0, 0.0, 0.0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a process ended while it was looked at
            now = resident_mib(process.pid)
            peak, private = max(peak, now["all"]), max(private, now["all"] - now["file"])
        if not scan_seconds and scan.exists():
            scan_seconds = time.perf_counter() - began
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "scan_seconds": scan_seconds, "peak_mib": peak, "peak_private_mib": private}


if __name__ == "__main__":
    main()
