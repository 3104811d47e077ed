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


@dataclasses.dataclass(frozen=True)
class Gpu:
  """One kind of GPU: those whose compute capability begins with a number.

  Rates are those of an H200, by its data sheet, and choose tiles only.

  Attributes:
    capability: first part of the compute capability. Tensor cores are programmed differently in
      each, so a kernel is for one only.
    sms: multiprocessors.
    bandwidth: of the memory, bytes a microsecond.
    peak: operations of the tensor cores a microsecond, in bfloat16.
  """

  capability: int
  sms: int
  bandwidth: float
  peak: float


GPUS = {"gpu-sm90": Gpu(9, 132, 4800e3, 989e6)}


def find(target: str) -> Device:
  """Look a TPU up.

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
    raise ValueError(f"target={target!r} is unknown; known are {', '.join((*DEVICES, *GPUS))}")
  return DEVICES[target]


def here() -> str | None:
  """Name the device this process computes on, or None if no kernel was written for it.

  Returns:
    A name from `DEVICES` or `GPUS`, or None.

  Example:
    >>> here() in (None, *DEVICES, *GPUS)
    True
  """
  first = jax.devices()[0]
  major = str(getattr(first, "compute_capability", "")).split(".")[0]
  names = {name: device.kind == first.device_kind for name, device in DEVICES.items()}
  names |= {name: str(gpu.capability) == major for name, gpu in GPUS.items()}
  return next((name for name, is_it in names.items() if is_it), None)
