"""What ``vapr study`` prints at its end: a table of each measure, the page, and what to run next."""

import shlex
from pathlib import Path
from typing import Any

from vapr.pages.study_report import counted, table
from vapr.terminal import table_console, text_table


def show(result: dict[str, Any]) -> None:
    """Print the tables of what :func:`vapr.study.run_study.run_study` returned."""
    console = table_console(3)
    for name, measure in result["measures"].items():
        console.print(text_table(*table(measure), title=f"{name}: {measure['questions']:,} questions"))
        console.print()
    console.print(counted(result["cells"]), markup=False)
    console.print(f"page       {Path(result['out']) / 'study.html'}", markup=False)
    trained = [cell["run"] for cell in result["cells"] if cell["state"] == "trained"]
    if trained:
        largest = shlex.quote(trained[-1])
        console.print(f"next       vapr export {largest} --out {largest}-model", markup=False)
