"""The check: one mini-batch, a reference, and a row for each layout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from megatron_gspo.errors import ConfigError, LayoutError, MegatronGspoError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.layout import check_layout
from megatron_gspo.parity.adapters import make_adapters
from megatron_gspo.parity.case import Case, random_samples
from megatron_gspo.parity.independent import transformers_step
from megatron_gspo.parity.layouts import Layout
from megatron_gspo.parity.models import cut_model, make_model
from megatron_gspo.parity.precision import PRECISIONS
from megatron_gspo.parity.ranks import RankError
from megatron_gspo.parity.reference import Reference, reference_step, reference_without
from megatron_gspo.parity.step import Fault, layout_step
from megatron_gspo.parity.verdict import Row, fallen, judge
from megatron_gspo.platforms import CUDA, here

BYTES_A_PARAMETER = {"float64": 72, "float32": 60, "bfloat16": 54}
"""In one process: the policy's weight and gradient and the reference policy's weight, what they are written from, and
the naive optimizer's float64 weight, moments and their successors."""


@dataclass(frozen=True)
class Settings:
    """What is checked."""

    layouts: Sequence[Layout]
    path: str = ""
    """Hugging Face directory; empty: the synthetic ``model``."""
    model: str = "tiny-moe"
    """An entry of ``models.MODELS``."""
    layers: int | None = None
    """Only the first layers of ``path``."""
    loss: str = "gspo"
    dtype: str = "float64"
    seed: int = 0
    temperature: float = 0.8
    chunk: int = 24
    """``model.logprob_chunk``: smaller than a micro-batch, so that there are several."""
    tolerance: float | None = None
    """Replaces the dtype's own."""
    kernels: str = "auto"
    """``model.kernels``."""
    lora: int = 0
    """Rank of adapters, which are then what is trained; 0: every weight is."""
    replay: bool = False
    """Random routes are replayed in every pass."""


class Ranks(Protocol):
    """``ranks.LocalRanks`` or ``world.WorldRanks``."""

    def refusal(self, ranks: int) -> str:
        """Why a layout of so many ranks cannot run; empty when it can."""

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls a function on every rank; results in rank order."""

    def once(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function on a world of one rank."""

    def directory(self) -> AbstractContextManager[str]:
        """A directory for files that all ranks read."""

    def share(self, directory: str) -> None:
        """Brings a directory to every machine."""


def check(
    settings: Settings, ranks: Ranks, *, fault: Fault | None = None, say: Callable[[str], None] = print
) -> list[Row]:
    """Compares transformers and every layout with the reference; returns their rows in this order.

    Args:
        settings: what is checked.
        ranks: where; under torchrun every rank calls this.
        fault: makes a context that the layouts' ranks (not the reference's) enter; for tests.
        say: takes progress, a line at a time.
    Raises:
        ConfigError: the model, or that the reference does not fit into memory.
        BatchError: the mini-batch could not tell right from wrong.
    """
    tolerance = settings.tolerance or PRECISIONS[settings.dtype].tolerance
    with ranks.directory() as directory:
        say(f"reference: one process, one sequence a micro-batch, {settings.dtype}")
        reference = make_reference(settings, ranks, directory)
        say(f"reference: {_describe(reference)}")
        rows = [compare_transformers(reference, ranks, directory, settings.tolerance)]
        for layout in settings.layouts:
            say(_progress(rows[-1]))
            rows.append(compare_layout(layout, reference, ranks, directory, tolerance=tolerance, fault=fault))
        say(_progress(rows[-1]))
    return rows


def make_reference(settings: Settings, ranks: Ranks, directory: str) -> Reference:
    """Makes the model and the mini-batch and runs the reference; its files are in ``directory``, for all ranks."""
    case = _case(settings, _model(settings, ranks, directory))
    if settings.lora:
        case = replace(case, **ranks.once(make_adapters, case, f"{directory}/adapters", settings.lora))
        ranks.share(directory)
    reference: Reference = ranks.once(reference_step, case, directory)
    ranks.share(directory)
    return reference


def compare_transformers(reference: Reference, ranks: Ranks, directory: str, tolerance: float | None = None) -> Row:
    """transformers' row, at the tolerance of its float32 roundings or, if it is larger, at ``tolerance``."""
    row, started = Row("transformers", 1), time.perf_counter()
    tolerance = max(reference.case.precision.independent, tolerance or 0.0)
    part = ranks.once(transformers_step, reference, directory)
    row.seconds = time.perf_counter() - started
    return judge(row, [part], reference, tolerance, tolerance)


def compare_layout(
    layout: Layout, reference: Reference, ranks: Ranks, directory: str, *, tolerance: float, fault: Fault | None = None
) -> Row:
    """Runs a layout, and gives its row; ``fault`` as in ``check``.

    Runs it twice, and the reference too, when a response's routes fall on the other side of a near-tie: the second time
    without such responses, so that nothing of them is in a gradient.
    """
    row, started = Row(layout.name, 0), time.perf_counter()
    case = reference.case
    try:
        row.ranks = layout.ranks
        check_layout(case.run_config(layout).parallel, read_model(case.path)[1])
        if refusal := ranks.refusal(row.ranks):
            raise LayoutError(refusal)
        parts = ranks.run(row.ranks, layout_step, case, layout, directory, fault)
        indices, near_ties = fallen(parts, reference)
        if indices:
            again = f"{directory}/{layout.name}"
            reference = ranks.once(reference_without, case, indices, again)
            ranks.share(again)
            parts = ranks.run(row.ranks, layout_step, reference.case, layout, again, fault)
        judge(row, parts, reference, tolerance, max(case.precision.norm, tolerance))
        row.near_ties = near_ties + [name for name in row.near_ties if name not in near_ties]
    except ConfigError as error:  # what our configuration or a rank refuses
        row.verdict, row.reason = "refused", _line(error)
    except RankError as error:
        row.verdict, row.reason = "failed", _last_line(error)
    except MegatronGspoError as error:
        row.verdict, row.reason = "failed", _line(error)
    row.seconds = time.perf_counter() - started
    return row


def _progress(row: Row) -> str:
    return f"{row.layout}: {row.verdict} ({row.seconds:.1f} s)" + (f": {row.reason}" if row.reason else "")


def _describe(reference: Reference) -> str:
    case = reference.case
    clipped = sum(bool(reference.clipped[case.predicting(i)].any()) for i in range(len(case.samples)))
    idle = ", ".join(f"{len(step.idle)} of {len(step.names)}" for step in reference.steps)
    return (
        f"{len(case.samples)} responses in {len(reference.steps)} mini-batches, {case.tokens} tokens, {clipped} "
        f"clipped, {len(case.dropped)} left out for a near-tie in a router; tensors without a gradient: {idle}"
    )


def _model(settings: Settings, ranks: Ranks, directory: str) -> str:
    """The directory of the model that is checked."""
    if settings.path:
        path = settings.path
        if settings.layers:
            path = ranks.once(_cut, settings.path, f"{directory}/model", settings.layers)
            ranks.share(directory)
        _check_memory(path, settings)
        return path
    path = ranks.once(_make, settings.model, f"{directory}/model", settings.seed)
    ranks.share(directory)
    return path


def _make(name: str, directory: str, seed: int) -> str:
    return str(make_model(name, Path(directory), seed))


def _cut(source: str, directory: str, layers: int) -> str:
    return str(cut_model(Path(source), Path(directory), layers))


def _case(settings: Settings, path: str) -> Case:
    shape = read_model(path)[1]
    if settings.replay and not any(shape.moe_layers):
        raise ConfigError(f"--replay: {shape.architecture} with these layers is dense, and has no routes to replay")
    prompt, response = (64, 128) if settings.path else (9, 40)
    return Case(
        path=path,
        samples=random_samples(
            shape.vocab_size,
            settings.seed,
            group_size=PRECISIONS[settings.dtype].group,
            max_prompt=prompt,
            max_response=response,
        ),
        seed=settings.seed,
        loss=settings.loss,
        dtype=settings.dtype,
        temperature=settings.temperature,
        model={"logprob_chunk": settings.chunk, "kernels": settings.kernels},
        replay=settings.replay,
    )


def _check_memory(path: str, settings: Settings) -> None:
    """Raises ConfigError when one process cannot hold the model with its gradients and optimizer states."""
    _, shape = read_model(path)
    reader = HfReader(path)
    parameters = sum(math.prod(reader.shape(name)) for name in reader.names() if _layer(name) < shape.num_layers)
    needed = parameters * BYTES_A_PARAMETER[settings.dtype]
    free = torch.cuda.mem_get_info()[0] if here() is CUDA else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"the reference is one process, and {path} in {settings.dtype} needs about {needed / 2**30:.0f} GiB there "
            f"({parameters / 1e9:.1f} G parameters); {free / 2**30:.0f} GiB are free: check the first layers alone "
            f"with --layers N"
        )


def _layer(name: str) -> int:
    """The layer that a Hugging Face tensor belongs to; -1 for none."""
    return next((int(word) for word in name.split(".") if word.isdigit()), -1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _last_line(error: Exception) -> str:
    """Of a rank's traceback: what was raised, after which rank it was."""
    lines = str(error).strip().splitlines()
    return f"{lines[0].split(':')[0]}: {lines[-1]}"
