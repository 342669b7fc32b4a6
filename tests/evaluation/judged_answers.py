"""Answers to a small judge set, and the commands that score them."""

import json
from pathlib import Path

from click.testing import CliRunner

from vapr.cli.main import main

SET = """\
name: mine
columns: {id: nr, question: q, reference: truth, category: kind, image: file, facts: facts}
prompt: "Q: {question} FACTS: {facts} TRUTH: {reference} SAID: {answer}"
verdict: {kind: score, pattern: 'rating:\\s*(-?\\d+)', range: [0, 6]}
figures:
  score: {kind: mean}
  hallucination_rate: {kind: share, below: 3}
"""
ROWS = [
    {"nr": n, "q": f"What is at {n}?", "truth": f"a cat at {n}", "kind": "odd" if n % 2 else "even",
     "file": f"{n // 2}.jpg", "facts": ["cat", f"place {n}"]}
    for n in range(8)
]  # fmt: skip


def write_set(folder: Path, text: str = SET, rows: list[dict] = ROWS) -> str:
    """Write set and questions; return what follows ``--bench``."""
    (folder / "mine.yaml").write_text(text)
    write_lines(folder / "questions.jsonl", rows)
    return f"{folder / 'mine.yaml'}={folder / 'questions.jsonl'}"


def write_answers(folder: Path, **changed: str) -> Path:
    """Write ``predictions.jsonl`` with an answer to each row; ``changed`` holds other answers by ``n`` and number."""
    rows = [
        {"benchmark": "mine", "id": str(row["nr"]), "question": row["q"], "answer": row["truth"],
         "prediction": changed.get(f"n{row['nr']}", f"answer {row['nr']}")}
        for row in ROWS
    ]  # fmt: skip
    return write_lines(folder / "predictions.jsonl", rows)


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def score(*arguments: object) -> tuple[int, str, str]:
    """Run ``vapr score``: exit code, stdout, stderr."""
    ran = CliRunner().invoke(main, ["score", *map(str, arguments)])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return ran.exit_code, ran.stdout, ran.stderr


def scored(*arguments: object) -> dict:
    """Run ``vapr score --json``, which must succeed."""
    code, out, err = score(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(*arguments: object) -> str:
    """Run ``vapr score``, which must end in one line; return it."""
    code, out, err = score(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert (code, out, len(lines)) == (2, "", 1), (code, out, err)
    return lines[0]
