"""The allocator: kept memory is used again without a page fault."""

import resource
import sys

import pytest
import torch

from tests.helpers.ranks import call_warm
from utils.runtime.processes import keep_freed_memory

BLOCK = 50_000_000  # bytes


def step() -> None:
    """Several blocks at once, as the activations of a network."""
    blocks = [torch.empty(BLOCK, dtype=torch.uint8).fill_(1) for _ in range(4)]
    del blocks


def page_faults(keep: bool) -> int:
    """Of five steps in this process, once each block has its place."""
    keep_freed_memory(keep)
    for _ in range(4):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_or_returned():
    pages = 5 * 4 * BLOCK // resource.getpagesize()
    assert call_warm(page_faults, True) < 0.25 * pages
    assert call_warm(page_faults, False) > 0.9 * pages
