# SPDX-License-Identifier: Apache-2.0
"""How mixtures of experts keep their weights: Mixtral, Qwen2-MoE, Qwen3-MoE.

Tensors are named one expert at a time, as the models were first released, which every version of
`transformers` and other engines read; `transformers` 5 fuses them as it loads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PARTS = ("gate_proj", "up_proj", "down_proj")
_ATTENTION_BIAS = re.compile(r".*self_attn\.[qkvo]_proj\.bias")
# What a config.json that leaves them out means, where the mixture's own defaults are others.
_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
# Settings of dense models that the mixtures do not have, or that the mixture sets anew.
_DROPPED = (
  "attention_bias", "auto_map", "layer_types", "max_window_layers", "mlp_bias", "pretraining_tp",
  "sliding_window", "use_sliding_window", "_name_or_path", "transformers_version",
)  # fmt: skip


class Layout(NamedTuple):
  """One architecture of mixtures.

  Attributes:
    name: as a configuration's `architecture` has it.
    model_type, architecture: of config.json.
    sources: model types that experts may have.
    shared: how many shared experts it has.
    module: path of a layer's mixture, after "model.layers.N.".
    parts: what it calls gate_proj, up_proj and down_proj.
    biases: which attention projections have biases: "none", "qkv" (zeros where there are none) or
      "any".
    fields: config.json's keys for the number of experts and of those a token goes to.
  """

  name: str
  model_type: str
  architecture: str
  sources: tuple[str, ...]
  shared: int
  module: str
  parts: tuple[str, str, str]
  biases: str
  fields: tuple[str, str]

  def gate(self, layer: int) -> str:
    """Name a layer's router."""
    return f"model.layers.{layer}.{self.module}.gate.weight"

  def expert(self, layer: int, expert: int, part: str) -> str:
    """Name an expert's tensor; `part` is one of `PARTS`."""
    own = self.parts[PARTS.index(part)]
    return f"model.layers.{layer}.{self.module}.experts.{expert}.{own}.weight"


MIXTRAL = Layout(
  "mixtral", "mixtral", "MixtralForCausalLM", ("llama", "mistral"), 0, "block_sparse_moe",
  ("w1", "w3", "w2"), "none", ("num_local_experts", "num_experts_per_tok"),
)  # fmt: skip
QWEN2 = Layout(
  "qwen moe", "qwen2_moe", "Qwen2MoeForCausalLM", ("llama", "mistral", "qwen2"), 1, "mlp", PARTS,
  "qkv", ("num_experts", "num_experts_per_tok"),
)  # fmt: skip
QWEN3 = Layout(
  "qwen3 moe", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), 0, "mlp", PARTS, "any",
  ("num_experts", "num_experts_per_tok"),
)  # fmt: skip
LAYOUTS = (MIXTRAL, QWEN2, QWEN3)


def choose(wanted: str | None, types: Mapping[str, str], shared: int) -> Layout:
  """Choose the architecture that can hold the experts.

  Args:
    wanted: the beginning of a layout's name; None takes the first that fits.
    types: model to its model_type.
    shared: how many shared experts there are.

  Returns:
    The layout.

  Raises:
    ValueError: saying why none fits.

  Example:
    >>> choose(None, {"a": "qwen3"}, 0).model_type
    'qwen3_moe'
  """
  held = [x for x in LAYOUTS if wanted is None or x.name.startswith(wanted.lower())]
  if not held:
    names = ", ".join(x.name for x in LAYOUTS)
    raise ValueError(f"architecture={wanted!r} is not supported; supported: {names}")
  kinds = set(types.values())
  if len(kinds) > 1:
    told = ", ".join(f"{model} is {kind}" for model, kind in types.items())
    raise ValueError(f"all models must be of one type; {told}")
  (kind,) = kinds
  fit = [x for x in held if kind in x.sources and x.shared == shared]
  if fit:
    return fit[0]
  told = "; ".join(f"{x.name}: {' or '.join(x.sources)}, {x.shared} shared" for x in held)
  raise ValueError(f"no architecture holds {kind} experts with {shared} shared ones; {told}")


def config(layout: Layout, base: Mapping[str, Any], experts: int, chosen: int) -> dict[str, Any]:
  """Write the config.json of a mixture.

  Args:
    layout: its architecture.
    base: config.json of the base model.
    experts: their number.
    chosen: how many a token goes to.

  Returns:
    The content.

  Raises:
    ValueError: for a base whose heads the architecture cannot express.
  """
  kept = {k: v for k, v in base.items() if k not in _DROPPED}
  defaults = dict(_DEFAULTS) | (_MISTRAL if base.get("model_type") == "mistral" else {})
  defaults.setdefault("num_key_value_heads", base.get("num_attention_heads"))
  if "rope_theta" not in base and "rope_parameters" not in base:
    defaults["rope_theta"] = 10000.0
  count, per_token = layout.fields
  out = {**defaults, **kept}
  out |= {
    "architectures": [layout.architecture], "model_type": layout.model_type, count: experts,
    per_token: chosen, "sliding_window": None, "output_router_logits": False,
  }  # fmt: skip
  if layout is not MIXTRAL:
    out |= {
      "moe_intermediate_size": base["intermediate_size"], "decoder_sparse_step": 1,
      "norm_topk_prob": True, "mlp_only_layers": [], "use_sliding_window": False,
    }  # fmt: skip
  if layout is QWEN2:
    out |= {"shared_expert_intermediate_size": base["intermediate_size"], "qkv_bias": True}
    width = base["hidden_size"] // base["num_attention_heads"]
    if base.get("head_dim") not in (None, width):
      raise ValueError(f"head_dim={base['head_dim']}: {layout.name} has heads of {width} only")
    out.pop("head_dim", None)
  if layout is QWEN3:
    out["attention_bias"] = base.get("attention_bias", False)
  return out


def check_biases(layout: Layout, names: Sequence[str], model: str) -> None:
  """Refuse biases that an architecture has no place for.

  Args:
    layout: the architecture.
    names: tensors of the base.
    model: its name, for the message.

  Raises:
    ValueError: naming the tensor.
  """
  allowed = {"none": "", "qkv": "qkv", "any": "qkvo"}[layout.biases]
  for name in names:
    odd = _ATTENTION_BIAS.fullmatch(name) and name.split(".")[-2][0] not in allowed
    if odd or (".mlp." in name and name.endswith(".bias")):
      raise ValueError(f"{model}: {name}: {layout.name} has no such bias")


def zero_biases(layout: Layout, config: Mapping[str, Any], layers: int) -> dict[str, int]:
  """List the biases that the architecture asks for: name to width.

  Args:
    layout: the architecture.
    config: of the mixture.
    layers: how many there are.

  Returns:
    Empty unless the architecture always has them.
  """
  if layout.biases != "qkv":
    return {}
  width = config["hidden_size"] // config["num_attention_heads"]
  heads = {"q": config["num_attention_heads"]} | dict.fromkeys("kv", config["num_key_value_heads"])
  return {
    f"model.layers.{i}.self_attn.{part}_proj.bias": count * width
    for i in range(layers)
    for part, count in heads.items()
  }
