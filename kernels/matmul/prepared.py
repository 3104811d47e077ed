# SPDX-License-Identifier: Apache-2.0
"""Quantized matrices as a device's kernel reads them: arranged once, the same numbers.

Files and methods hold `QuantizedTensor`, a bitstream. `arrange.prepare` rearranges it for a device,
exactly and reversibly, and products with what it returns run the kernels of `tpu.py` and `gpu.py`.
On a TPU:

* widths of 1, 2, 3 and 5 bits, and 4 bits on v5e and v5p: `gs32` (`layouts.py`), 16 // bits units
  of 128 rows side by side in the half-words. Three bits take 3.2: five to a half-word decode
  in as many instructions as any single field, whereas two planes of 2 + 1 bits take half as many
  again and were slower on every chip, by its compiler's count.
* 4 bits elsewhere `int4`, and the rest `int8`: the chip converts them.
* for inputs quantized to 8 bits, where the chip multiplies int8 at twice the speed (not tpu7x),
  `gs8` up to 4 bits, and `int8` above.
* codes of tables that are looked up in registers: `gs32`; 8-bit floats as they are, but for e4m3 on
  v6e, which is in `gs32` words too.

On a GPU `out_in`: `int4` up to 4 bits and `int8` above, columns first, in one step.

Ternary codes, five to a byte in files, have two bits here, and formats whose values are multiples
of one number have the multiples for codes; `values.py` says what becomes of each format. Rows are
filled up to whole units and steps, columns to a multiple of 128; scales are grouped by the step of
the kernel that reads them. What takes more than that, such as rows in another order, is in
`fitting.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon.core import formats, leaves, packing
from treesurgeon.core.leaves import base
from treesurgeon.kernels.matmul import layouts, values

UNIT = layouts.GROUP


class Prepared(base.Compressed):
  """A leaf arranged for a device."""

  target: str

  def restore(self) -> Any:
    """Return the leaf that it was, bit for bit."""
    raise TypeError(f"{type(self).__name__} does not say what it was")


class Instead(Prepared):
  """A leaf that is multiplied by as another one, which is prepared."""

  weight: base.Part

  def dense(self) -> jax.Array:
    """Compute the dense value of the leaf that it was."""
    return self.restore().dense()


@base.container(("codes", "scales", "zeros"))
class PreparedTensor(Prepared):
  """Hold a `QuantizedTensor` in a device's layout.

  Attributes:
    codes: int32 words of gs32 or gs8, int4, int8 or 8-bit floats, (..., stored rows, stored
      columns); of out_in (..., stored columns, stored rows).
    scales: (..., steps, groups of a step, stored columns); of one group of all rows (..., 1, 1,
      stored columns).
    zeros: like `scales`, or None.
    rows, cols, bits, group_size, store, format: as of the QuantizedTensor.
    layout: "gs32", "gs8", "native", "e4m3fn", "e5m2" or "out_in".
    step: units of 128 rows that one step of the kernel takes.
    target: name of the device.
    dtypes: of scales and zeros in the QuantizedTensor.
    inputs: dtype in which the kernel takes activations.
  """

  codes: base.Part
  scales: base.Part
  zeros: base.Part
  rows: int
  cols: int
  bits: int
  group_size: int
  store: str
  format: str
  layout: str
  step: int
  target: str
  dtypes: tuple[str, str]
  inputs: str = "bfloat16"

  @property
  def batch(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) before the matrix."""
    return tuple(self.codes.shape[:-2])

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the dense value."""
    return jnp.dtype(self.store)

  @property
  def line(self) -> values.Line:
    """What the device's codes stand for."""
    found = values.find(self.format, self.bits, self.target, self.inputs)
    assert found is not None
    return found

  @property
  def width(self) -> int:
    """Bits of a code on the device."""
    return self.line.width

  @property
  def steps(self) -> int:
    """Steps of a TPU's kernel over the rows."""
    fields, rows = layouts.tile(self.layout, self.width)
    return self.codes.shape[-2] // rows * fields // self.step

  @property
  def integers(self) -> bool:
    """Whether it is multiplied by integers."""
    return self.inputs == "int8"

  def restore(self) -> leaves.QuantizedTensor:
    """Return the QuantizedTensor, bit for bit."""

    def codes_of(codes: jax.Array) -> jax.Array:
      kept = codes[: self.cols] if self.layout == "out_in" else codes[:, : self.cols]
      plain = layouts.decode(
        kept, layout=self.layout, bits=self.width, group_size=UNIT, rows=self.rows
      )
      if self.line.codes is not None:
        plain = jnp.asarray(_inverse(self.line.codes))[plain]
      if self.format == "ternary":
        return formats.pack_trits(plain)
      return packing.pack(plain, bits=self.bits)

    def grouped(part: Any, dtype: str) -> Any:
      if part is None:
        return None
      if self.group_size < self.rows:
        part = part[..., : self.step * UNIT // self.group_size, :]
      flat = part.reshape(*self.batch, -1, part.shape[-1])[..., : self.cols]
      groups = -(-self.rows // min(self.group_size, self.rows))
      return jax.lax.slice_in_dim(flat, 0, groups, axis=flat.ndim - 2).astype(dtype)

    return leaves.QuantizedTensor(
      layouts.over_batch(codes_of, self.codes), grouped(self.scales, self.dtypes[0]),
      grouped(self.zeros, self.dtypes[1]), None, rows=self.rows, cols=self.cols, bits=self.bits,
      group_size=self.group_size, store=self.store, format=self.format,
    )  # fmt: skip

  def dense(self) -> jax.Array:
    """Dequantize in float32, return the storage dtype."""
    return self.restore().dense()


def _inverse(codes: np.ndarray) -> np.ndarray:
  """Invert a table; of codes that became the same the first comes back."""
  back = np.zeros(256, np.uint8)
  back[codes[::-1]] = np.arange(len(codes), dtype=np.uint8)[::-1]
  return back
