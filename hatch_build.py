"""Builds the C++ kernels of kvfold.kernels.cpu; without a compiler the package does without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/kvfold/kernels/cpu/native")


class NativeBuildHook(BuildHookInterface):
    """Runs CMake, and puts the extension beside its module; `KVFOLD_NATIVE=0` leaves it out."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before files are collected."""
        if self.target_name != "wheel" or os.environ.get("KVFOLD_NATIVE") == "0":
            return
        root = Path(self.root)
        try:
            built = build(root)
        except (OSError, ImportError, subprocess.CalledProcessError, StopIteration) as error:
            self.app.display_warning(
                f"kvfold's C++ kernels were not built, attention on CPUs runs in torch: {error!r}"
            )
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(str(built.relative_to(root)))


def build(root: Path) -> Path:
    """The extension, built and copied to where it is imported from."""
    import nanobind

    folder = root / "build" / f"native-{sys.implementation.cache_tag}"
    command = ["cmake", "-S", str(root / NATIVE), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind.cmake_dir()}"]
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(command, check=True)
    subprocess.run(["cmake", "--build", str(folder), "--parallel"], check=True)
    found = next(path for path in folder.glob("_native.*") if path.suffix in (".so", ".pyd"))
    target = root / NATIVE.parent / found.name
    shutil.copyfile(found, target)
    return target
