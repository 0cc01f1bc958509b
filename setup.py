"""The two C++ extensions. Everything else is in pyproject.toml.

They are top-level modules: an extension inside the package would be shadowed by the checkout after a plain
`pip install .`. A machine without a compiler gets the Python references instead, and is told so once.
"""

import os
import sys
import warnings
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

EXTENSIONS = {"fused_ema_C": "csrc/fused_ema", "jepa_fast_C": "csrc/jepa_fast"}


class OptionalBuild(build_ext):
    """A failed compilation costs speed, not the installation."""

    def build_extension(self, extension) -> None:
        try:
            super().build_extension(extension)
        except Exception as error:
            warnings.warn(
                f"{extension.name} was not built ({error}); the slower Python reference will be used", stacklevel=1
            )

    def copy_extensions_to_source(self) -> None:
        built = [
            e
            for e in self.extensions
            if os.path.exists(self.get_ext_fullpath(e.name)) or os.path.exists(self._built(e))
        ]
        self.extensions = built
        super().copy_extensions_to_source()

    def _built(self, extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name)))


def extension(name: str, folder: str) -> Pybind11Extension:
    openmp = [] if sys.platform in ("darwin", "win32") else ["-fopenmp"]
    return Pybind11Extension(
        name,
        sorted(glob(f"{folder}/*.cpp")),
        depends=sorted(glob(f"{folder}/*.h")),
        cxx_std=17,
        # psabi: vectors as arguments, of functions that are always inlined
        extra_compile_args=[] if sys.platform == "win32" else ["-O3", "-Wno-psabi", *openmp],
        extra_link_args=openmp,
    )


skip = os.environ.get("JEPA_FAST_NO_EXT") == "1"
ParallelCompile("JEPA_FAST_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[]
    if skip
    else [extension(name, folder) for name, folder in EXTENSIONS.items() if os.path.isdir(folder)],
    cmdclass={"build_ext": OptionalBuild},
)
