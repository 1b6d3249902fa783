"""The optional C++ library of qlr_jax/native; everything else is said in pyproject.toml."""

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
# -ffp-contract=off: every instruction set gives the same bits, with no products fused but those that are written so
FLAGS = ["-std=c++17", "-O3", "-g0", "-w", "-fvisibility=hidden", "-ffp-contract=off"]


def native() -> list[Extension]:
    """The extension, where jaxlib's headers are there and a compiler of the GCC or Clang family is usual."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations or sys.platform == "win32":
        print("qlr-jax: no headers of jaxlib: the native search is left out, and XLA's takes its place", file=sys.stderr)
        return []
    spec = importlib.util.spec_from_file_location("native", HERE / "qlr_jax" / "native" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = Path("qlr_jax") / "native"
    return [
        Extension(
            "qlr_jax.native._kernels",
            sources=sorted(str(folder / path.name) for path in module.SOURCES.glob("*.cpp")),
            depends=sorted(str(folder / path.name) for path in module.SOURCES.glob("*.h")),
            include_dirs=[str(Path(found.submodule_search_locations[0]) / "include")],
            define_macros=[("QLR_SOURCES", f'"{module.digest()}"')],
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ]


class OnAllCores(build_ext):
    """Files of an extension compile side by side; setuptools takes them one after the other."""

    def build_extension(self, ext: Extension) -> None:
        one_by_one = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [file for found in pool.map(lambda path: one_by_one([path], **options), sources) for file in found]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = one_by_one


setup(ext_modules=native(), cmdclass={"build_ext": OnAllCores})
