"""Which form of each operation a run takes, and why: one table, for the model, ``doctor`` and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_gspo.kernels.modules import has_package
from megatron_gspo.platforms import CUDA, here

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Machine:
    """What a choice depends on beside the configuration."""

    capability: int
    """Of the CUDA device, its major number; 0 without one."""
    triton: bool
    """Whether triton is installed."""
    apex: bool = False
    """Whether NVIDIA's apex is, with the product that adds to a gradient."""

    @classmethod
    def here(cls) -> Machine:
        """This process's machine."""
        import torch

        capability = torch.cuda.get_device_capability()[0] if here() is CUDA else 0
        return cls(capability, has_package("triton"), has_package("apex"))


@dataclass(frozen=True)
class Choice:
    """One operation's form."""

    implementation: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """What each row of the table is asked with."""

    setting: str
    """``model.kernels``"""
    dtype: str
    """``model.dtype``"""
    machine: Machine

    def without_triton(self) -> str | None:
        """Why a Triton kernel cannot serve, or None where it can."""
        reasons = {
            'model.kernels = "reference"': self.setting == "reference",
            f"kernels are for half types, and this is {self.dtype}": self.dtype not in HALF,
            "no CUDA device": not self.machine.capability,
            f"compute capability {self.machine.capability}.x is below 8.0": self.machine.capability < 8,
            "triton is not installed": not self.machine.triton,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


def _head(asked: Asked) -> Choice:
    reason = asked.without_triton()
    return Choice("tiles", reason) if reason else Choice("triton", "no logit is written to memory")


def _pointwise(asked: Asked) -> Choice:
    reason = asked.without_triton()
    return Choice("torch", reason) if reason else Choice("triton", "one pass over memory")


def _experts(asked: Asked) -> Choice:
    if asked.setting == "reference":
        return Choice("sequential", 'model.kernels = "reference"')
    return Choice("grouped", "two products a layer, each in the form of parallel.grouped.product_form")


def _gradients(asked: Asked) -> Choice:
    """Of Megatron's linear layers; those of experts and of the head are added where they accumulate in any case."""
    reasons = {
        'model.kernels = "reference"': asked.setting == "reference",
        "no CUDA device": not asked.machine.capability,
        "apex is not installed": not asked.machine.apex,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return Choice("added", reason) if reason else Choice("fused", "a product adds to the gradient, by apex")


OPERATIONS: dict[str, Callable[[Asked], Choice]] = {
    "head": _head,
    "norm": _pointwise,
    "rotary": _pointwise,
    "swiglu": _pointwise,
    "experts": _experts,
    "gradients": _gradients,
}
"""Operation -> what is taken for it. Adding one is an entry here."""


@dataclass(frozen=True)
class Kernels:
    """The forms that a model takes: ``kernels["head"]`` is "tiles" or "triton"."""

    choices: Mapping[str, Choice]

    def __getitem__(self, operation: str) -> str:
        return self.choices[operation].implementation

    def record(self) -> dict[str, dict[str, str]]:
        """For the manifest: operation -> its implementation and the reason."""
        return {name: {"implementation": it.implementation, "reason": it.reason} for name, it in self.choices.items()}

    def __str__(self) -> str:
        return "; ".join(f"{name}: {it.implementation} ({it.reason})" for name, it in self.choices.items())


def choose_kernels(setting: str, dtype: str, machine: Machine | None = None) -> Kernels:
    """The one place that chooses, from ``model.kernels``, ``model.dtype`` and the machine (by default this one)."""
    asked = Asked(setting, dtype, machine or Machine.here())
    return Kernels({operation: choose(asked) for operation, choose in OPERATIONS.items()})
