# SPDX-License-Identifier: Apache-2.0
"""Build `.shim/treesurgeon`, links that lay the source out as the package is imported.

Type checkers search folders and know nothing of `package_dir`, so they need one real tree.
"""

import pathlib
import runpy
import shutil

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
  """Replaces the shim by one that fits the folders of today."""
  shim = ROOT / ".shim"
  shutil.rmtree(shim, ignore_errors=True)
  roots = runpy.run_path(str(ROOT / "setup.py"))["ROOTS"]
  for package, folder in roots.items():
    target = shim.joinpath(*package.split("."))
    target.mkdir(parents=True)
    for entry in sorted((ROOT / folder).iterdir()):
      if entry.name != "__pycache__":
        (target / entry.name).symlink_to(entry)


if __name__ == "__main__":
  main()
