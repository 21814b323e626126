"""Prompts, samplings and well-formed replies for the tests of this directory."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_gspo.rollout.engine import Sampling
from megatron_gspo.types import FinishReason, Prompt, Rollout

STOP = 3
REQUEST = "4b1e"
"""The id of the request that ``reply`` answers."""
SAMPLING = Sampling(group_size=2, temperature=1.0, max_tokens=4, stop_token_ids=(STOP,))


def prompt(name: str = "p", token_ids: tuple[int, ...] = (5, 6, 7)) -> Prompt:
    return Prompt(id=name, text="", token_ids=token_ids, answer="")


def reply(ids: list[int], finish: str = "stop", version: str = "7", prompt_tokens: int = 3) -> dict[str, Any]:
    """What SGLang answers, as recorded from a server (fields that nobody reads left out)."""
    reason: dict[str, Any] = {"type": finish}
    if finish == "stop":
        reason["matched"] = ids[-1]
    if finish == "length":
        reason["length"] = len(ids)
    return {
        "output_ids": ids,
        "meta_info": {
            "id": REQUEST,
            "finish_reason": reason,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ids),
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}] if ids else [],
            "output_token_logprobs": [[-0.5 - position, token, None] for position, token in enumerate(ids)],
        },
    }


def rollout(
    finish: FinishReason = "stop", versions: tuple[int, ...] = (7,), tokens: int = 2, sample: int = 0
) -> Rollout:
    return Rollout(
        prompt=prompt(),
        sample=sample,
        response_ids=np.full(tokens, 9, dtype=np.int32),
        rollout_logprobs=np.full(tokens, -1.0, dtype=np.float32),
        finish_reason=finish,
        weight_versions=versions,
    )
