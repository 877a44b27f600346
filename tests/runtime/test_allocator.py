"""The allocator: kept memory is used again without a page fault."""

import resource
import sys

import pytest
import torch

from tests.helpers.ranks import call_warm
from utils.runtime.joining import keep_freed_memory

BLOCK = 50_000_000  # bytes
STEPS = 8  # a small block may move the large ones in one of them


def page_faults(keep: bool) -> int:
    """The page faults of STEPS steps of two blocks each, after three in which the blocks get their places."""
    keep_freed_memory(keep)
    for step in range(3 + STEPS):
        if step == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.empty(BLOCK, dtype=torch.uint8).fill_(1) for _ in range(2)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_or_returned():
    pages = STEPS * 2 * BLOCK // resource.getpagesize()
    assert call_warm(page_faults, True) < 0.25 * pages
    assert call_warm(page_faults, False) > 0.9 * pages
