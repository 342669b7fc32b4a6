#!/usr/bin/env bash
# torch 2.13.0 on a CPU, Linux.
#
# Once a DataLoader with worker processes was iterated over, the death of a worker raises RuntimeError in the main
# thread wherever it is at that moment: inside code that does not touch the loader, which may be halfway through an
# optimizer's update. The exception comes out of a handler of SIGCHLD that torch sets when workers start, and leaves set
# while persistent workers live. One would expect it from the loader's next batch. With a handler of SIGCHLD put back in
# place afterwards, the same death raises nothing until the loader is asked again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat >"$folder/seen.py" <<'PY'
import multiprocessing
import os
import signal
import sys
import time

from torch.utils.data import DataLoader


def unrelated() -> str:
    """Count for three seconds, without the loader; a worker ends in the first of them."""
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    end = time.monotonic() + 3
    count = 0
    try:
        while time.monotonic() < end:
            count += 1
    except RuntimeError as error:
        return f"RuntimeError in the middle of counting: {str(error)[:60]}"
    return "counted to the end"


before = signal.getsignal(signal.SIGCHLD)
loader = DataLoader(range(64), batch_size=4, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
next(iter(loader))
if sys.argv[1] == "restored":
    signal.signal(signal.SIGCHLD, before)
print(unrelated(), flush=True)
os._exit(0)
PY
usual=$("$folder/venv/bin/python" "$folder/seen.py" usual)
restored=$("$folder/venv/bin/python" "$folder/seen.py" restored)
echo "torch's handler in place: $usual"
echo "the one before put back:  $restored"
[[ $usual == "RuntimeError in the middle of counting: DataLoader worker (pid"* ]]
[[ $restored == "counted to the end" ]]
