"""transformers' logits, in a process that has nothing to do with Megatron."""

from __future__ import annotations

import numpy as np


def transformers_logits(directory: str, token_ids: list[int]) -> np.ndarray:
    """[T, V] float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([token_ids])).logits[0].float().numpy()
    return logits
