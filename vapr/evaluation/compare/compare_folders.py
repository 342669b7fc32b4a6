"""What ``vapr eval --compare`` does: result folders, their figures side by side, and what changed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vapr.cache import written_whole
from vapr.errors import UserError
from vapr.evaluation.compare.folders import read_folders
from vapr.evaluation.compare.measure import compare
from vapr.evaluation.compare.page_data import next_commands, page_data
from vapr.evaluation.compare.pictures import Pictures
from vapr.evaluation.compare.questions import draw
from vapr.evaluation.compare.report_text import show
from vapr.evaluation.scoring.answers import Policy
from vapr.pages.eval_compare import write_eval_compare_page


def compare_folders(
    folders: Sequence[Path], out: Path | None = None, policy: Policy = "strict", as_json: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Compare result folders, tell what came out, and write a page with JSON beside it.

    Args:
        folders: two or more; the first is what the others are held against.
        out: the page, .html; the same as JSON goes beside it under the name that ends in .json. None for neither.
        policy: how answers are read.
        as_json: say the result as JSON, and nothing else.
        say: called with what is to be printed.

    Returns:
        What :func:`vapr.evaluation.compare.measure.compare` does.

    Raises:
        UserError: if the folders cannot be compared.
    """
    if out is not None and out.suffix != ".html":
        raise UserError(f"--out {out}: the page is HTML; give a name that ends in .html")
    read = read_folders(folders)
    result, scored = compare(read, policy)
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False)
    picture_notes: list[str] = []
    if out is not None:
        pictures = Pictures(read)
        questions = [question for one in scored for question in draw(result, one, pictures)]
        picture_notes = pictures.notes()
        write_eval_compare_page(out, page_data(result, questions, picture_notes, out))
        with written_whole(out.with_suffix(".json")) as file:
            file.write(f"{text}\n".encode(errors="backslashreplace"))
    if as_json:
        say(text)
        return result
    say(show(result))
    for note in picture_notes:
        say(f"note: {note}")
    if out is not None:
        say(f"wrote {out} and {out.with_suffix('.json').name}")
    for purpose, command in next_commands(result, out):
        say(f"next  {command}  ({purpose})")
    return result
