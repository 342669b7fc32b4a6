"""A figure of speed or memory in the documents is that of a row in bench/results, or says where else it is from."""

from pathlib import Path

import pytest

from tests.figures import claims_of_speed, problems, read_rows, rounds_to

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "bench" / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ROWS = [
    {"bench": "train_step", "run": "aa", "arm": "vapr", "shape": "up, 7b", "pairs_per_second": 16.3787, "mib": 2048},
    {"bench": "train_step", "run": "aa", "arm": "trl", "shape": "up, 7b", "pairs_per_second": 5.17},
    {"bench": "train_step", "run": "bb", "arm": "trl", "shape": "up, 7b", "pairs_per_second": 1.0},
]


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    return read_rows(REPOSITORY / "bench" / "results")


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_figures_have_rows(file, recorded):
    found = [f"{file.relative_to(REPOSITORY)}:{line}" for line in problems(file.read_text("utf-8"), recorded)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("The tower fell from 172 to\n71 ms a step.", ["172", "71"]),
        ("It makes **16.4** pairs a second (3.2 times, or 3.2x), 1,774 tokens/s.", ["16.4", "3.2", "3.2", "1,774"]),
        ("Held are 1.2 to 1.8 GiB, 3 GiB/s, 794 TFLOP/s and 338 s.", ["1.2", "1.8", "3", "794", "338"]),
        ("| arm | ms a step | pairs |\n| --- | --- | --- |\n| none | 988 (12) | 8 |", ["988", "12"]),
        # nothing of speed or memory
        ("Pictures of 640 x 480 in 28 layers, 94 % right, seeds 0 to 4, a card of 24 GB, the second of 3.", []),
    ],
)
def test_what_is_a_figure(text, figures):
    assert claims_of_speed(text) == figures


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("16.4 pairs a second. <!-- row: 16.4 = train_step, aa, vapr: pairs_per_second -->", ""),
        ('2 GiB. <!-- row: 2 = train_step, aa, "up, 7b", vapr: mib / 1024 -->', ""),
        (
            "16.4 and 5.2 pairs a second, 3.2 times.\n<!-- row: 16.4 = train_step, aa, vapr: pairs_per_second;\n"
            "5.2 = train_step, aa, trl: pairs_per_second; 3.2 = 16.4 / 5.2 -->",
            "",
        ),
        ("An update takes 5 ms. <!-- predicted: 5 = vapr plan -->", ""),
        ("Docker gives 64 MiB. <!-- given: 64 = Docker's documentation -->", ""),
        ("It takes\n\n```\n5 ms\n```\n<!-- results:begin -->\n5 ms\n<!-- results:end -->", ""),
        ("16.4 pairs a second.", "16.4: no comment names its row"),
        ("16.4 pairs a second.\n\n16.4 <!-- given: 16.4 = its own block only -->", "16.4: no comment names its row"),
        ("16.5 pairs a second. <!-- row: 16.5 = train_step, aa, vapr: pairs_per_second -->", "16.5 is 16.3787 in the row"),
        ("16.4 pairs a second. <!-- row: 16.4 = train_step, cc, vapr: pairs_per_second -->", "0 rows have these values"),
        ("5.2 pairs a second. <!-- row: 5.2 = train_step, aa, up: pairs_per_second -->", "0 rows have these values"),
        ("5.2 pairs a second. <!-- row: 5.2 = train_step, aa: pairs_per_second -->", "2 rows have these values"),
        ("5.2 pairs a second. <!-- row: 5.2 = train_step, aa, trl: mib -->", "the row has no mib"),
        ("It is fast. <!-- row: 5.2 = train_step, aa, trl: pairs_per_second -->", "5.2 is not in the text"),
        ("5 ms. <!-- predicted: 5 -->", "is not 'FIGURE = WHERE IT IS FROM'"),
        ("5.2 ms. <!-- row: 5.2 = somewhere -->", "is not 'BENCH, RUN, VALUES: FIELDS'"),
    ],
)  # fmt: skip
def test_what_a_comment_has_to_say(text, wrong):
    found = problems(text, ROWS)
    assert len(found) == bool(wrong), found
    assert wrong in "".join(found)


def test_a_line_is_named():
    assert problems("# Title\n\n```\ncode\n```\n\nIt takes\n5 ms.\n", ROWS)[0].startswith("7: 5: no comment")


def test_rounding_goes_by_the_digits_written():
    assert rounds_to(1774.05, "1,774") and rounds_to(16.3787, "16.4") and rounds_to(2.85, "2.8")
    assert not rounds_to(16.3787, "16.3") and not rounds_to(16.3787, "16.40")
