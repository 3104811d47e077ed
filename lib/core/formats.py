# SPDX-License-Identifier: Apache-2.0
r"""Number formats of few bits as tables: the value of every code, and the nearest code of a value.

* `e{E}m{M}`: sign, E exponent and M mantissa bits, subnormals, bias 2^(E-1) - 1. All codes are
  finite, as in the OCP formats e2m1, e2m3 and e3m2, except `e4m3fn` (its largest pattern is NaN, so
  448 is the largest value) and `e5m2` (the largest exponent is Inf and NaN; 57344).
* `nf`: quantiles of a normal distribution, with a zero (Dettmers et al., QLoRA, arXiv:2305.14314).
* `shift`: a sign and a power of two, 1 to 2^-(2^(b-1) - 1), no zero (DenseShift, arXiv:2208.09708).
* `pow2`: the same with the smallest positive power replaced by zero.
* `rf8`: a sign, a power of two of 16, and a second one that is added or taken away: of 1/2 to 1/16
  of the first, or none (Wu et al., arXiv:2506.00486). The published code rounds so but tells no
  layout; this one is ours: sign, four bits of exponent, three of the residual. Both 1.5 x 2^e and
  0.75 x 2^(e + 1) are codes; in the place of the smallest power alone there is a zero.
* `sign`: -1 and 1. `ternary`: -1, 0 and 1, of which five fill a byte (1.6 bits each).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

TRITS = 5  # 3^5 = 243 fits a byte
_OFFSET = 0.9677083  # of QLoRA's quantiles: the mean of 1 - 1/30 and 1 - 1/32
_RESIDUALS = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, -1 / 16, -1 / 8, -1 / 4)  # of rf8
_NAMES = "int, ternary, sign, nf, shift, pow2, rf8, or e<E>m<M>[fn] like e2m1, e4m3fn, e5m2"


def width(name: str, bits: int) -> int:
  """Check that a format has codes of a width.

  Args:
    name: a format's name, or "int".
    bits: width of a code.

  Returns:
    `bits`.

  Raises:
    ValueError: naming the format and the widths it has.

  Example:
    >>> width("e2m1", 4)
    4
  """
  match = re.fullmatch(r"e([1-7])m([0-6])(fn)?", name)
  if match:
    want = (1 + int(match[1]) + int(match[2]),)
    if match[3] and name != "e4m3fn":
      raise ValueError(f"format={name!r}: only e4m3fn has the ending fn; the others are finite")
  else:
    want = {
      "int": tuple(range(1, 9)), "nf": tuple(range(2, 9)), "shift": tuple(range(2, 6)),
      "pow2": tuple(range(2, 6)), "rf8": (8,), "sign": (1,), "ternary": (2,),
    }.get(name, ())  # fmt: skip
  if not want or max(want) > 8:
    raise ValueError(f"format={name!r}: valid are {_NAMES}, of up to 8 bits")
  if bits not in want:
    raise ValueError(f"format={name!r} has codes of {', '.join(map(str, want))} bits, not {bits}")
  return bits


@functools.cache
def levels(name: str, bits: int) -> Float[np.ndarray, " codes"]:
  """List the value of every code.

  Args:
    name: a format's name other than "int".
    bits: width of a code.

  Returns:
    float32; NaN where a code stands for no finite number.

  Example:
    >>> levels("e2m1", 4)[:8].tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
  """
  width(name, bits)
  if name == "sign":
    table = [-1.0, 1.0]
  elif name == "ternary":
    table = [-1.0, 0.0, 1.0, np.nan]
  elif name == "nf":
    return _normal(bits)
  elif name == "rf8":
    powers = 2.0 ** np.arange(-15, 1)
    positive = (powers[:, None] * (1 + np.asarray(_RESIDUALS))).ravel()
    positive[0] = 0.0
    table = [*positive, *-positive]
  elif name in ("shift", "pow2"):
    powers = 2.0 ** -np.arange(2 ** (bits - 1))
    positive = powers.copy()
    if name == "pow2":
      positive[-1] = 0.0
    table = [*positive, *-powers]
  else:
    return _minifloat(name, bits)
  return np.asarray(table, np.float32)


def divisor(name: str, bits: int) -> float:
  """Return what the largest magnitude is divided by to give a symmetric scale.

  Args:
    name: a format's name or "int".
    bits: width of a code.

  Returns:
    The largest value of the table; for integers half the number of steps (7.5 of 4 bits).

  Example:
    >>> divisor("int", 4), divisor("e4m3fn", 8)
    (7.5, 448.0)
  """
  return (2**bits - 1) / 2 if name == "int" else float(np.nanmax(np.abs(levels(name, bits))))


def encode(x: Float[Array, "..."], name: str, bits: int) -> UInt8[Array, "..."]:
  """Find the nearest code of every value; ties go to the even code, what is beyond to the end.

  Args:
    x: values in units of the scale.
    name: a format's name other than "int".
    bits: width of a code.

  Returns:
    Codes.

  Example:
    >>> encode(jnp.array([0.25, 0.75, 9.0, -0.1]), "e2m1", 4).tolist()
    [0, 2, 7, 8]
  """
  codes, middles, even = _search(name, bits)
  x = x.astype(jnp.float32)
  at = jnp.searchsorted(jnp.asarray(middles), x, method="scan_unrolled")
  # `at` goes down at a tie; the table says where up is even.
  at = at + (jnp.asarray(even)[at] & (x == jnp.asarray(np.append(middles, np.inf))[at]))
  found = jnp.asarray(codes)[at]
  zero = levels(name, bits)[0] == 0 and _signed(name)
  if zero:  # both zeros: the sign is kept, as hardware does
    half = jnp.uint8(2 ** (bits - 1))
    found = jnp.where((found % half == 0) & jnp.signbit(x), half, found)
  return found


def _signed(name: str) -> bool:
  return bool(re.fullmatch(r"e\dm\d(fn)?", name))


@functools.cache
def _search(name: str, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Sort a table: codes in the order of their values, midpoints, whether a tie goes up."""
  table = levels(name, bits)
  codes = np.flatnonzero(np.isfinite(table))
  _, first = np.unique(table[codes], return_index=True)  # minus zero goes, and what rf8 has twice
  codes = codes[first]
  values = table[codes].astype(np.float64)
  middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
  exact = middles == (values[1:] + values[:-1]) / 2
  up = (codes[1:] % 2 == 0) & (codes[:-1] % 2 == 1) & exact
  return codes.astype(np.uint8), middles, np.append(up, False)


def _normal(bits: int) -> np.ndarray:
  from scipy import special  # slow to import, and few need it

  half = 2 ** (bits - 1)
  positive = special.ndtri(np.linspace(_OFFSET, 0.5, half + 1))[:-1]
  negative = -special.ndtri(np.linspace(_OFFSET, 0.5, half))[:-1]
  table = np.sort(np.concatenate([positive, [0.0], negative]))
  return (table / table.max()).astype(np.float32)


def _minifloat(name: str, bits: int) -> np.ndarray:
  exponent_bits = int(name[1])
  mantissa_bits = bits - 1 - exponent_bits
  code = np.arange(2 ** (bits - 1))
  exponent, mantissa = code >> mantissa_bits, code % 2**mantissa_bits
  bias = 2 ** (exponent_bits - 1) - 1
  fraction = mantissa / 2.0**mantissa_bits + (exponent > 0)
  positive = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
  if name == "e4m3fn":
    positive[-1] = np.nan
  if name == "e5m2":
    positive[exponent == exponent.max()] = np.nan
  return np.concatenate([positive, -positive]).astype(np.float32)


def pack_trits(codes: UInt8[Array, "*batch rows cols"]) -> UInt8[Array, "*batch bytes cols"]:
  """Pack codes 0, 1, 2 along the rows, five to a byte.

  Args:
    codes: ternary codes.

  Returns:
    Bytes; the last one is filled up with 1, which stands for zero.

  Example:
    >>> pack_trits(jnp.array([[2], [1]], jnp.uint8))[:, 0].tolist()
    [122]
  """
  *batch, rows, cols = codes.shape
  widths = [(0, 0)] * len(batch) + [(0, -rows % TRITS), (0, 0)]
  runs = jnp.pad(codes, widths, constant_values=1).reshape(*batch, -1, TRITS, cols)
  powers = jnp.asarray([3**i for i in range(TRITS)], jnp.uint8)[:, None]
  return (runs * powers.reshape((1,) * (len(batch) + 1) + powers.shape)).sum(
    axis=-2, dtype=jnp.uint8
  )


def unpack_trits(
  stream: UInt8[Array, "*batch bytes cols"], *, rows: int
) -> UInt8[Array, "*batch rows cols"]:
  """Recover ternary codes.

  Args:
    stream: what `pack_trits` returned.
    rows: number of codes a column holds.

  Returns:
    Codes 0, 1, 2.

  Raises:
    ValueError: if the stream is too short or too long.

  Example:
    >>> unpack_trits(jnp.array([[122]], jnp.uint8), rows=2)[:, 0].tolist()
    [2, 1]
  """
  *batch, length, cols = stream.shape
  if length != -(-rows // TRITS):
    raise ValueError(f"{rows} ternary codes fill {-(-rows // TRITS)} bytes, not {length}")
  trits = jnp.stack([stream // 3**i % 3 for i in range(TRITS)], axis=-2)
  return jax.lax.slice_in_dim(trits.reshape(*batch, length * TRITS, cols), 0, rows, axis=len(batch))
