"""A comparison as tables for the terminal and for the page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from vapr.evaluation.compare.changes import SHOWN
from vapr.evaluation.compare.written import decimal, headline_text, own, p_text, percent, plain
from vapr.evaluation.scoring.answers import POLICIES
from vapr.terminal import table_console, text_table

Result = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]

SPLITS_SHOWN = 6
"""Splits of a benchmark up to which tables list them; JSON has all, and the page folded up."""

BIAS_COLUMNS = {
    "yes_rate": "yes", "gap": "yes - truth", "fpr": "FPR", "fnr": "FNR", "balanced_accuracy": "balanced",
    "d_prime": "d'", "criterion": "criterion",
}  # fmt: skip
PLAIN = ("d_prime", "criterion")  # are no shares


def figure_table(result: Result, most_splits: int | None = None) -> Table:
    """Return a row for each model on each benchmark and split.

    Args:
        result: of :func:`vapr.evaluation.compare.measure.compare`.
        most_splits: splits up to which a benchmark's are listed; None for all.
    """
    heads = ["benchmark", "model", "questions", "accuracy", "headline", "yes rate", "unparsed"]
    rows = []
    for name, part in result["benchmarks"].items():
        if not part["scored"]:
            rows += [
                [name, model["name"], f"{part['questions']:,}", f"not scored: {part['why']}", _stored(model), "", ""]
                for model in part["models"]
            ]
            continue
        headline = part["headline"]
        for label, members in _listed(name, part, most_splits):
            for model in members["models"]:
                quoted = label == name and headline != "accuracy"
                rows.append([
                    label, model["name"], f"{members['questions']:,}", percent(model["accuracy"]),
                    headline_text(headline, model["headline"]) if quoted else "",
                    _yes_rate(model), percent({**model["unparsed_rate"], "interval": None}),
                ])  # fmt: skip
        if most_splits is not None and len(part["splits"]) > most_splits:
            rows.append([f"{name} / {len(part['splits'])} splits: on the page, or --json", *[""] * (len(heads) - 1)])
    return heads, rows


def _listed(name: str, part: Result, most_splits: int | None) -> Iterator[tuple[str, Result]]:
    """Yield a benchmark and its splits, if there are several, by the names that tables give them."""
    yield name, part
    if len(part["splits"]) > 1 and (most_splits is None or len(part["splits"]) <= most_splits):
        yield from ((f"{name} / {split}", members) for split, members in part["splits"].items())


def _stored(model: Result) -> str:
    stored = model["stored"]
    if stored is None:
        return ""
    return f"{headline_text(stored['name'], stored)} (scores.json, {stored['questions']:,} questions)"


def _yes_rate(model: Result) -> str:
    if model["yes_rate"]["value"] is None:
        return ""
    said, truth = (percent({**model[key], "interval": None}) for key in ("yes_rate", "gold_yes_rate"))
    return f"{said} (truth {truth})"


def comparison_table(result: Result, most_splits: int | None = None) -> Table:
    """Return a row for each comparison with the first model, of each benchmark and split."""
    heads = [
        "benchmark", "model", "difference", "lost", "won", "p", "p corrected", "could show",
        "headline",
    ]  # fmt: skip
    rows = []
    for name, part in result["benchmarks"].items():
        for label, members in _listed(name, part, most_splits):
            for compared in members["comparisons"]:
                tested, quoted = compared["mcnemar"], label == name and part["headline"] != "accuracy"
                rows.append([
                    label, compared["name"], percent(compared["difference"], signed=True), f"{tested['only_a']:,}",
                    f"{tested['only_b']:,}", p_text(compared["p"]),
                    p_text(compared["p_holm"]) if "p_holm" in compared else "", f"{100 * compared['detectable']:.1f}",
                    headline_text(part["headline"], compared["headline"], signed=True) if quoted else "",
                ])  # fmt: skip
    return heads, rows


def change_table(result: Result) -> Table:
    """Return a row for each comparison: how many questions changed how, and what that adds to the difference."""
    heads = ["benchmark", "model", *SHOWN, "by knowledge", "by format", "sum"]
    rows = []
    for name, part in result["benchmarks"].items():
        for compared in part["comparisons"]:
            kinds, changed = compared["changes"]["kinds"], compared["changes"]
            points = (changed["knowledge"], changed["format"], compared["difference"]["value"])
            rows.append([
                name, compared["name"], *(_kind_text(kind, kinds[kind]) for kind in SHOWN),
                *(decimal(100 * value, 1, True) for value in points),
            ])  # fmt: skip
    return heads, rows


def _kind_text(name: str, kind: Result) -> str:
    """Write a number of questions; of those that became unparsed or parsed also how many are a loss or a gain."""
    side = {"became unparsed": "right_before", "became parsed": "right_now"}.get(name)
    if side is None or not kind["questions"]:
        return f"{kind['questions']:,}"
    return f"{kind['questions']:,} ({kind[side]:,.0f} right {'before' if side == 'right_before' else 'now'})"


def bias_table(result: Result) -> Table:
    """Return a row for each model on each set of yes/no questions, and one for each difference; empty without any."""
    heads = ["benchmark", "model", *BIAS_COLUMNS.values()]
    rows = []
    for name, part in result["benchmarks"].items():
        for signed, members in ((False, part["models"]), (True, part["comparisons"])):
            rows += [
                [
                    name,
                    f"{one['name']} - {result['first']}" if signed else one["name"],
                    *(_bias_text(key, one["yes_bias"][key], signed=signed) for key in BIAS_COLUMNS),
                ]
                for one in members
                if one.get("yes_bias")
            ]
    return heads, rows


def _bias_text(key: str, figure: Result, *, signed: bool = False) -> str:
    return plain(figure, signed=signed) if key in PLAIN else percent(figure, signed=signed)


def policy_table(result: Result) -> Table:
    """Return a row for each model on each benchmark: its accuracy and unparsed answers under every policy."""
    rows = []
    for name, part in result["benchmarks"].items():
        if part["scored"]:
            rows += [
                [name, model["name"], *(_policy_text(model["policies"][policy]) for policy in POLICIES)]
                for model in part["models"]
            ]
    return ["benchmark", "model", *POLICIES], rows


def _policy_text(figures: Result) -> str:
    if figures["accuracy"] is None:
        return "not read"
    return f"{100 * figures['accuracy']:.1f} ({100 * figures['unparsed_rate']:.1f} unparsed)"


def own_table(result: Result) -> Table:
    """Return a row for each figure of a benchmark's own, with every model's value."""
    rows = []
    for name, part in result["benchmarks"].items():
        if part["scored"]:
            figures = [model["figures"] for model in part["models"]]
            rows += [[name, key, *(own(model.get(key)) for model in figures)] for key in figures[0]]
    return ["benchmark", "figure", *(folder["name"] for folder in result["folders"])], rows


def explanations(result: Result) -> list[str]:
    """Return how the figures were made, in sentences."""
    lines = [
        f"Answers are read as '{result['policy']}'. Shares and differences are in percent and points, in brackets 95 % "
        f"intervals over pictures; differences are a model minus {result['first']}, question by question.",
        "p is McNemar's test; where pictures have several questions, a test that takes them as one (signs of the "
        "pictures' differences flipped). Lost and won: questions that only the first, or only this model gets right. "
        "'could show' is the difference that McNemar's test shows in four cases of five with so many questions, if as "
        "many answers change.",
    ]
    if result["tests"] > 1:
        lines.append(
            f"p corrected is Holm's over the {result['tests']} comparisons of whole benchmarks shown; splits are not "
            "in it."
        )
    return lines


def show(result: Result) -> str:
    """Return the tables for the terminal."""
    console = table_console(4)
    with console.capture() as capture:
        for title, table in (
            (f"answers read as '{result['policy']}'", figure_table(result, SPLITS_SHOWN)),
            (f"against {result['first']}", comparison_table(result, SPLITS_SHOWN)),
            ("what changed", change_table(result)),
            ("yes and no", bias_table(result)),
        ):
            if table[1]:
                console.print(text_table(*_once(table), title=title))
                console.print()
        for line in explanations(result):
            console.print(Text(line))
        for note in result["notes"]:
            console.print(Text(f"note: {note}", style="yellow"))
    return capture.get().rstrip("\n")


def _once(table: Table) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return a table that names each benchmark in the first of its rows only."""
    heads, rows = table
    names = [row[0] for row in rows]
    return heads, [["" if n and name == names[n - 1] else name, *row[1:]] for n, (name, row) in
                   enumerate(zip(names, rows, strict=True))]  # fmt: skip
