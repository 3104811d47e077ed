# SPDX-License-Identifier: Apache-2.0
"""The accelerators that kernels are written for: what they are called and what they can do."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
  """One kind of TPU chip; on tpu7x, which shows its two cores apart, one core.

  Clocks are not published. These reproduce the published peak of a dense product within 3 to 13 %
  when the compiler's cycles are counted (docs/results/kernels.md), so they are assumptions that
  every microsecond stated for a chip shares, the dense product's too.

  Attributes:
    kind: what `jax.Device.device_kind` says.
    topology: smallest one that every libtpu compiles for ahead of time.
    clock_mhz: of the TensorCore, assumed.
    memory: bytes.
    bandwidth: of the memory, bytes a microsecond.
    peak: operations of the matrix unit a microsecond, in bfloat16.
    depth: rows of the matrix unit.
    integers: whether it multiplies int8 faster than bfloat16.
    converts: whether small integers become bfloat16 in few instructions, and bfloat16 is computed
      with; before, both go through float32.
  """

  kind: str
  topology: str
  clock_mhz: float
  memory: int
  bandwidth: float
  peak: float
  depth: int
  integers: bool
  converts: bool


DEVICES = {
  "tpu-v5e": Device("TPU v5 lite", "v5e:2x2", 1500.0, 16 << 30, 819e3, 197e6, 128, True, False),
  "tpu-v5p": Device("TPU v5", "v5p:2x2x1", 1750.0, 95 << 30, 2765e3, 459e6, 128, True, False),
  "tpu-v6e": Device("TPU v6 lite", "v6e:2x2", 1750.0, 32 << 30, 1640e3, 918e6, 256, True, True),
  "tpu7x": Device("TPU7x", "tpu7x:2x2x1", 2200.0, 96 << 30, 3690e3, 1153e6, 256, False, True),
}


def find(target: str) -> Device:
  """Look a device up.

  Args:
    target: name from `DEVICES`.

  Returns:
    The device.

  Raises:
    ValueError: naming those there are.

  Example:
    >>> find("tpu-v6e").kind
    'TPU v6 lite'
  """
  if target not in DEVICES:
    raise ValueError(f"target={target!r} is unknown; known are {', '.join(DEVICES)}")
  return DEVICES[target]


def here() -> str | None:
  """Name the device this process computes on, or None if no kernel was written for it.

  Returns:
    A name from `DEVICES`, or None.

  Example:
    >>> here() in (None, *DEVICES)
    True
  """
  kind = jax.devices()[0].device_kind
  return next((name for name, device in DEVICES.items() if device.kind == kind), None)
