"""The second reference: transformers' own model, one sequence at a time, under the same naive formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_gspo.parity.case import Case
from megatron_gspo.parity.naive import naive_term
from megatron_gspo.parity.reference import Reference
from megatron_gspo.parity.step import GRADIENTS, Part, TokenValues, compare


def transformers_step(reference: Reference, directory: str) -> Part:
    """Logprobs, entropies, ratios, loss and gradients of the mini-batch by transformers, in the case's dtype.

    For a process of its own: imported under ``policy.cpu``'s stand-ins, transformers leaves rotary angles unset.
    """
    case, part = reference.case, Part(0, 0, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(case).to(device)
    for index, sample in enumerate(case.samples):
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)).to(device)
        with _routed(case, model, index):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        first = len(sample.prompt_ids) - 1
        log_probs = torch.log_softmax(logits[first:-1].to(case.loss_dtype) / case.temperature, dim=-1)
        new_R = log_probs.gather(1, ids[first + 1 :, None])[:, 0]
        old_R = torch.from_numpy(case.old[index])
        term = naive_term(case.loss, new_R, old_R, case.advantages(index), sample.weight, case.clip, case.clip)
        term.loss.backward()
        part.loss += float(term.loss.detach())
        part.sequences[case.keys[index]] = (term.log_ratio, float(term.loss.detach()))
        for values in (part.old_pass, part.training):
            _append(values, case, index, new_R, -(log_probs.exp() * log_probs).sum(-1), term.clipped)
    part.gradients = compare(_stored_gradients(model), Path(directory) / GRADIENTS)
    squares = (float(w.grad.double().square().sum()) for w in model.parameters() if w.grad is not None)
    part.norm = math.sqrt(sum(squares))
    return part


@contextmanager
def _routed(case: Case, model: Any, index: int) -> Iterator[None]:
    """Routers choose the case's routes of a sample, where it replays any; its last token has none."""
    gates = [(layer, block.mlp.gate) for layer, block in enumerate(model.model.layers) if hasattr(block.mlp, "gate")]
    own = slice(int(case.starts[index]), int(case.starts[index + 1]) - 1)

    def hook(layer: int) -> Any:
        def choose(gate: Any, inputs: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits_TE, scores_TK, live_TK = output
            routes_TK = torch.from_numpy(case.routes(layer, gate.num_experts, gate.top_k)[own]).to(live_TK.device)
            chosen_TK = torch.cat([routes_TK, live_TK[-1:]])
            weights_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float).gather(1, chosen_TK)
            if gate.norm_topk_prob:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
            return logits_TE, weights_TK.to(scores_TK.dtype), chosen_TK

        return choose

    hooks = [gate.register_forward_hook(hook(layer)) for layer, gate in gates] if case.replay else []
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _append(
    values: TokenValues, case: Case, index: int, new_R: torch.Tensor, entropy_R: torch.Tensor, clipped: list[bool]
) -> None:
    own = case.predicting(index)
    values.numbers.append(np.arange(own.start, own.stop))
    values.logprobs.append(new_R.detach().double().cpu().numpy())
    values.entropy.append(entropy_R.detach().double().cpu().numpy())
    values.clipped.append(np.array(clipped))


def _load(case: Case) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a model cut to its first layers has files of the others
    return AutoModelForCausalLM.from_pretrained(
        case.path, dtype=getattr(torch, case.dtype), attn_implementation="sdpa", experts_implementation="eager"
    ).eval()


def _stored_gradients(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By checkpoint name, as transformers itself would save them: in memory an MoE layer's experts are two tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    gradients = {
        name: (weight.grad if weight.grad is not None else torch.zeros_like(weight)).cpu()
        for name, weight in model.named_parameters()
    }
    yield from revert_weight_conversion(model, gradients).items()
