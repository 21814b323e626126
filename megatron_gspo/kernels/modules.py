"""Which packages of kernels are installed: known by the modules that are used of them, and nothing is imported."""

from __future__ import annotations

import importlib.util

MODULES = {
    "transformer-engine": ("transformer_engine", "transformer_engine_torch"),
    "apex": ("apex", "fused_weight_gradient_mlp_cuda"),
    "triton": ("triton",),
}
"""Package -> the modules it must have. Transformer Engine's core alone computes nothing of torch's; apex's extension is
the product that Megatron's linear layers call, and the registry has another package of its name."""


def missing_modules(package: str) -> list[str]:
    """Those of ``MODULES`` that this environment does not have; none where the package can be used."""
    return [module for module in MODULES[package] if not has_module(module)]


def has_package(package: str) -> bool:
    """Whether all that is used of a package is installed."""
    return not missing_modules(package)


def has_module(name: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
