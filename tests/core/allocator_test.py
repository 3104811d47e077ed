# SPDX-License-Identifier: Apache-2.0
"""Memory that was freed once is handed out again without new pages."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from treesurgeon.core import allocator
if {keep}:
  allocator.keep_pages()
np.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
  np.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a parameter of glibc")
def test_pages_are_kept():
  kept, given_back = (
    int(subprocess.check_output([sys.executable, "-P", "-c", FAULTS.format(keep=keep)]))
    for keep in (True, False)
  )
  assert kept < 100 < given_back
