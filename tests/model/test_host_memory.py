"""Memory that a step on a CPU frees is there for the next one: the system hands out no pages again."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from vapr.model.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    layers = [torch.zeros(2**19) for _ in range(16)]  # 2 MiB each; all are freed at the end
step()
step()
before = pages()
step()
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what it will")
def test_a_step_gets_no_pages_that_the_one_before_it_had():
    """What lies behind the heap is chance, so each is asked in three processes."""

    def asked(kind: str) -> list[int]:
        return [int(subprocess.check_output([sys.executable, "-c", STEPS, kind])) for _ in range(3)]

    assert max(asked("given back")) > 4000, "of 8,192 pages that the tensors take; else there is nothing to mend"
    assert max(asked("kept")) < 1000
