"""Look for mistakes before the first stage of scripts/reproduce.sh, and write its page.

python scripts/reproduction.py check RECIPE [--set KEY=VALUE]... [--bench NAME=PATH]...
python scripts/reproduction.py page OUT NAME               # writes OUT/NAME/reproduction.html
"""

import argparse
import importlib.util
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in (".", "kernels")]

from vapr.config import Config  # noqa: E402
from vapr.errors import UserError  # noqa: E402
from vapr.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from vapr.pages.curves import read_metrics  # noqa: E402
from vapr.pages.figures import mapping  # noqa: E402
from vapr.pages.reproduction import Reproduction, write_reproduction_page  # noqa: E402
from vapr.study.evaluate_models import open_sets  # noqa: E402


def check(recipe: Path, settings: Sequence[str], benches: Sequence[str]) -> None:
    """Find what would stop the third stage or the fourth, hours later.

    Raises:
        UserError: for a setting or a benchmark that cannot be used, or a library that is missing.
    """
    config = Config.load(recipe, settings)
    needs = [config.policy.base_weights] if config.policy.base_weights == "nf4" else []
    needs += [config.optim.kind] if config.optim.kind.endswith("8bit") else []
    if needs and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{recipe}: {' and '.join(needs)} need bitsandbytes: pip install 'vapr[quant]'")
    open_sets(benches, None, 0)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    checking, page = what.add_parser("check"), what.add_parser("page")
    checking.add_argument("recipe", type=Path)
    checking.add_argument("--set", dest="settings", action="append", default=[])
    checking.add_argument("--bench", dest="benches", action="append", default=[])
    page.add_argument("out", type=Path)
    page.add_argument("name")
    options = parser.parse_args()
    try:
        if options.what == "check":
            check(options.recipe, options.settings, options.benches)
        else:
            path = options.out / options.name / "reproduction.html"
            print(write_reproduction_page(path, read(options.out, options.name)))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
