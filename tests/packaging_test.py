# SPDX-License-Identifier: Apache-2.0
"""What setup.py ships is what lies on disk."""

import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
ROOTS = SETUP["ROOTS"]


def public_name(path: pathlib.Path, package: str, folder: str) -> str:
  return ".".join([package, *path.relative_to(ROOT / folder).parts])


def test_packages_are_the_folders_that_hold_code():
  on_disk = {
    public_name(path.parent, package, folder)
    for package, folder in ROOTS.items()
    for path in (ROOT / folder).rglob("*.py")
  }
  assert set(SETUP["packages"]()) == on_disk, "a folder without __init__.py is not shipped"


def test_no_folder_shadows_another_root():
  shadows = [
    name for name in ("kernels", "experiments", "configs") if (ROOT / "lib" / name).exists()
  ]
  assert not shadows, f"lib/{shadows} would shadow the folder of that name at the top"


def test_version_is_that_of_the_changelog():
  newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert newest is not None
  assert newest.group(1) == SETUP["version"]()


def test_every_requirement_is_pinned():
  pins = {
    re.split(r"[=;\s]", line)[0].lower().replace("_", "-")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
  }
  wanted = SETUP["REQUIRES"] + [item for items in SETUP["EXTRAS"].values() for item in items]
  names = {re.split(r"[\[<>=;\s]", item)[0].lower().replace("_", "-") for item in wanted}
  assert names <= pins


def test_ignore_file_keeps_the_source():
  lines = (ROOT / ".gitignore").read_text().split()
  assert not {"lib", "lib/", "/lib/", "/lib"} & set(lines)


@pytest.mark.slow
def test_wheel_holds_every_file_and_imports(tmp_path):
  source = tmp_path / "source"
  for folder in ROOTS.values():
    shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  # The build tool of this environment, so that nothing is fetched.
  command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
  subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    archive.extractall(tmp_path / "wheel")
  expected = {
    "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
    for package, folder in ROOTS.items()
    for pattern in ("*.py", "py.typed", "tuned/*.json")
    for path in (ROOT / folder).rglob(pattern)
  }
  assert shipped == expected
  code = (
    "import treesurgeon, treesurgeon.kernels, treesurgeon.experiments; print(treesurgeon.__file__)"
  )
  result = subprocess.run(
    [sys.executable, "-P", "-c", code],
    env={"PYTHONPATH": str(tmp_path / "wheel")},
    cwd=tmp_path,
    check=True,
    capture_output=True,
    text=True,
  )
  assert result.stdout.strip() == str(tmp_path / "wheel" / "treesurgeon" / "__init__.py")
