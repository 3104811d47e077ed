# SPDX-License-Identifier: Apache-2.0
"""What launchers of experiments have in common: a config, and a folder for what comes out."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags


def run(main: Callable[[Mapping[str, Any], pathlib.Path], None]) -> None:
  """Define --config and --workdir, and run an experiment by what they say.

  Args:
    main: takes the config, and the work directory, which exists.
  """
  flags.disclaim_key_flags()  # they are the launcher's, whose --help shows them
  config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
  flags.DEFINE_string("workdir", None, "Where to keep what comes out.")
  flags.mark_flags_as_required(["config", "workdir"])

  def begin(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    workdir = pathlib.Path(flags.FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    main(flags.FLAGS.config.to_dict(), workdir)

  app.run(begin)
