# SPDX-License-Identifier: Apache-2.0
"""What the assembler says of kernels is read right; `gpu_ahead_test.py` has it say something."""

from treesurgeon.kernels import static_gpu

SAID = """ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem

@@built {"temp_bytes": 64}
@@built {"error": "ValueError: it does not fit"}
ptxas info    : Used 96 registers
@@built {"temp_bytes": 0}
"""


def test_kernels_are_told_apart():
  assert static_gpu.read(SAID) == [
    static_gpu.Kernel(168, 8, 64),
    static_gpu.Kernel(error="ValueError: it does not fit"),
    static_gpu.Kernel(96),
  ]


def test_a_compiler_that_cannot_start_is_an_error_of_each_program():
  found = static_gpu.build("treesurgeon.kernels.matmul.nowhere:product", [{}, {}])
  assert [k.registers for k in found] == [0, 0]
  assert all("nowhere" in k.error for k in found)
