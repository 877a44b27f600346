"""Freed memory that is kept comes back without a page fault."""

import resource
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COUNT = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from utils.runtime.processes import keep_freed_memory
keep_freed_memory(sys.argv[1] == "keep")
def step():  # several blocks at once, as the activations of a network
    blocks = [torch.empty(50_000_000, dtype=torch.uint8).fill_(1) for _ in range(4)]
for _ in range(4):  # until each block has its place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_or_given_back():
    pages = 5 * 4 * 50_000_000 // resource.getpagesize()

    def faults(what):
        command = [sys.executable, "-c", COUNT.format(root=str(ROOT)), what]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 0.25 * pages
    assert faults("give back") > 0.9 * pages
