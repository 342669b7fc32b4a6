#!/usr/bin/env bash
# math-verify 0.9.0, latex2sympy2-extended 1.11.0, sympy 1.14.0.
#
# str() of a Python float below 0.0001 or from 1e16 on has an exponent: 0.00005 becomes "5e-05". math-verify's parse()
# takes the digits before the "e" for the number and says nothing: the truth "5e-05" is 5. So an answer of \boxed{5} is
# right, one of \boxed{0.00005} is wrong, and so is \boxed{5e-05}, the very text of the truth, because inside LaTeX the
# "e" is Euler's number: 5e - 05. One would expect the number that Python's own float() reads, or nothing at all. Truths
# that were numbers in a table or in JSON and passed through str() score, and reward, the mantissa. The same number in
# fixed digits is judged as it should be.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2-extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - <<'PY'
from decimal import Decimal

from math_verify import parse, verify

for value in (0.00005, 2.5e-7, 1e16, 3e20):
    truth = str(value)
    mantissa = truth.split("e")[0]
    digits = format(Decimal(truth), "f")
    answers = [rf"\boxed{{{mantissa}}}", rf"\boxed{{{digits}}}"]
    judged = [verify(parse(truth), parse(answer)) for answer in answers]
    in_digits = [verify(parse(digits), parse(answer)) for answer in answers]
    print(f"truth {truth!r} is read as {parse(truth)[0]}:", dict(zip(answers, judged)))
    print(f"truth {digits!r}:", dict(zip(answers, in_digits)))
    assert judged == [True, False] and in_digits == [False, True]
same_text = verify(parse("5e-05"), parse(r"\boxed{5e-05}"))
two_powers = verify(parse("2.5e-3"), parse("2.5e-7"))
print(r"truth '5e-05' and answer \boxed{5e-05}:", same_text, "- read as", parse(r"\boxed{5e-05}")[0])
print("2.5e-3 and 2.5e-7 are equal:", two_powers)
assert not same_text and two_powers
PY
