# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept; texts are tested by what they hold (`digests_test.py`)."""

import jax

from treesurgeon.io import cache


def test_programs_are_kept_unless_somebody_said_where(monkeypatch, tmp_path):
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {n: getattr(jax.config, n) for n in names}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    cache.keep_programs()  # the tests said: nowhere
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "treesurgeon" / "programs")
    assert (tmp_path / "treesurgeon" / "programs").is_dir()
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    cache.keep_programs()  # a home that cannot be written costs time only
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
