"""How the process treats memory that it has freed, on a CPU."""

import ctypes

# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to use freed memory again; whether it is there and does.

    As it comes, it takes each large tensor from the kernel and gives it back, and every page of it faults again at the
    next step. What it keeps instead is at most what the process has used at once, and holes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl, macOS
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
