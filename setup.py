# SPDX-License-Identifier: Apache-2.0
"""Packaging: four top-level folders are one import package.

`lib/` is imported as `treesurgeon`, and `kernels/`, `experiments/` and `configs/` as its
subpackages. Two layouts break that mapping: a folder `lib/kernels`, `lib/experiments` or
`lib/configs` would shadow the real one, and `editable_mode=compat` cannot express it.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent
ROOTS = {
  "treesurgeon": "lib",
  "treesurgeon.kernels": "kernels",
  "treesurgeon.experiments": "experiments",
  "treesurgeon.configs": "configs",
}

REQUIRES = [
  "absl-py>=2.1",
  "cmaes>=0.11",
  "etils[epath]>=1.9",
  "flax>=0.12",
  "grain>=0.2.12",
  "jax>=0.10.2",
  "jaxtyping>=0.3",
  "jinja2>=3.1",
  "matplotlib>=3.9",
  "ml-collections>=1.0",
  "ml_dtypes>=0.5",
  "numpy>=2.0",
  "optax>=0.2.6",
  "orbax-checkpoint>=0.11.28",
  "PyYAML>=6.0",
  "rich>=13.7",
  "safetensors>=0.5",
  "scipy>=1.14",
  "tensorboardX>=2.6.2",
  "tokenizers>=0.21",
]

# `test` runs the suite. It holds libtpu where that exists: kernels and the pod plan are compiled
# ahead of time with the real TPU compiler, which needs no TPU.
TPU = ["jax[tpu]>=0.10.2; sys_platform == 'linux' and platform_machine == 'x86_64'"]
TEST = [
  "beartype>=0.20",
  "hypothesis>=6.100",
  "pytest>=8.3",
  "pytest-xdist>=3.6",
  "scikit-learn>=1.5",
  "setuptools>=77",
]

EXTRAS = {
  "test": TEST + TPU,
  "dev": [*TEST, *TPU, "pre-commit>=4.0", "pyright[nodejs]>=1.1.400", "ruff>=0.12"],
  "eval": ["lm-eval>=0.4.9", "scikit-learn>=1.5"],
  "gguf": ["gguf>=0.19"],
  "tpu": TPU,
  # Other people's implementations, used as oracles by tests/peers and never by the library.
  "peers": [
    *TEST,
    "compressed-tensors==0.20.0",
    # GPTQModel, by which transformers reads GPTQ and AWQ, wants a newer torch than there is for
    # the others and runs on this one: the Makefile installs it without its requirements.
    "defuser==0.0.28",
    "device-smi==0.5.7",
    "gguf==0.19.0",
    "logbar==0.4.15",
    "mergekit==0.1.5",
    "mlx[cpu]==0.32.4",
    "mlx-lm==0.32.2",
    "optimum==2.3.0",
    "peft==0.21.2",
    "pypcre==0.6.4",
    "requests>=2.32",
    "tokenicer==0.0.14",
    "torch==2.13.0",
    "transformers==5.23.0",
  ],
}


def packages() -> list[str]:
  """Returns every package of the mapping, found below each root."""
  found = []
  for package, folder in ROOTS.items():
    found.append(package)
    found += [f"{package}.{name}" for name in setuptools.find_packages(str(ROOT / folder))]
  return sorted(found)


def version() -> str:
  """Reads `__version__` from the package without importing it."""
  text = (ROOT / "lib" / "__init__.py").read_text(encoding="utf-8")
  match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
  if match is None:
    raise ValueError('lib/__init__.py must hold a line like __version__ = "0.1.0"')
  return match.group(1)


if __name__ == "__main__":
  setuptools.setup(
    name="treesurgeon",
    version=version(),
    description="Compress, grow, merge and edit trained networks, in JAX.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=ROOTS,
    packages=packages(),
    package_data={"treesurgeon": ["py.typed"], "treesurgeon.kernels": ["tuned/*.json"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["treesurgeon = treesurgeon.cli.main:main"]},
    classifiers=[
      "Intended Audience :: Science/Research",
      "Programming Language :: Python :: 3.11",
      "Programming Language :: Python :: 3.12",
      "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
  )
