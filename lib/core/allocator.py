# SPDX-License-Identifier: Apache-2.0
"""How the C library hands out the memory that arrays on the CPU live in."""

import contextlib
import ctypes

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # names of the parameters in <malloc.h>
_LARGEST = 1 << 30  # bytes; what is larger comes from the system and goes back to it


def keep_pages() -> None:
  """Let the C library keep what arrays free, for the next ones.

  glibc takes every large block from the system and gives it back, so that a program that runs again
  and again has all its temporaries cleared again, page by page: on a CPU that was a tenth of the
  time of calibration. Nothing happens where the C library is another one. The process then holds on
  to the most memory that it needed at once.

  Example:
    >>> keep_pages()
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP, _LARGEST)
    mallopt(_TRIM, (1 << 31) - 1)
    mallopt(_ARENAS, 1)  # those of other threads hold small blocks only
