"""The user's own checks: a Python function in a process of its own, and regular expressions."""

import os
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.draft.test_reply_schema import EDIT, Says, turn
from tests.editing.edit_command import assert_refused, edit, ledger_of, pairs_of, rejects_of, write
from tests.editing.edit_command import row as cats
from tests.editing.edit_jobs import SECONDS, in_a_process
from vapr.data.pair import Edit
from vapr.editing.config import CheckConfig, EditConfig
from vapr.editing.draft import own_checks
from vapr.editing.draft.editor import Editor
from vapr.editing.draft.own_checks import NoVerdict, OwnChecks
from vapr.editing.job.summary import way_out
from vapr.editing.rules.categories import load_categories
from vapr.errors import UserError

pytest_plugins = ["tests.editing.edit_command"]

CATEGORIES = load_categories()
SOFA = turn("Where is it?", "On the red sofa.")
EDITS = [Edit(7, 10, "blue")]
"""On the blue sofa."""


@pytest.fixture
def check(tmp_path):
    """``check(code)`` -> own checks whose function ``judge`` is of that code; ended after the test."""
    opened = []

    def write_and_open(code: str, **settings) -> OwnChecks:
        (tmp_path / "check.py").write_text(code)
        opened.append(OwnChecks(CheckConfig(python=f"{tmp_path}/check.py:judge", **settings)))
        return opened[-1]

    yield write_and_open
    for one in opened:
        one.close()


def judged(own: OwnChecks) -> list[tuple[str, bool, str]]:
    verdicts = own.judge(SOFA, "On the blue sofa.", EDITS, CATEGORIES["attribute"])
    return [(verdict.name, verdict.passed, verdict.note) for verdict in verdicts]


def returns(value: str) -> str:
    return f"def judge(pair):\n    return {value}\n"


@pytest.mark.parametrize(
    ("value", "passed", "note"),
    [
        ("True", True, ""),
        ("None", True, ""),
        ("False", False, "refused"),
        ("'too blue'", False, "too blue"),
        (r"'two\nlines  here'", False, "two lines here"),
        ("len('x' * 300) * 'x'", False, "x" * 200),
        ("__import__('numpy').bool_(pair['chosen'] == pair['rejected'])", False, "refused"),
        ("__import__('numpy').bool_(True)", True, ""),
    ],
)
def test_what_a_function_returns(check, value, passed, note):
    assert judged(check(returns(value))) == [("own check", passed, note)]


NO_REASON = "instead of True, None, False or a reason"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (returns("1"), f"returned 1 (int) {NO_REASON}"),
        (returns("''"), f"returned an empty text {NO_REASON}"),
        (returns("[True]"), f"returned [True] (list) {NO_REASON}"),
        (returns("pair['answer']"), "KeyError: 'answer' (check.py line 2)"),
        ("def deeper():\n    raise ValueError('no\\nway')\ndef judge(pair):\n    deeper()\n", "ValueError: no way (check.py line 2)"),
        (returns("judge(pair)"), "RecursionError: maximum recursion depth exceeded (check.py line 2)"),
        ("import sys\ndef judge(pair):\n    sys.exit(3)\n", "SystemExit: 3 (check.py line 3)"),
        ("import os\ndef judge(pair):\n    os._exit(3)\n", "its process has ended (exit code 3)"),
        ("import os\ndef judge(pair):\n    os.kill(os.getpid(), 11)\n", "its process has ended (SIGSEGV)"),
        ("def judge(pair):\n    while True:\n        pass\n", "no answer within 0.3 s"),
        ("import re\ndef judge(pair):\n    return re.match('(a+)+b', 'a' * 60)\n", "no answer within 0.3 s"),  # it never looks up
        ("class Odd:\n    def __repr__(self):\n        raise OSError\ndef judge(pair):\n    return Odd()\n", f"returned something (Odd) {NO_REASON}"),
    ],
    ids=lambda value: None if "\n" in value else value[:30],
)  # fmt: skip
def test_without_a_verdict(check, code, reason):
    own = check(code, python_seconds=0.3 if "no answer" in reason else 60)
    with pytest.raises(NoVerdict) as told:
        judged(own)
    assert str(told.value) == reason
    with pytest.raises(NoVerdict, match=reason[:8].replace("[", r"\[")):  # a new process, if the first is gone
        judged(own)


def test_it_is_given_the_pair(check):
    own = check("import json\ndef judge(pair):\n    return json.dumps(pair)[:190] + str(sorted(pair))[:0]\n")
    [(_, _, note)] = judged(own)
    assert note.startswith(
        '{"question": "Where is it?", "chosen": "On the red sofa.", "rejected": "On the blue sofa.", '
        '"category": "attribute", "edits": [{"start": 7, "end": 10, "from": "red", "to": "blue"}]'
    )
    own = check("def judge(pair):\n    return ' '.join(map(str, list(pair.values())[5:]))\n")
    assert judged(own) == [("own check", False, "[] ['0.png'] coco row-0 rows.json:1")]


def test_what_it_prints_and_reads_is_not_what_it_says(check, capfd):
    assert judged(check("import sys\nprint('loading')\ndef judge(pair):\n    print(pair['chosen'], sys.stdin.read())\n")) == [
        ("own check", True, "")
    ]  # fmt: skip
    out, err = capfd.readouterr()
    assert out == "" and err == "loading\nOn the red sofa. \n"


def test_it_finds_modules_beside_it_and_not_vapr_s(check, tmp_path):
    (tmp_path / "prompts.py").write_text("WORD = 'mine'\n")
    own = check("import prompts\nimport __main__\ndef judge(pair):\n    return prompts.WORD\n")
    assert judged(own) == [("own check", False, "mine")]


def test_it_keeps_what_it_has_loaded(check):
    own = check("import os\nseen = []\ndef judge(pair):\n    seen.append(1)\n    return f'{os.getpid()} {len(seen)}'\n")
    (one, first), (other, second) = (judged(own)[0][2].split() for _ in range(2))
    assert one == other != str(os.getpid()) and (first, second) == ("1", "2")


def test_after_many_in_vain_it_is_not_tried_any_more(check, monkeypatch, tmp_path):
    monkeypatch.setattr(own_checks, "GIVE_UP_AFTER", 2)
    own = check(
        f"import os\ndef judge(pair):\n    open({str(tmp_path / 'calls')!r}, 'a').write('x')\n    os._exit(1)\n"
    )
    told = []
    for _ in range(4):
        with pytest.raises(NoVerdict) as error:
            judged(own)
        told.append(str(error.value))
    assert told[:2] == ["its process has ended (exit code 1)"] * 2
    assert told[2:] == ["not tried any more: 2 in a row ended its process or took too long"] * 2
    assert (tmp_path / "calls").read_text() == "xx"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", "check.py:judge: has no function 'judge'"),
        ("judge = 1\n", "check.py:judge: has no function 'judge'"),
        ("def judge(pair:\n", "check.py:judge: SyntaxError: "),
        ("x = 1\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' (check.py line 2)"),
        ("raise SystemExit('no')\n", "SystemExit: no (check.py line 1)"),
        ("import os\nos._exit(4)\n", "its process has ended (exit code 4)"),
    ],
)
def test_a_file_that_does_not_load(folder, code, message):
    (folder / "check.py").write_text(code)
    assert_refused(message, folder / "sft.jsonl", "--set", f"checks.python={folder}/check.py:judge")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("checks.python=gone.py:judge", "checks.python: gone.py: no such file"),
        ("checks.python=gone.py", "checks.python must be file.py:function, got 'gone.py'"),
        ("checks.python=gone.txt:judge", "checks.python must be file.py:function"),
        ("checks.patterns=['(']", "checks.patterns: '(' is no regular expression"),
        ("checks.python_seconds=0", "checks.python_seconds"),
    ],
)
def test_settings_that_name_nothing(folder, setting, message):
    assert_refused(message, folder / "sft.jsonl", "--set", setting)


def test_patterns():
    own = OwnChecks(CheckConfig(patterns=["green", r"BLUE \w+\."]))
    try:
        assert judged(own) == [("pattern", False, r"BLUE \w+\. is found in the result, and must not be")]
        [verdict] = own.judge(SOFA, "On the pink sofa.", EDITS, CATEGORIES["attribute"])
        assert (verdict.name, verdict.passed) == ("pattern", True)
    finally:
        own.close()


def test_a_pattern_that_hangs_is_no_verdict():
    own = OwnChecks(CheckConfig(patterns=["(o|o)+x"], python_seconds=0.3))
    try:
        with pytest.raises(NoVerdict, match=r"no answer within 0.3 s"):
            own.judge(SOFA, "o" * 80, EDITS, CATEGORIES["attribute"])
    finally:
        own.close()


def test_a_process_ends_with_what_it_has_started(check, tmp_path):
    own = check(
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\ndef judge(pair):\n    return str(child.pid)\n"
    )
    child = int(judged(own)[0][2])
    own.close()
    wait_until(lambda: ended(child))


def judge_and_hang(check: Path) -> None:
    OwnChecks(CheckConfig(python=f"{check}:judge", python_seconds=3)).judge(
        SOFA, "On the blue sofa.", EDITS, CATEGORIES["attribute"]
    )


def test_a_hanging_process_outlives_a_killed_job_by_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(own_checks, "GRACE_SECONDS", 0.1)
    note, check = tmp_path / "pid", tmp_path / "check.py"
    check.write_text(
        f"import os\ndef judge(pair):\n    os.symlink(str(os.getpid()), {str(note)!r})\n    while True:\n        pass\n"
    )
    job = in_a_process(judge_and_hang, check)
    wait_until(note.is_symlink)
    job.kill()
    job.join()
    wait_until(lambda: ended(int(os.readlink(note))))


def wait_until(happened) -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().split(")")[1].split()[0] in "ZX"


# In a job


def test_a_refusal_is_asked_for_again_with_its_reason(check):
    own = check(returns("'slow is dull' if 'slow' in pair['rejected'] else None"))
    llm = Says({"edits": [EDIT]}, {"edits": [{**EDIT, "replace": '"go"'}]})
    (draft,), _ = Editor(EditConfig(), CATEGORIES, llm, own_checks=own).edit([turn()], "s")
    assert (draft.status, draft.rejected, draft.attempts) == ("accepted", 'The stop sign has the word "go" on it.', 2)
    assert "Your last edit was refused: own check: slow is dull." in llm.asked[1]
    assert [verdict.name for verdict in draft.verdicts if verdict.name == "own check"] == ["own check"]


def test_what_has_no_verdict_is_not_asked_for_again(check):
    own = check(returns("1 / 0"))
    llm = Says({"edits": [EDIT]})
    (draft,), _ = Editor(EditConfig(), CATEGORIES, llm, own_checks=own).edit([turn()], "s")
    assert (draft.status, draft.attempts) == ("failed", 1)
    assert draft.reason == "own check without verdict: ZeroDivisionError: division by zero (check.py line 2)"


def test_it_is_not_asked_about_what_vapr_refuses(check, tmp_path):
    own = check(f"def judge(pair):\n    open({str(tmp_path / 'calls')!r}, 'a').write('x')\n")
    llm = Says({"edits": [{**EDIT, "replace": '"STOP"'}]}, {"edits": [EDIT]})  # the same word in capitals
    (draft,), _ = Editor(EditConfig(), CATEGORIES, llm, own_checks=own).edit([turn()], "s")
    assert (draft.status, draft.attempts) == ("accepted", 2)
    assert (tmp_path / "calls").read_text() == "x"


def three_traps(folder: Path) -> Path:
    """Four pairs of rows that trade; the check likes the first, refuses one, has no word for one, and hangs at one."""
    (folder / "check.py").write_text(
        "import time\n"
        "def judge(pair):\n"
        "    number = pair['source_id']\n"
        "    if number == 'c': return 'not c'\n"
        "    if number == 'e': raise KeyError('e')\n"
        "    if number == 'g': time.sleep(60)\n"
    )
    numbers = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
    rows = [cats(f"There are {n} cats.", id=id) for id, n in zip("abcdefgh", numbers, strict=True)]
    return write(folder, rows)


def test_a_job_outlives_its_check(folder, capsys):
    source = three_traps(folder)
    settings = ("checks.python_seconds=3", f"checks.python={folder}/check.py:judge")
    assert edit(source, *(part for setting in settings for part in ("--set", setting))) == (0, "")
    ends = {reject["source_id"]: (reject["status"], reject["reason"]) for reject in rejects_of(folder)}
    assert ends["c"] == ("rejected", "own check: not c")
    assert ends["e"] == ("failed", "own check without verdict: KeyError: 'e' (check.py line 5)")
    assert ends["g"] == ("failed", "own check without verdict: no answer within 3 s")
    lost = [id for id, (status, _) in ends.items() if status == "partner_lost"]
    kept = [pair["provenance"]["source_id"] for pair in pairs_of(folder)]
    assert sorted([*"ceg", *lost, *kept]) == list("abcdefgh") and len(lost) <= 3
    for pair in pairs_of(folder):
        assert {"name": "own check", "passed": True, "value": None, "note": ""} in pair["checks"]
    ledger = ledger_of(folder)
    assert ledger["failed"] == {
        "own check without verdict: KeyError: '…' (check.py line N)": 1,
        "own check without verdict: no answer within N s": 1,
    }
    assert ledger["rejected"]["own check: not c"] == 1
    assert {way_out(reason) for reason in ledger["failed"]} == {
        "mend the function of checks.python, then another --out",
        "a higher checks.python_seconds, or mend the function of checks.python, then another --out",
    }


def test_a_changed_check_is_another_job(folder):
    (folder / "check.py").write_text(returns("True"))
    setting = ("--set", f"checks.python={folder}/check.py:judge")
    assert edit(folder / "sft.jsonl", *setting) == (0, "")
    assert edit(folder / "sft.jsonl", *setting) == (0, f"{folder / 'out'}: nothing is left to do\n")
    (folder / "check.py").write_text(returns("None"))
    assert_refused(
        "holds a job of other settings: the file of checks.python has changed", folder / "sft.jsonl", *setting
    )
    assert_refused("holds a job of other settings: ", folder / "sft.jsonl")


def test_the_child_imports_nothing_of_vapr(check):
    own = check(
        "import sys\ndef judge(pair):\n    return ' '.join(sorted(m for m in sys.modules if m.split('.')[0] in ('vapr', 'numpy'))) or 'none'\n"
    )
    assert judged(own) == [("own check", False, "none")]


def test_what_no_path_gives_is_a_user_error():
    with pytest.raises(UserError, match=r"checks.python: /nowhere/check.py: no such file"):
        OwnChecks(CheckConfig(python="/nowhere/check.py:judge"))
