"""Read what the stages of scripts/reproduce.sh left, and write the page that they end in.

python scripts/reproduction_page.py OUT NAME       # writes OUT/NAME/reproduction.html
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "kernels")]

from vapr.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from vapr.pages.curves import read_metrics  # noqa: E402
from vapr.pages.figures import mapping  # noqa: E402
from vapr.pages.reproduction import Reproduction, write_reproduction_page  # noqa: E402


def read(out: Path, name: str) -> Reproduction:
    """Read the files of the stages; those of a stage that was left out are None."""
    work = out / name
    run = work / "aligned"
    config = mapping((run / "config.yaml").read_text(encoding="utf-8"))
    shown = {
        "the audit of the pairs": out / "audit.html",
        "the training": run / "report.html",
        "the answers, question by question": work / "eval" / "comparison.html",
    }
    return Reproduction(
        name=name,
        model=config["policy"]["model"],
        family=family_of(run),
        config=config,
        metrics=read_metrics(run / "metrics.jsonl")[0],
        ledger=json.loads((out / "pairs" / "ledger.json").read_text(encoding="utf-8")),
        audit=_json(out / "audit.json"),
        comparison=_json(work / "eval" / "comparison.json"),
        known=sorted(BENCHMARKS),
        seconds=seconds_of(work / "stages.tsv"),
        links=[
            (title, Path(os.path.relpath(path, work)).as_posix()) for title, path in shown.items() if path.is_file()
        ],
    )


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def family_of(run: Path) -> str:
    """Return the ``model_type`` of the model that a run began from."""
    folder = Path(json.loads((run / "environment.json").read_text(encoding="utf-8"))["model_folder"])
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]


def seconds_of(file: Path) -> dict[str, float]:
    """Add up what each stage took over all starts of the script."""
    seconds: dict[str, float] = defaultdict(float)
    for line in file.read_text(encoding="utf-8").splitlines():
        stage, took, _ = line.split("\t")
        seconds[stage] += float(took)
    return dict(seconds)


def main() -> None:
    out, name = Path(sys.argv[1]), sys.argv[2]
    page = out / name / "reproduction.html"
    print(write_reproduction_page(page, read(out, name)))


if __name__ == "__main__":
    main()
