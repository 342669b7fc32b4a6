"""What a step on a CPU frees is kept for the next one.

The C library gives memory back to the system as soon as a few MiB at the end of its heap are free, and the next layer
gets it anew, page by page and zeroed. How much of a step that takes is chance: it depends on what lies behind.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT = 2**30
"""Free bytes at the end of the heap that are kept."""
LARGEST_IN_HEAP = 2**25
"""Bytes of an allocation from which on the system is asked; glibc takes no more."""


def keep_freed_memory() -> None:
    """Let this process keep up to a GiB that it freed, where the C library is glibc; others keep what they will."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_IN_HEAP)
        mallopt(TRIM_THRESHOLD, KEPT)
