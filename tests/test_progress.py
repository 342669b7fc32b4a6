"""Progress as a person sees it: nothing cut at 80 columns, plain lines in a log, and a first Ctrl-C answered at once."""

import ctypes
import io
import os
import signal
import threading
from functools import partial

import pytest
from rich.console import Console

from vapr import progress as display
from vapr.interrupts import Interrupts
from vapr.progress import Display

NOTE = "1234.5 pairs/s loss 12.3456 acc 0.50 margin +12.345 logps -1234.5/-1234.5"


def drawn(monkeypatch, label: str, total: int, done: int, unit: str, note: str, width: int = 80) -> list[str]:
    """Lines of the bar's last picture on a terminal of so many columns."""
    file = io.StringIO()
    terminal = partial(Console, file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(display, "Console", lambda **_: terminal(soft_wrap=True))
    with Display(label, total, done, unit=unit) as shown:
        shown.advance(note, 10)
        shown.advance(note, 10)
        before = file.tell()
    file.seek(before)
    return [line.rstrip() for line in file.read().replace("\x1b[2K", "").replace("\r", "").split("\n") if line.strip()]


@pytest.mark.parametrize(
    ("label", "total", "unit", "note"),
    [("train", 900_000, "step", NOTE), ("prepare reference", 900_000, "step", "18,000,000 found, 18,000,000 computed"), ("read source", 60_000_000, "row", "")],
    ids=["train", "prepare", "read"],
)  # fmt: skip
def test_at_80_columns_nothing_is_cut(monkeypatch, label, total, unit, note):
    bar, *rest = (line for line in drawn(monkeypatch, label, total, 12_300, unit, note) if line.isprintable())
    assert bar.startswith(label) and f"12,320/{total:,} {unit}s" in bar and "ETA" in bar and "…" not in bar
    assert f"{unit}s/s" in bar or f"s/{unit}" in bar
    assert len(bar) <= 80 and rest == ([note] if note else [])


def test_a_log_has_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(Display, "SECONDS_BETWEEN_LINES", 0.0)
    with Display("train", 40, 10) as shown:
        shown.advance("loss 0.69", 10)
        shown.note("scoring held-out pairs 3/9")
        shown.say("a line")
    first, note, line = capsys.readouterr().err.splitlines()
    label, rate, said, eta = first.split(" | ")
    assert (label, said) == ("train step 20/40", "loss 0.69") and rate.endswith(" steps/s") and eta.startswith("ETA 0")
    assert (note, line) == ("train | scoring held-out pairs 3/9", "a line")


def test_rates_are_readable():
    shown = {0.004: "250 s/step", 0.5: "2.0 s/step", 1.0: "1.0 steps/s", 12.34: "12.3 steps/s", 5678.9: "5,679 steps/s"}
    assert {rate: display.rate_in_words(rate, "step") for rate in shown} == shown
    assert display.rate_in_words(None, "step") == display.rate_in_words(0.0, "step") == ""


def test_ctrl_c_is_answered_while_c_code_runs():
    """Python runs its handlers only between its own instructions, and a backward pass is one of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    lock = (ctypes.c_byte * 64)()
    libc.pthread_mutex_lock(lock)
    said = []

    def say(line: str) -> None:
        said.append(line)
        libc.pthread_mutex_unlock(lock)

    class Time(ctypes.Structure):
        _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    now = Time()
    libc.clock_gettime(0, ctypes.byref(now))
    now.seconds += 60
    with Interrupts(say) as interrupts:
        main = threading.get_ident()
        threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGINT)).start()
        assert libc.pthread_mutex_timedlock(lock, ctypes.byref(now)) == 0  # not interrupted by signals
        assert interrupts.received is signal.SIGINT
    assert said == ["SIGINT: finishing this step, then a checkpoint follows; Ctrl-C again ends now"]


def test_the_second_ctrl_c_ends_at_once():
    said = []
    before = signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    with pytest.raises(KeyboardInterrupt), Interrupts(said.append):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1
    assert (signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)) == before
