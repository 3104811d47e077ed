# SPDX-License-Identifier: Apache-2.0
"""Families of networks that `lib/models` reads and writes."""

from treesurgeon.registry import entries

ARCHITECTURES: dict[str, entries.Architecture] = {
  "BERT, MiniLM": entries.Architecture("Devlin et al., BERT, 2018, arXiv 1810.04805", ("bert",)),
  "Gemma 1, 2, 3": entries.Architecture(
    "Gemma team, Gemma 3 technical report, 2025, arXiv 2503.19786",
    ("gemma", "gemma2", "gemma3_text"),
  ),
  "GPT-2": entries.Architecture(
    "Radford et al., Language models are unsupervised multitask learners, 2019", ("gpt2",)
  ),
  "GPT-J": entries.Architecture("Wang and Komatsuzaki, GPT-J-6B, 2021", ("gptj",)),
  "GPT-NeoX, Pythia": entries.Architecture(
    "Black et al., GPT-NeoX-20B, 2022, arXiv 2204.06745", ("gpt_neox",)
  ),
  "Llama 2, 3": entries.Architecture(
    "Grattafiori et al., The Llama 3 herd of models, 2024, arXiv 2407.21783", ("llama",)
  ),
  "Mistral": entries.Architecture("Jiang et al., Mistral 7B, 2023, arXiv 2310.06825", ("mistral",)),
  "Mixtral": entries.Architecture(
    "Jiang et al., Mixtral of experts, 2024, arXiv 2401.04088",
    ("mixtral",),
    "every expert computes every token: exact, but as costly as if all were chosen",
  ),
  "OLMo 2": entries.Architecture("OLMo team, 2 OLMo 2 Furious, 2025, arXiv 2501.00656", ("olmo2",)),
  "OPT": entries.Architecture("Zhang et al., OPT, 2022, arXiv 2205.01068", ("opt",)),
  "OpenELM, layer-wise scaling": entries.Architecture(
    "Mehta et al., OpenELM, 2024, arXiv 2404.14619",
    ("openelm",),
    "unequal layers are several segments; the reference is written from the published definition",
  ),
  "Qwen2, Qwen2.5": entries.Architecture(
    "Qwen team, Qwen2.5 technical report, 2024, arXiv 2412.15115", ("qwen2",)
  ),
  "Qwen3": entries.Architecture(
    "Qwen team, Qwen3 technical report, 2025, arXiv 2505.09388", ("qwen3",)
  ),
  "Qwen3-MoE": entries.Architecture(
    "Qwen team, Qwen3 technical report, 2025, arXiv 2505.09388",
    ("qwen3_moe",),
    "all layers mixtures, as released",
  ),
}
