"""Builds the compiled kernels, ``twnn_plugin.kernels``; everything else is said in pyproject.toml."""

import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

# One build serves every version of Python from 3.11 on.
_LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


class Build(build_ext):
    """With several threads where the compiler knows OpenMP, and by one elsewhere.

    Where there is no compiler nothing is built, with a warning: the solvers use operations of torch then.
    """

    def build_extension(self, ext):
        if self.compiler.compiler_type == "msvc":
            plain, threaded = ["/O2", "/std:c11"], ["/openmp"]
        else:
            plain, threaded = ["-O3", "-g0"], ["-fopenmp"]
        link = [] if self.compiler.compiler_type == "msvc" else threaded
        ext.extra_compile_args, ext.extra_link_args = [*plain, *threaded], link
        try:
            super().build_extension(ext)
        except BaseError:
            ext.extra_compile_args, ext.extra_link_args = plain, []
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "twnn_plugin.kernels._rows",
            ["twnn_plugin/kernels/rows.c"],
            depends=[f"twnn_plugin/kernels/{name}.h" for name in ("passes", "kelley", "gate")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if _LIMITED else [],
            py_limited_api=_LIMITED,
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if _LIMITED else {},
)
