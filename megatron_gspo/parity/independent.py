"""The second reference: transformers' own model, one sequence at a time, under the same naive formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_gspo.parity.adapters import adapter_gradients
from megatron_gspo.parity.case import Case
from megatron_gspo.parity.critic import GRADIENTS as CRITIC_GRADIENTS
from megatron_gspo.parity.critic import head_weight, naive_critic
from megatron_gspo.parity.naive_adamw import gradient_norm
from megatron_gspo.parity.objectives import naive_choice
from megatron_gspo.parity.parts import CriticPart, Part, StepPart, TokenValues
from megatron_gspo.parity.reference import Reference, term_of, weights_of
from megatron_gspo.parity.tensors import GRADIENTS, compare
from megatron_gspo.platforms import here


def transformers_step(reference: Reference, directory: str) -> Part:
    """Logprobs of all responses, and the first mini-batch's entropies, ratios, loss and gradients by transformers, in
    the case's dtype.

    For a process of its own: imported under ``megatron.cpu``'s stand-ins, transformers leaves rotary angles unset.
    """
    case, part, step = reference.case, Part(), StepPart()
    device = torch.device(here().device_type)
    model = _load(case).to(device)
    members = case.minibatches[0]
    weights, chosen = dict(zip(members, weights_of(case, members), strict=True)), naive_choice(case, members)
    for index in range(len(case.samples)):
        with torch.set_grad_enabled(index in weights):
            new_R, entropy_R = _response(case, model, index)
        _append(part.old_pass, case, index, new_R)
        if index not in weights:
            continue
        term = term_of(case, index, new_R, weights[index], chosen)
        term.loss.backward()
        step.loss += float(term.loss.detach())
        step.sequences[case.keys[index]] = (term.log_ratio, float(term.loss.detach()))
        _append(step.training, case, index, new_R)
        step.training.entropy.append(entropy_R.detach().double().cpu().numpy())
        step.training.clipped.append(np.array(term.clipped))
    gradients = dict(_stored_gradients(model))
    if case.lora:
        gradients = adapter_gradients(case, gradients)
    step.gradients = compare(iter(gradients.items()), Path(directory) / GRADIENTS.format(step=0))
    step.metrics = {"grad_norm": gradient_norm(gradients)}
    part.steps.append(step)
    if reference.critic is not None:
        part.critic = _critic(reference, Path(directory))
    return part


def _critic(reference: Reference, directory: Path) -> CriticPart | None:
    """Values of all responses, and the value loss's gradients, by transformers' model with a head of one label; None
    of a family that it has none for."""
    from transformers import AutoConfig, AutoModelForTokenClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    case, expected = reference.case, reference.critic
    settings = AutoConfig.from_pretrained(case.path, num_labels=1)
    if type(settings) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING or expected is None or case.replay:
        return None
    model = AutoModelForTokenClassification.from_pretrained(
        case.path, config=settings, dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        model.score.weight.copy_(head_weight(settings.hidden_size))
        model.score.bias.fill_(0.1)
    by_index = {index: expected.values[case.predicting(index)] for index in range(len(case.samples))}
    _, loss = naive_critic(case, by_index)
    part = CriticPart()
    for index, sample in enumerate(case.samples):
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        with torch.set_grad_enabled(index in case.minibatches[0]):
            values_R = model(input_ids=ids, use_cache=False).logits[0, torch.from_numpy(sample.predicting), 0]
        part.numbers.append(case.predicting(index))
        part.values.append(values_R.detach().numpy())
        if values_R.requires_grad:
            loss(index, values_R).backward()
    part.gradients = compare(iter(dict(_stored_gradients(model)).items()), directory / CRITIC_GRADIENTS)
    return part


def _response(case: Case, model: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([R] logprobs, [R] entropies) of a sample's trained tokens."""
    sample = case.samples[index]
    ids = torch.from_numpy(sample.token_ids.astype(np.int64)).to(model.device)
    predicting = torch.from_numpy(sample.predicting).to(model.device)
    with _routed(case, model, index):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    log_probs = torch.log_softmax(logits[predicting].to(case.loss_dtype) / case.temperature, dim=-1)
    new_R = log_probs.gather(1, ids[predicting + 1, None])[:, 0]
    return new_R, -(log_probs.exp() * log_probs).sum(-1)


@contextmanager
def _routed(case: Case, model: Any, index: int) -> Iterator[None]:
    """Routers choose the case's routes of a sample, where it replays any; its last token has none."""
    gates = [(layer, block.mlp.gate) for layer, block in enumerate(model.model.layers) if hasattr(block.mlp, "gate")]
    own = slice(case.own(index).start, case.own(index).stop - 1)

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


def _append(values: TokenValues, case: Case, index: int, new_R: torch.Tensor) -> None:
    values.numbers.append(case.predicting(index))
    values.logprobs.append(new_R.detach().double().cpu().numpy())


def _load(case: Case) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a model cut to its first layers has files of the others
    return AutoModelForCausalLM.from_pretrained(
        case.merged or case.path,
        dtype=getattr(torch, case.dtype),
        attn_implementation="sdpa",
        experts_implementation="eager",
    ).eval()


def _stored_gradients(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By checkpoint name, as transformers itself would save them: in memory an MoE layer's experts are two tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    gradients = {
        name: (weight.grad if weight.grad is not None else torch.zeros_like(weight)).cpu()
        for name, weight in model.named_parameters()
    }
    yield from revert_weight_conversion(model, gradients).items()
