"""The C library's allocator, where it decides how fast a CPU trains."""

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}
KEEP = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}


def keep_freed_memory(keep: bool = True) -> None:
    """Let the process keep the memory that it frees; nothing is done where the C library is not glibc.

    A training step frees hundreds of megabytes of activations, and glibc gives large blocks back to the system, which
    clears every page of them anew for the next step: a third of the time of a joint step of two resnet10t on two cores.
    False: as glibc has it by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (KEEP if keep else DEFAULTS).items():
            mallopt(parameter, value)
