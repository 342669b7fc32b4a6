"""What a run of the training-step benchmark comes to: a table a case, and one JSON document of ratios."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

MODELS = {
    "small-qwen2.5-vl": "qwen", "qwen2.5-vl-7b": "qwen", "small-llava": "llava", "llava-1.5-7b": "llava",
    "deep-qwen2.5-vl": "deep_qwen", "deep-llava": "deep_llava", "qwen2.5-vl-3b": "qwen_3b",
}  # fmt: skip
TIMES_TRL = {
    "captions_cached": ("captions", "vapr shared cached"),
    "captions_online": ("captions", "vapr shared online"),
    "short_cached": ("answers", "vapr shared cached"),
    "short_online": ("answers", "vapr shared online"),
    "image4_cached": ("four_per_image", "vapr image-shared cached"),
    "image4_online": ("four_per_image", "vapr image-shared online"),
}
"""Workload and arm of each ratio to TRL as shipped."""
WORKLOADS = {"answers": "answers", "captions": "captions", "four_per_image": "image4"}


def document(rows: Sequence[Row], against: str | None) -> dict[str, Any]:
    """The ratios of a run's rows; None for one that was not measured, or whose arm was refused.

    Returns:
        ``ratio_vs_trl``: pairs a second over TRL's, Qwen and rows of one length; ``by_model``: the same and one more
        for every model; ``by_model_spread``: for realistic rows, if there were any; ``ratio_vs_commit``: None without
        another commit, else ``speed`` (pairs a second) and ``memory`` (that a step adds) over its, by model and
        workload; ``refused``: the arms that did other work.
    """
    shipped = [row for row in rows if row.get("data") == "as shipped"]
    mixes = {mix: [row for row in shipped if row["mix"] == mix] for mix in ("equal", "spread")}
    by_model = {mix: times_trl(of_mix) for mix, of_mix in mixes.items()}
    qwen = by_model["equal"].get("qwen", dict.fromkeys(TIMES_TRL))
    out: dict[str, Any] = {
        "ratio_vs_trl": {key: qwen[key] for key in TIMES_TRL if key != "image4_online"},
        "ratio_vs_commit": over_commit(shipped) if against else None,
        "against": against,
        "by_model": by_model["equal"],
    }
    if by_model["spread"]:
        out["by_model_spread"] = by_model["spread"]
    where = ("model", "workload", "mix", "arm")
    out["refused"] = [" ".join(row[key] for key in where) + f": {row['refused']}" for row in rows if "refused" in row]
    return out


def times_trl(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Model -> key of ``TIMES_TRL`` -> ratio."""
    found = {(row["model"], row["workload"], row["arm"]): row.get("speedup_over_trl") for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    return {
        MODELS.get(model, model): {
            key: rounded(found.get((model, *workload_and_arm))) for key, workload_and_arm in TIMES_TRL.items()
        }
        for model in models
    }


def over_commit(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Case -> speed and memory over the other commit's."""
    out = {}
    for row in rows:
        if "against" in row:
            mix = "" if row["mix"] == "equal" else f"_{row['mix']}"
            case = f"{MODELS.get(row['model'], row['model'])}_{WORKLOADS[row['workload']]}{mix}"
            out[case] = {key: rounded(row.get(f"{key}_over_commit")) for key in ("speed", "memory")}
    return out


def rounded(ratio: float | None) -> float | None:
    """Three decimals are more than a ratio of timings has."""
    return None if ratio is None else round(ratio, 3)


def console() -> Console:
    """Wide enough for the tables, also where a log is all there is."""
    return Console(width=max(Console().width, 160))


def show(rows: Sequence[Row], about: Row) -> None:
    """Print a case's table."""
    table = Table(title=" ".join(str(value) for value in about.values()), title_justify="left")
    columns = (
        "arm", "data", "pairs/s", "ms p20/p50/p80", "vs trl", "vs compact", "vs commit", "step MiB", "tokens",
        "gradient gap", "loss gap",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("arm", "data") else "right", no_wrap=column == "arm")
    for row in rows:
        if "pairs_per_second" not in row:
            reason = f"refused: {row['refused']}" if "refused" in row else row.get("absent", "")
            table.add_row(row["arm"], row["data"], reason)
            continue
        ms = "/".join(f"{1e3 * row[f'seconds_{p}']:.0f}" for p in ("p20", "p50", "p80"))
        optional = [
            (f"{row[key]:{form}}" if row.get(key) is not None else "")
            for key, form in (
                ("speedup_over_trl", ".2f"), ("speedup_over_trl_compact", ".2f"), ("speed_over_commit", ".2f"),
                ("step_mib", ".0f"), ("tokens", "d"), ("gradient_gap", ".1e"), ("loss_gap", ".1e"),
            )
        ]  # fmt: skip
        table.add_row(row["arm"], row["data"], f"{row['pairs_per_second']:.2f}", ms, *optional)
    console().print(table)
