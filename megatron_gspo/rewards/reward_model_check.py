"""A reward model's server, held against transformers' own scores before it is believed."""

from __future__ import annotations

import http.client
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gspo.calls import call, refusal
from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.asking import NoAnswerError

MOST_WEIGHTS = 4 * 2**30
"""Bytes of weights up to which they are loaded for the check by themselves."""
TIMEOUT_S = 120.0
CONSTANT = 0.1
"""Spread of the differences, relative to their mean, below which they are one constant: a bias."""
LEAST_CONSTANT = 1e-4
"""A smaller one is rounding."""


def hold_against_transformers(
    urls: Sequence[str],
    key: str,
    model: Path,
    samples: Sequence[Sequence[int]],
    label: int,
    tolerance: float,
    *,
    insisted: bool,
) -> None:
    """Holds each server's scores of ``samples`` (token ids) against transformers', on the first rank.

    Large weights are loaded only where that is ``insisted`` on; else it is said that nothing was checked.
    Raises ConfigError with both numbers where they differ, and for a server that does not answer.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if not size or (size > MOST_WEIGHTS and not insisted):
        why = f"{size / 2**30:.1f} GiB of weights; check = true loads them" if size else "no weights there"
        print(f"warning: {model}: its servers' scores were not held against transformers' ({why})", file=sys.stderr)
        return
    expected = transformers_scores(model, samples, label)
    for url in urls:
        compare(url, server_scores(url, key, samples, label), expected, tolerance)


def compare(url: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raises ConfigError where a score differs by more than the tolerance, relative to the larger of 1 and the score,
    or all differ by the same."""
    differences = found - expected
    far = np.abs(differences) > tolerance * np.maximum(1.0, np.abs(expected))
    mean, spread = float(differences.mean()), float(differences.std())
    constant = abs(mean) > LEAST_CONSTANT and spread < CONSTANT * abs(mean)
    if not (far.any() or constant):
        return
    worst = int(np.argmax(np.abs(differences)))
    hint = ""
    if constant:
        hint = (
            f"; all differ by {mean:.6g}: the server's head has a bias that no file fills, as SGLang 0.5.23's of Qwen2 "
            f"and Qwen3 do. Start it by megatron_gspo/rollout/sglang/server.py, which mends that (docs/rewards.md)"
        )
    raise ConfigError(
        f"reward 'reward_model': {url} gives a text {found[worst]:.6g}, and transformers {expected[worst]:.6g}{hint}"
    )


def server_scores(url: str, key: str, samples: Sequence[Sequence[int]], label: int) -> np.ndarray:
    """[N] float64: the server's, one text at a time. Raises ConfigError."""
    found = []
    for ids in samples:
        try:
            body = json.dumps({"input_ids": list(ids)}).encode()
            reply = call(f"{url}/classify", body, key=key, timeout_s=TIMEOUT_S)
            if reply.status != 200:
                raise NoAnswerError(f"{refusal(reply.status)}: {reply.body[:200].decode(errors='replace')}")
            found.append(score_of(json.loads(reply.body), label, len(ids)))
        except (OSError, http.client.HTTPException, ValueError, NoAnswerError) as error:
            raise ConfigError(f"reward 'reward_model': {url} gives no score: {error}") from None
    return np.array(found)


def score_of(answer: Any, label: int, tokens: int) -> float:
    """The score in an answer of ``/classify`` to one text of so many tokens. Raises NoAnswerError."""
    one = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    try:
        scores, read = one["embedding"], one.get("meta_info", {}).get("prompt_tokens", tokens)
        score = scores[label]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoAnswerError(f"no score: {answer!r:.200}") from None
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise NoAnswerError(f"its score is {score!r:.100}")
    if read != tokens:
        raise NoAnswerError(f"it read {read} tokens of {tokens}")
    return float(score)


def transformers_scores(model: Path, samples: Sequence[Sequence[int]], label: int) -> np.ndarray:
    """[N] float64: transformers' own, in float32 on the CPU. Raises ConfigError where it cannot load the model."""
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        network: Any = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=torch.float32, local_files_only=True
        ).eval()
        with torch.no_grad():
            scores = [float(network(torch.tensor([list(ids)])).logits[0, label]) for ids in samples]
    except Exception as error:  # whatever a directory of another kind makes of it
        raise ConfigError(f"reward 'reward_model': transformers cannot score with {model}: {error}") from None
    return np.array(scores)
