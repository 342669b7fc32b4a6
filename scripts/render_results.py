"""Markdown tables of bench/results/*.jsonl: for every case the rows of its newest run.

    python scripts/render_results.py [FOLDER] [--bench NAME] [--write FILE | --check FILE]

``--write`` replaces the block between the markers below with the headline (training steps, data as shipped, the arms a
reader asks for first; the data path at its ends), or with the tables of one benchmark; ``--check`` exits 1 if that
block is out of date. Without either, every table is printed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
HEADLINE_ARMS = (
    "trl", "trl cached", "trl compact", "trl compact cached",
    "vapr shared online", "vapr shared cached", "vapr image-shared cached",
)  # fmt: skip
ABOUT_THE_RUN = ("bench", "run", "time", "commit", "device", "threads", "versions")

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--bench", metavar="NAME", help="tables of this benchmark only")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = [row for row in read_rows(options.folder) if options.bench in (None, row["bench"])]
    file = options.write or options.check
    if file is None:
        print(render(rows))
        return 0
    old = file.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        print(f"{file}: no '{BEGIN}' ... '{END}' block in it; add the two lines where the tables belong")
        return 2
    new = replace_block(old, render([row for row in rows if options.bench or is_headline(row)]))
    if options.write:
        file.write_text(new, encoding="utf-8")
    elif new != old:
        which = f"--bench {options.bench} " if options.bench else ""
        print(f"{file}: its results are out of date; run scripts/render_results.py {which}--write {file}")
        return 1
    return 0


def read_rows(folder: Path) -> list[Row]:
    """All rows of a folder, oldest first."""
    rows = [
        json.loads(line)
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(rows, key=lambda row: row["time"])  # stable: rows of one second keep their order


def render(rows: list[Row]) -> str:
    """Every bench's tables, one after another."""
    parts = []
    for bench in sorted({row["bench"] for row in rows}, reverse=True):  # training steps first
        of_bench = [row for row in rows if row["bench"] == bench]
        tables = {
            "train_step": train_step_tables, "data_path": data_path_tables, "offline_compile": offline_compile_tables,
            "editing": editing_tables,
        }.get(bench)  # fmt: skip
        if tables is None and all("pass" in row for row in of_bench):
            tables = operation_tables
        parts += tables(of_bench) if tables else plain_tables(bench, of_bench)
    return "\n\n".join(parts) if parts else "No results yet."


def is_headline(row: Row) -> bool:
    if row["bench"] == "data_path":
        return row["rows"] in (1_000, 1_000_000)
    if row.get("model", "").startswith("tiny-"):  # they are in README's table of families
        return False
    return row["bench"] == "train_step" and row["data"] == "as shipped" and row["arm"] in HEADLINE_ARMS


def newest_run(rows: list[Row], case: tuple[str, ...]) -> dict[tuple, list[Row]]:
    """Rows by case, of each case's newest run only: numbers of different runs must not be divided."""
    by_case: dict[tuple, list[Row]] = {}
    for row in rows:
        by_case.setdefault(tuple(row.get(key) for key in case), []).append(row)
    return {key: [row for row in group if row["run"] == group[-1]["run"]] for key, group in by_case.items()}


def train_step_tables(rows: list[Row]) -> list[str]:
    """One table for each device, tuning and way of feeding; a line a case, a column an arm."""
    rows = [{"mix": "equal", **row} for row in rows]  # the only rows there once were
    cases = newest_run(rows, ("device", "tuning", "data", "model", "workload", "mix"))
    tables = []
    groups = dict.fromkeys(key[:3] for key in cases)
    for device, tuning, data in sorted(groups, key=lambda group: group[0].startswith("CPU")):  # GPUs first
        chosen = {key[3:]: group for key, group in cases.items() if key[:3] == (device, tuning, data)}
        title = f"**Training steps, pairs per second** ({device}, {tuning}, data {data}; in brackets: times TRL)"
        named = {
            (model, workload.replace("_", " ") + ("" if mix == "equal" else f", {mix}")): group
            for (model, workload, mix), group in chosen.items()
        }
        tables.append(f"{title}\n\n{side_by_side(named, ['model', 'workload'], 'arm', train_step_cell)}")
    return tables


def side_by_side(groups: dict[tuple, list[Row]], left: list[str], key: str, cell: Callable[[Row | None], str]) -> str:
    """A line a case, a column for each value of ``key``, and the commit."""
    columns = list(dict.fromkeys(row[key] for group in groups.values() for row in group))
    lines = [[*left, *columns, "commit"]]
    for case, group in groups.items():
        found = {row[key]: row for row in group}
        lines.append([*case, *(cell(found.get(column)) for column in columns), commit_cell(group[-1])])
    return table(lines)


def train_step_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "pairs_per_second" not in row:
        return f"refused: {row['refused']}" if "refused" in row else row.get("absent", "")
    ratio = row.get("speedup_over_trl")
    share = f", {row['useful_share']:.0%} of peak" if ratio is None and "useful_share" in row else ""
    return f"{row['pairs_per_second']:.2f}" + (
        f" ({ratio:.1f}x)" if ratio is not None and row["arm"] != "trl" else share
    )


def data_path_tables(rows: list[Row]) -> list[str]:
    """One table a device: a line for each size of file and provider."""
    cases = newest_run(rows, ("device", "rows", "provider"))
    tables = []
    for device in dict.fromkeys(key[0] for key in cases):
        lines = [["rows in file", "provider", "pairs/s", "seconds to first step", "resident MiB", "commit"]]
        for (_, num_rows, provider), group in sorted(item for item in cases.items() if item[0][0] == device):
            last = group[-1]
            numbers = [last.get("absent", ""), "", ""]
            if "absent" not in last:
                values = (last["pairs_per_second"], last["first_step_seconds"], last["resident_mib"])
                numbers = [f"{value:,.{digits}f}" for value, digits in zip(values, (1, 2, 0), strict=True)]
            lines.append([f"{num_rows:,}", provider, *numbers, commit_cell(last)])
        tables.append(f"**Data path** ({device})\n\n{table(lines)}")
    return tables


def editing_tables(rows: list[Row]) -> list[str]:
    """Two tables a device: what editing adds to the language model's time, and the rules editor by rows."""
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        parts = {part: [row for row in rows if (row["device"], row["part"]) == (device, part)] for part in EDITING}
        for part, (title, left, columns) in EDITING.items():
            lines = [[*left, *columns, "commit"]]
            for _, group in sorted(newest_run(parts[part], left).items()):
                last = group[-1]
                numbers = [f"{last[key]:,.{digits}f}" if key in last else "" for key, digits in columns.values()]
                lines.append([*(f"{last[key]:,}" if isinstance(last[key], int) else last[key] for key in left),
                              *numbers, commit_cell(last)])  # fmt: skip
            if len(lines) > 1:
                tables.append(f"**Editing, {title}** ({device})\n\n{table(lines)}")
    return tables


EDITING: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, int]]]] = {
    "overhead": (
        "beside the language model alone", ("model", "turns", "arm"),
        {"seconds": ("seconds_p50", 2), "ms an answer": ("ms_per_turn", 1),
         "over vLLM alone, %": ("overhead_percent", 1)},
    ),
    "scale": (
        "by rules", ("rows", "workers"),
        {"seconds": ("seconds", 0), "of them reading": ("scan_seconds", 0), "rows/s": ("rows_per_second", 0),
         "accepted": ("accepted", 0), "peak MiB": ("peak_private_mib", 0)},
    ),
}  # fmt: skip
"""Title, fields that name a case, and the columns: the field of each and its digits."""


def operation_tables(rows: list[Row]) -> list[str]:
    """One table a device and pass of an operation: a line for each shape and number of rows, a column a provider."""
    cases = newest_run(rows, ("device", "pass", "shape", "rows"))
    tables = []
    for device, name in dict.fromkeys(key[:2] for key in cases):
        chosen = {key[2:]: group for key, group in cases.items() if key[:2] == (device, name)}
        title = f"**{rows[0]['bench']}, {name}, ms** ({device}; in brackets: of the ceiling measured beside it)"
        named = {(shape, f"{number:,}"): group for (shape, number), group in chosen.items()}
        tables.append(f"{title}\n\n{side_by_side(named, ['shape', 'rows'], 'provider', operation_cell)}")
    return tables


def operation_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "absent" in row:
        return row["absent"]
    kept = f", keeps {row['kept_bytes'] / 2**20:,.2f} MiB" if "kept_bytes" in row else ""
    return f"{1e3 * row['seconds_p50']:.3g} ({row['ceiling_share']:.0%}){kept}"


def offline_compile_tables(rows: list[Row]) -> list[str]:
    """One table of the newest run: a line a kernel and dtype, a column a generation; the worst of its variants."""
    rows = [row for row in rows if row["run"] == rows[-1]["run"] and "kernel" in row]
    capabilities = sorted({row["capability"] for row in rows})
    lines = [["kernel", "dtype", *(f"sm_{capability}" for capability in capabilities)]]
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        cells = []
        for capability in capabilities:
            of_kernel = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
            cells.append(offline_compile_cell([row for row in of_kernel if row["capability"] == capability]))
        lines.append([f"`{kernel.strip('_').removesuffix('_kernel')}`", dtype, *cells])
    compiler = f"triton {rows[-1]['versions']['triton']}, commit {commit_cell(rows[-1])}"
    title = f"**Compiled offline** ({compiler}; registers, spills, KiB of shared memory, units)"
    return [f"{title}\n\n{table(lines)}"]


def offline_compile_cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    most = lambda key: max(row[key] for row in rows)
    units = [name for name, key in (("HGMMA", "hgmma"), ("HMMA", "hmma"), ("TMA", "tma")) if most(key)]
    return ", ".join([f"{most('registers')}, {most('spills')}, {most('shared') / 1024:.0f}", *units])


def plain_tables(bench: str, rows: list[Row]) -> list[str]:
    """One table a device: every text field names the case, as does the GPU compiled for; every number is a column."""
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        on_device = [row for row in rows if row["device"] == device]
        fields = [key for row in on_device for key in row if key not in ABOUT_THE_RUN]
        named = {key for row in on_device for key, value in row.items() if isinstance(value, str)} | {"capability"}
        texts = [key for key in dict.fromkeys(fields) if key in named]
        numbers = [key for key in dict.fromkeys(fields) if key not in texts]
        groups = newest_run(on_device, tuple(texts))
        lines = [[*(name.replace("_", " ") for name in (*texts, *numbers)), "commit"]]
        for key, group in groups.items():
            last = group[-1]
            values = [number_cell(last.get(name)) for name in numbers]
            lines.append([*("" if text is None else str(text) for text in key), *values, commit_cell(last)])
        tables.append(f"**{bench}** ({device})\n\n{table(lines)}")
    return tables


def number_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commit_cell(row: Row) -> str:
    """The commit; a dirty one may be shown but not quoted."""
    commit = row["commit"]
    return f"{commit.removesuffix('-dirty')[:8]} (dirty)" if commit.endswith("-dirty") else commit[:8]


def table(lines: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(cells) + " |" for cells in lines)
    rule = "|" + " --- |" * len(lines[0])
    return "\n".join([head, rule, *body])


def replace_block(text: str, block: str) -> str:
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
