"""Tables on the terminal, for the commands that print figures side by side."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def table_console(num_columns: int) -> Console:
    """Open a console for tables of ``num_columns`` sets of figures; a log, which has no edge, gets room for all."""
    console = Console(highlight=False, emoji=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, emoji=False, width=max(200, 30 + 45 * num_columns))


def text_table(
    heads: Sequence[str], rows: Sequence[Sequence[str | Text]], *, gap: int = 2, title: str | None = None
) -> Table:
    """Lay out cells in columns ``gap`` apart, without lines between them; nothing in a cell is taken for markup."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), title=title and Text(title), title_justify="left")
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table
