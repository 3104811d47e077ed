# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: one CPU device, strict ranks, checked shapes.

Tests that need several devices start a process of their own with `XLA_FLAGS` set
(`multidevice_test.py`), because the number of devices is fixed when JAX first runs.
"""

import gc
import itertools
import os
import pathlib

# On the CPU, but for a test of what a GPU computes (kernels/matmul/gpu_device_test.py).
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
# No command of a test shall take programs from the user's cache, or leave some there.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
# A caller's flags, such as virtual devices, would change what is tested.
os.environ["XLA_FLAGS"] = ""

import beartype
import jax
import jaxtyping
import pytest

PEERS = pathlib.Path(__file__).parent / "peers"
# Every compiled program maps a few pieces of memory, and Linux gives a process 65,530 of them: one
# that compiles thousands of programs dies of it, wherever it happens to compile the next.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 32_000
_tests = itertools.count(1)
# What the peers warn about in their own code is not ours to mend; our warnings stay errors.
PEERS_WARNINGS = (
  r"ignore:::(accelerate|huggingface_hub|mergekit|peft|torch|transformers)(\.|$)",
  "ignore:numpy.core is deprecated:DeprecationWarning",  # unpickling, in mergekit
)

# Shapes and types are checked in tests only: the hook wraps each function as it is imported. It
# takes the checker by dotted name; ours lets an int stand for a float, as type checkers do.
beartype.with_numeric_tower = beartype.beartype(  # pyright: ignore[reportAttributeAccessIssue]
  conf=beartype.BeartypeConf(is_pep484_tower=True)
)
jaxtyping.install_import_hook(["treesurgeon"], "beartype.with_numeric_tower")


def pytest_configure(config: pytest.Config) -> None:
  """Sets JAX up before any test module is imported."""
  jax.config.update("jax_numpy_rank_promotion", "raise")
  gc.set_threshold(50_000, 20, 50)  # looking for garbage took a thirtieth of the time
  if not names_peers(config) and os.environ["JAX_PLATFORMS"] == "cpu":
    # Nearly all the time of these tests goes into compiling: LLVM's optimizations are a quarter of
    # it, and what is left falls to a quarter with the former way of emitting fusions, which later
    # versions do not have. Peers are compared with what users run.
    fast = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):
      fast.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(fast)
  if names_peers(config):
    for line in PEERS_WARNINGS:
      config.addinivalue_line("filterwarnings", line)
  cache = getattr(config, "cache", None)
  if cache is not None:
    # A second run on the same machine finds its programs compiled.
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(autouse=True)
def _few_programs():
  """Lets go of compiled programs between two tests, once they are many; seldom looks."""
  yield
  if next(_tests) % 20 == 0 and MAPS.is_file():
    if MAPS.read_bytes().count(b"\n") > MANY_MAPS:
      jax.clear_caches()
      gc.collect()


@pytest.fixture(scope="session")
def eight_devices() -> dict[str, str]:
  """The environment of a process with eight virtual CPU devices."""
  flags = (
    os.environ["XLA_FLAGS"],
    "--xla_force_host_platform_device_count=8",
    # They share few cores: on a busy machine a collective waits for long.
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
    "--xla_cpu_collective_timeout_seconds=1200",
  )
  # Two programs in flight would each hold threads that the other's collectives wait for; and with
  # as many threads as devices one that is late can keep all others waiting for ever.
  more = {"JAX_PLATFORMS": "cpu", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0", "PJRT_NPROC": "32"}
  return {**os.environ, "XLA_FLAGS": " ".join(flags), **more}


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
  """Leaves out tests/peers, which needs its own environment, unless it was named."""
  return True if collection_path == PEERS and not names_peers(config) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks what lies in tests/peers, so that no test there has to."""
  for item in items:
    if item.path.is_relative_to(PEERS):
      item.add_marker(pytest.mark.peers)


def names_peers(config: pytest.Config) -> bool:
  """Tells whether the command line names tests/peers or something in it."""
  here = config.invocation_params.dir
  paths = [(here / argument.split("::")[0]).resolve() for argument in config.args]
  return any(path.is_relative_to(PEERS) for path in paths)
