"""What libraries say on every rank of every run, which we know to be harmless: muted here, and nowhere else.

What is not listed is shown. Versions are those of megatron-core in which a line was seen, where not both say it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

WARNINGS = (
    # Megatron looks for apex and Transformer Engine at import; ``doctor`` says what is installed.
    (r"megatron\.core", r"(Transformer Engine and )?Apex (is|are) not installed"),
    # 0.19.2 imports a multi-modal model, which we don't build.
    (r"megatron\.core", r"MimoModelConfig is experimental"),
    # Experts at expert_tensor = 1: Megatron has one sequence_parallel for them and for attention, which needs it, and
    # turns it off for them by itself.
    (r"megatron\.core", r"`sequence_parallel` is set to `True`, but tensor model parallel size"),
    # Speed on a GPU, and a trade: one queue overlaps tensor ranks' communication and holds up that of experts.
    (r"megatron\.core", r"When using sequence parallelism it is recommended to set .* CUDA_DEVICE_MAX_CONNECTIONS"),
    # The optimizer's shards are views until it has set their .grad.
    (r"megatron\.core", r"The \.grad attribute of a Tensor that is not a leaf Tensor"),
    # Names and types that Megatron uses and torch 2.13 has newer ones for.
    (r"torch\.distributed\.c10d_logger", r"`torch\.distributed\.\w+` is deprecated"),
    (r"megatron\.core", r"`load_state_dict` is deprecated"),  # 0.16.1
    (r"megatron\.core", r"TypedStorage is deprecated"),  # gradients that are freed while servers compute
    (r"torch\.distributed\.checkpoint", r"Please use DTensor instead and we are deprecating ShardedTensor"),
)
"""(module, start of the message), as regular expressions."""

LOGS = (
    # 0.16.1 names the layers that it hands process groups to. Ours, which it doesn't know, takes the same ones itself.
    ("megatron.core.transformer.transformer_layer", "Unknown MLP type"),
    # 0.19.2 wants another class of models than 0.16.1 has; this one gets bug fixes.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    # 0.19.2 makes of a dense layer's spec, as 0.16.1 wants it, what it wants itself.
    ("megatron.core.transformer.transformer_layer", "Rewrapping ModuleSpec"),
    # 0.19.2 works the layout out then, as 0.16.1 did.
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    # 0.19.2 looks for compilers at import; a run on the CPU does without.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)
"""(logger, start of the message)."""

ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "TORCH_LOGS": "-torch.utils.cpp_extension"}
"""For a process that imports Megatron before it can call ``mute``: without the warnings and that log of its imports."""


@dataclass(frozen=True)
class _Drop:
    start: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def mute() -> None:
    """Mutes what is listed in this process. What Megatron warns of besides, the first rank says for all."""
    if os.environ.get("RANK", "0") != "0":
        warnings.filterwarnings("ignore", module=r"megatron\.core")
    for module, message in WARNINGS:
        warnings.filterwarnings("ignore", message, module=module)
    for logger, start in LOGS:
        logging.getLogger(logger).addFilter(_Drop(start))


@contextlib.contextmanager
def apart_from_stdout() -> Iterator[TextIO]:
    """Standard output, for the caller alone: whatever else is printed meanwhile, by a reward function, a C library or
    a program that they start, goes to standard error."""
    ours, kept = sys.stdout, -1
    with contextlib.suppress(OSError, ValueError, AttributeError):  # somebody has closed one of them
        ours.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    is_first = kept >= 0 and _writes_to(ours, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if is_first:
                with open(kept, "w", encoding=ours.encoding, errors=ours.errors, closefd=False) as printed:
                    yield printed
            else:  # it is no terminal, pipe or file: a test reads it
                yield ours
    finally:
        if kept >= 0:
            os.dup2(kept, 1)
            os.close(kept)


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False
