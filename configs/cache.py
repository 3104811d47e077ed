# SPDX-License-Identifier: Apache-2.0
"""Few bits for keys and values: what layouts of groups do to a small model's cache.

A byte-level decoder learns the standard library's code and prose. Then the keys and values of the
first half of held-out rows are rounded, and the other half is scored over them: the loss, and the
root mean square of what changed in the logits. Keys and values are grouped per channel over tokens,
or per token over channels; KIVI's layout is keys per channel, values per token. The last 32 tokens
stay as they are. What speaks for keys per channel is that large models have channels that are large
for every token. A network this small has none, so each arm is measured on a second network too,
"outliers", which computes the same: two channels of each head's keys that rotate together are
multiplied by 8, and those of its queries divided. Claims are differences that are negative where a
claim holds; one is counted as reproduced if it holds for every seed.

Measured, three seeds, root mean squares of 2-bit errors in the logits: KIVI's layout 0.25, 0.15 and
0.17, all per token 0.21, 0.12 and 0.15, all per channel 0.25, 0.16 and 0.18; with outliers all per
token has 1.66, 1.68 and 1.54, which costs 0.75, 0.83 and 0.70 nats a byte, and the others what they
had: KIVI's layout costs 0.009, 0.005 and 0.006. At 4 bits it has 0.034, 0.023 and 0.025, at 8 bits
0.002, 0.001 and 0.001. The library's own cache has the errors of KIVI's layout to the last digit.

Cost: some minutes a seed on two CPU cores. Command:
python -P -m treesurgeon.experiments.cache_directions --config=configs/cache.py --workdir=DIR

Variants: `configs/cache.py:smoke` runs every arm at toy size, where no claim need hold.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    "seeds", the network and its training, sizes of the cache, and "claims" (text, arm that shall
    have less, arm that shall have more, of what, at which widths).

  Raises:
    ValueError: for another variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"configs/cache.py has no variant {arg!r}; valid: smoke")
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.seeds = (0,) if smoke else (0, 1, 2)
  config.spec = {"d_model": 32 if smoke else 128, "num_layers": 2, "num_heads": 1 if smoke else 4,
                 "d_ff": 32 if smoke else 256}  # fmt: skip
  config.length, config.batch = (64, 4) if smoke else (256, 16)
  config.steps, config.rate = 4 if smoke else 400, 3e-3
  config.calibration, config.test = (8, 8) if smoke else (16, 32)
  config.group_size, config.residual = (16, 16) if smoke else (32, 32)
  config.bits, config.gain = (2, 4, 8), 8.0
  kivi, token, channel = "kivi", "all per token", "all per channel"
  wide = [f"{arm}, outliers" for arm in (kivi, token)]
  widths = ("2 bits", "4 bits")
  config.claims = (
    ("keys per channel better than per token", kivi, token, "logits", widths),
    ("keys per channel better than per token: loss", kivi, token, "loss", ("2 bits",)),
    ("with outliers, keys per channel better than per token", *wide, "logits", widths),
    ("with outliers, keys per channel better than per token: loss", *wide, "loss", widths),
    ("values per token better than per channel", kivi, channel, "logits", widths),
  )
  return config
