"""Memory that a long command frees and takes again, thousands of times."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the process keep what it frees, where glibc manages its memory; elsewhere do nothing.

    By default glibc gives every block above some megabytes back to the kernel, which fills it with zeros, page by
    page, when the process asks for it again: on activations of large images a quarter of all time. For commands
    only, since it counts for the whole process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
