"""Suites of a training run: read at its start, and what there is to say of their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.data.tokenizer import Tokenizer
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.parallel.exchange import broadcast_object, together
from megatron_gspo.platforms import here
from megatron_gspo.rollout.engine import ENGINES
from megatron_gspo.suites.catalog import read_all_asked
from megatron_gspo.suites.task import Task, check_contamination, make_task

if TYPE_CHECKING:  # doctor, which reads suites too, imports no Megatron
    from megatron_gspo.megatron.groups import Groups


def load_suites(config: RunConfig, tokenizer: Tokenizer) -> list[Task]:
    """The suites of ``eval.suites``, before anything is started or written. Raises UserError."""
    asked = read_all_asked(config.eval.suites)
    if not asked:
        return []
    _, shape = read_model(config.model.path)
    room = shape.max_positions - ENGINES[config.rollout.engine].kept_positions
    seeded = config.rollout.is_seeded(on_gpu=here().device_type == "cuda")
    data, alone = Path(config.eval.suites_data), len(asked) == 1
    return [make_task(one, data, config, tokenizer, positions=room, seeded=seeded, alone=alone) for one in asked]


def suite_notes(config: RunConfig, tasks: Sequence[Task], groups: Groups) -> list[str]:
    """What there is to say of the suites' data, found by the first rank. Collective."""

    def look() -> list[str]:
        if dist.get_rank() != 0:
            return []
        notes = []
        for task in tasks:
            notes.append(f"suite {task.name}: {len(task.prompts)} problems x {task.sampling.group_size}")
            _, overlapping = check_contamination(task, config)
            notes += [f"warning: suite {task.name}: {warning}" for warning in (*task.warnings, *overlapping)]
        return notes

    found: list[str] = broadcast_object(together(look, groups.world), 0, groups.world)
    return found
