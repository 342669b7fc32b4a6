"""Numbers as answers write them."""

import pytest

from vapr.evaluation.scoring.numbers import number, stated_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("7.", 7), ("-3", -3), ("−3", -3), ("1.25", 1.25), (".5", 0.5), ("1,234", 1234), ("1,234.5", 1234.5),
        ("$1,200,000", 1200000), ("$6.75", 6.75), ("-$5", -5), ("45%", 45), ("145°", 145), ("36 watts", 36),
        ("5cm", 5), ("5 m^2", 5), ("5 m/s", 5), ("9.8 m/s^2", 9.8), ("3/4", 0.75), ("1/64", 1 / 64), ("2e3", 2000),
        ("1.5e-3", 0.0015), ("2*10^4", 20000), (r"1.2 \times 10^{5}", 120000), ("3 × 10^-2 m", 0.03),
        (r"$\frac{1}{4}$", 0.25), (r"-\frac{1}{2}", -0.5), ("x = 7", 7), ("d ≈ 0.5 m", 0.5), ("about 30", 30),
        ("**12**", 12), (r"0.11 \text{ m}", 0.11), (r"$92.5^\circ$", 92.5), ("three", 3), ("Three objects.", 3),
        ("3 of the apples", 3), ("1 foot per second", 1),
    ],
)  # fmt: skip
def test_texts_that_are_a_number(text, value):
    assert number(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    ["", "a dog", "3 or 4", "1, 2", "2 + 2 = 4", "12:30", "3-4", "1/2/3", "one can see a dog", "A4", "5x3", "1/0"],
)
def test_texts_that_are_none(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "strict", "last"),
    [
        ("The answer is 7.", 7, 7),
        ("1.2 m. The spring is compressed.", 1.2, 1.2),
        ("There are 8 objects.\n\nIf 3 are taken away, 5 are left.\n\nSo the answer is 3.\n\nI hope this helps!", None, 3),
        ("The total volume of the measuring cup is 250 grams.", None, 250),
        ("There are three small objects left on the table.", None, 3),
        (r"We get $$x = \sqrt{0.25} = 0.5$$ and so \boxed{0.5}.", None, 0.5),
        ("<think>It is 3. The answer is 3.</think>The answer is 4", None, 4),
        ("Therefore, 2 + 3 = 5", None, 5),
        ("I cannot tell.", None, None),
        ("It is 3 or 4.", None, None),
        ("The answer is 5. That is 2 more than 3.", 5, 5),
        ("", None, None),
    ],
)  # fmt: skip
def test_numbers_that_an_answer_states(text, strict, last):
    assert stated_number(text, "strict") == strict
    assert stated_number(text, "last-answer") == last
