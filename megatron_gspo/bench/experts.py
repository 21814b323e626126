"""A layer's experts, forward and backward: each form of the grouped product, and Megatron's ``SequentialMLP``.

All of them take the same rows and weights, in turns within one process, so that what slows the machine slows all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_gspo.bench.measure import Clock, Spread, machine
from megatron_gspo.errors import ConfigError
from megatron_gspo.kernels.swiglu import swiglu
from megatron_gspo.parallel.grouped import FORMS, Form, Runs, grouped_linear, product_form
from megatron_gspo.platforms import here

SEQUENTIAL = "sequential"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
Pass = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    widths: tuple[int, ...] = (64, 256, 1024)
    """Hidden sizes; an expert's own is half as much."""
    experts: int = 128
    rows: int = 8
    """Of each expert."""
    dtype: str = "float32"
    repetitions: int = 9


def run(settings: Settings) -> dict[str, Any]:
    """Measures every width.

    Returns {"machine", "settings", "rows": [{"width", "form", "ms": {median, smallest, largest}, "chosen"}]}.
    Raises ConfigError for a width without a half.
    """
    if odd := [width for width in settings.widths if width % 2]:
        raise ConfigError(f"--widths {odd[0]}: an expert is half as wide, so choose an even one")
    device = torch.device(here().device_type)
    rows = []
    for width in settings.widths:
        experts = _Experts(settings, width, device)
        passes: dict[str, Pass] = {form: experts.grouped(form) for form in FORMS if _takes(form, experts)}
        passes[SEQUENTIAL] = experts.sequential()
        chosen = product_form(width, width, experts.dtype, device.type)
        for form, milliseconds in _in_turns(passes, settings.repetitions, device).items():
            ms = Spread.of(milliseconds)
            spread = {"median": ms.median, "smallest": ms.smallest, "largest": ms.largest}
            rows.append({"width": width, "form": form, "ms": spread, "chosen": form == chosen})
    return {"machine": machine(device), "settings": settings.__dict__, "rows": rows}


def _takes(form: Form, experts: _Experts) -> bool:
    """Whether a form takes the dtype at all: what a GPU would choose."""
    return form == "loop" or product_form(experts.width, experts.width // 2, experts.dtype, "cuda") == form


def _in_turns(passes: dict[str, Pass], repetitions: int, device: torch.device) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {form: [] for form in passes}
    for turn in range(repetitions + 1):
        for form, once in passes.items():
            clock = Clock(device)
            once()
            if turn:  # the first warms up
                taken[form].append(1e3 * clock.read()[0])
    return taken


class _Experts:
    """Weights as Megatron's DDP has them, with a buffer that gradients add to, and rows."""

    def __init__(self, settings: Settings, width: int, device: torch.device) -> None:
        self.width, self.dtype, count = width, DTYPES[settings.dtype], settings.experts * settings.rows
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) / width**0.5).to(device, self.dtype)

        self.fc1 = torch.nn.Parameter(draw(settings.experts, width, width))
        self.fc2 = torch.nn.Parameter(draw(settings.experts, width, width // 2))
        self.x, self.grad = draw(count, width), draw(count, width)
        self.probs = torch.rand(count, generator=generator).to(device)
        self.counts = torch.full((settings.experts,), settings.rows, device=device)
        for weight in (self.fc1, self.fc2):
            weight.main_grad = torch.zeros(weight.shape, device=device, dtype=_accumulated(self.dtype))  # type: ignore[attr-defined]
            weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def grouped(self, form: Form) -> Pass:
        """One forward and backward of a form."""

        def once() -> None:
            runs, x = Runs(self.counts), self.x.detach().requires_grad_()
            act = swiglu(grouped_linear(x, self.fc1, runs, form), self.probs)
            grouped_linear(act, self.fc2, runs, form).backward(self.grad)
            self.fc1.grad = self.fc2.grad = None

        return once

    def sequential(self) -> Pass:
        """What ``SequentialMLP`` does, a module an expert: products, activation and gradients of each by themselves."""
        weights = [
            tuple(torch.nn.Parameter(part.detach().clone()) for part in pair)
            for pair in zip(self.fc1, self.fc2, strict=True)
        ]

        def once() -> None:
            sizes = self.counts.tolist()
            x = self.x.detach().requires_grad_()
            parts = zip(x.split(sizes), self.probs.split(sizes), weights, strict=True)
            outputs = []
            for rows, probs, (fc1, fc2) in parts:
                gate, up = (rows @ fc1.t()).chunk(2, dim=-1)
                act = (torch.nn.functional.silu(gate) * up * probs[:, None]).to(self.dtype)
                outputs.append(act @ fc2.t())
            torch.cat(outputs).backward(self.grad)
            for index, pair in enumerate(weights):
                for weight, whole in zip(pair, (self.fc1, self.fc2), strict=True):
                    whole.main_grad[index] += weight.grad  # type: ignore[attr-defined]
                    weight.grad = None

        return once


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
