"""Lay a plan out as text."""

import shlex
from typing import Any

WIDTH = 24


def show(plan: dict[str, Any], config: str) -> str:
    """Return the plan as lines; ``config`` is the file's name, for the command that comes next."""
    lines = [*_model(plan["model"]), *_data(plan["data"]), *_flops(plan["flops"])]
    gpus = plan["gpus"]
    if len(gpus) == 1:
        lines += _gpu(gpus[0])
    else:
        lines += _side_by_side(gpus)
    if len(gpus) == 1 and gpus[0]["fits"]:
        lines.append(_line("next", f"vapr train {shlex.quote(config)}"))
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}".rstrip()


def _model(model: dict[str, Any]) -> list[str]:
    stored = model["dtype"] if model["base_weights"] == "bfloat16" else model["base_weights"]
    return [
        _line(
            "model", f"{model['name']} ({model['family']}), {model['parameters'] / 1e9:.2f} B parameters in {stored}"
        ),
        _line("trained", f"{model['tuning']}, {model['trained'] / 1e6:,.1f} M values, {model['optimizer']}"),
    ]


def _data(data: dict[str, Any]) -> list[str]:
    read = "all of them read" if data["rows_read"] >= data["rows"] else f"{data['rows_read']:,} of them read (--limit)"
    saved = data["tokens_saved"] / data["tokens_unshared"]
    lines = [
        *data["sets"],
        *data["notes"],
        _line("rows", f"{data['rows']:,}, {read}; {data['pairs']:,} pairs"),
        _line("steps", f"{data['steps']:,} in the run, {data['steps_read']:,} read"),
        _line("tokens one by one", f"{data['tokens_unshared']:,} in the steps read"),
        _line("tokens packed", f"{data['tokens']:,}, share: {data['share']} saves {saved:.1%}"),
        _line("packs", f"{data['packs']:,}, the largest {data['largest_pack']:,} of {data['max_tokens']:,} tokens"),
    ]
    lines += [
        _line("longest pairs" if number == 0 else "", f"{row['tokens']:,} tokens  {row['where']}  {row['id']}")
        for number, row in enumerate(data["longest"])
    ]
    lines += [_line("fits no pack", line) for line in data["too_long"][:5]]
    if len(data["too_long"]) > 5:
        lines.append(_line("fits no pack", f"and {len(data['too_long']) - 5:,} more rows"))
    return lines + [_line("cannot be used", f"{x['rows']:,} rows, the first: {x['first']}") for x in data["unusable"]]


def _flops(flops: dict[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in flops["parts_per_pair"].items() if value)
    lines = [
        _line("useful FLOPs", f"{_tera(flops['useful_per_pair'])} a pair, {_tera(flops['useful_per_step'])} a step"),
        _line("all FLOPs of a pair", f"{_tera(flops['total_per_pair'])}: {parts}"),
    ]
    if flops["reference_per_pair"]:
        lines.append(_line("", f"{_tera(flops['reference_per_pair'])} more where the reference is not in the cache"))
    return lines


def _tera(value: float) -> str:
    return f"{value / 1e12:,.3g} T"


def _gpu(gpu: dict[str, Any]) -> list[str]:
    took = gpu["memory_gib"] - gpu["usable_gib"]
    how = f"{gpu['gpus']} x {gpu['gpu']}, {gpu['storage']}" if gpu["gpus"] > 1 else gpu["gpu"]
    lines = [
        _line("GPU", f"{how}: {gpu['usable_gib']:.1f} GiB can be used ({took:.1f} go to driver, CUDA and check bits)"),
        _line("peak memory", f"{gpu['peak_gib']:.2f} GiB a GPU, checkpointing: {gpu['checkpointing']}, a pack of "
              f"{gpu['tokens_of_pack']:,} tokens: {'fits' if gpu['fits'] else 'DOES NOT FIT'}"),
        *(_line("", f"{gib:8.2f}  {name}") for name, gib in gpu["parts_gib"].items() if gib >= 0.005),
    ]  # fmt: skip
    if abs(gpu["peak_of_full_pack_gib"] - gpu["peak_gib"]) > 0.02 * gpu["peak_gib"]:
        lines.append(_line("", f"{gpu['peak_of_full_pack_gib']:8.2f}  a full pack (packing.max_tokens) would take"))
    lines.append(_line("largest max_tokens", _tokens_or_none(gpu["max_tokens_that_fits"])))
    lines += _changes(gpu)
    lines += _levels(gpu["levels"])
    lines += _table_of_gpus(gpu["table"])
    lines += _table_of_storage(gpu["kept"])
    return lines + _time(gpu)


def _tokens_or_none(tokens: int | None) -> str:
    return f"{tokens:,}" if tokens is not None else "none (not even the longest pair fits)"


def _changes(gpu: dict[str, Any]) -> list[str]:
    if gpu["fits"]:
        return []
    lines = []
    for number, change in enumerate(gpu["changes"]):
        verdict = "fits" if change["fits"] else "does not fit"
        setting = f"{'+ ' if len(change['set']) > 1 else ''}--set {' --set '.join(change['set'][-1].split())}"
        name = "what to change" if number == 0 else ""
        lines.append(_line(name, f"{change['peak_gib']:8.2f}  {verdict:<13}{setting}"))
    if not any(change["fits"] for change in gpu["changes"]):
        lines.append(
            _line("", "nothing that vapr knows makes it fit; take a larger GPU, more of them, or a smaller model")
        )
    return lines


def _levels(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out what each level of checkpointing (columns) saves and costs."""
    tokens = [f"{row['max_tokens_that_fits']:,}" if row["max_tokens_that_fits"] else "-" for row in rows]
    cells = {
        "policy.checkpointing": [row["checkpointing"] for row in rows],
        "  GiB a GPU": [f"{row['peak_gib']:.1f}{'' if row['fits'] else '*'}" for row in rows],
        "  largest max_tokens": tokens,
        "  FLOPs, times": [f"{row['times_flops']:.2f}" for row in rows],
    }
    return [_line(name, "".join(f"{cell:>12}" for cell in row)) for name, row in cells.items()]


def _table_of_gpus(table: list[dict[str, Any]]) -> list[str]:
    """Lay out peaks by way of storing (rows) and number of GPUs (columns), without checkpointing and with all of it."""
    counts = sorted({row["gpus"] for row in table})
    lines = [_line("GiB a GPU", "".join(f"{f'{count} GPU' + 's' * (count > 1):>18}" for count in counts))]
    peaks = {(_way(row), row["gpus"], row["checkpointing"]): row for row in table}
    for way in dict.fromkeys(_way(row) for row in table):
        cells = [(peaks.get((way, count, "none")), peaks.get((way, count, "full"))) for count in counts]
        lines.append(_line(f"  {way}", "".join(f"{_cell(pair):>18}" for pair in cells)))
    return [*lines, _line("", "checkpointing: none / full; host: kept in host memory; * does not fit")]


def _table_of_storage(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out peaks by how the base (rows) and AdamW's moments (columns) are kept."""
    found = {(row["base_weights"], row["optimizer"], row["checkpointing"]): row for row in rows}
    optims = list(dict.fromkeys(row["optimizer"] for row in rows))
    lines = [_line("GiB, base kept as", "".join(f"{optim:>18}" for optim in optims))]
    for base in dict.fromkeys(row["base_weights"] for row in rows):
        cells = (_cell((found[base, optim, "none"], found[base, optim, "full"])) for optim in optims)
        lines.append(_line(f"  {base}", "".join(f"{cell:>18}" for cell in cells)))
    return lines


def _way(row: dict[str, Any]) -> str:
    return "all-reduce" if row["storage"] == "one GPU" else row["storage"].replace("offload", "host")


def _cell(pair: tuple[dict[str, Any] | None, dict[str, Any] | None]) -> str:
    if pair[0] is None or pair[1] is None:
        return "-"
    return " / ".join(f"{row['peak_gib']:.1f}{'' if row['fits'] else '*'}" for row in pair if row is not None)


def _side_by_side(gpus: list[dict[str, Any]]) -> list[str]:
    lines = [_line("memory of the GPU", "usable      peak  largest max_tokens  what to change")]
    for gpu in gpus:
        most = f"{gpu['max_tokens_that_fits']:,}" if gpu["max_tokens_that_fits"] else "-"
        mark = " " if gpu["fits"] else "*"
        figures = f"{gpu['usable_gib']:6.1f}{gpu['peak_gib']:10.2f}{mark}{most:>19}"
        lines.append(_line(f"  {gpu['memory_gib']:g} GiB", f"{figures}  {_last_change(gpu)}"))
    return [*lines, _line("", "GiB on one GPU; * does not fit; --gpu NAME or --gpu-memory GIB shows one in full")]


def _last_change(gpu: dict[str, Any]) -> str:
    """Say with which settings a run fits that does not as it is."""
    if gpu["fits"]:
        return ""
    found = next((change for change in gpu["changes"] if change["fits"]), None)
    return " ".join(f"--set {one}" for given in found["set"] for one in given.split()) if found else "nothing fits"


def _time(gpu: dict[str, Any]) -> list[str]:
    time = gpu["time"]
    if time is None:
        return [_line("time", f"no measured rate for {gpu['gpus']} x {gpu['gpu']} with these settings")]
    lines = [
        _line("time", f"{_duration(time['seconds_per_step'])} a step, {_duration(time['seconds'])} for "
              f"{time['steps']:,} step{'s' * (time['steps'] > 1)}, the reference in the cache"),
        _line("", f"from {time['rate']}"),
    ]  # fmt: skip
    if time["times_for_checkpointing"] > 1:
        lines.append(_line("", f"times {time['times_for_checkpointing']:.2f} for what checkpointing computes again"))
    if "seconds_with_reference" in time:
        lines.append(_line("", f"{_duration(time['seconds_with_reference'])} where it is computed in the first epoch"))
        lines.append(_line("", f"from {time['rate_with_reference']}"))
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
