"""The C++ extension; everything else is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_gspo._packing",
            ["megatron_gspo/csrc/packing.cpp"],
            cxx_std=17,
            # No fused multiply-add: every rank makes the plan for itself, and on mixed machines they must agree.
            extra_compile_args=["-O3", "-ffp-contract=off"],
        )
    ]
)
