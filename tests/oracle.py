"""An independent statement of what a training step must be: naive float64 losses, and transformers' own Qwen3.

Nothing here uses megatron_gspo's arithmetic, packing or tables of names; only its data class for a sample. Losses are
Python loops over tokens, straight from the papers. The model is transformers' in float64, one sequence at a time and
without padding; its gradients are reported under the names of the stored checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_gspo.types import PlacedSample

# ---------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class NaiveLoss:
    """What a naive loss returns, by sequence."""

    loss: torch.Tensor
    """Scalar, differentiable."""
    loss_S: list[torch.Tensor]
    log_ratio_S: list[float]
    """log s_i."""
    clipped_low: list[list[bool]]
    """By sequence and token."""
    clipped_high: list[list[bool]]

    @property
    def clipped(self) -> list[list[bool]]:
        """By sequence and token: on the clipped branch, on either side."""
        return [
            [a or b for a, b in zip(*row, strict=True)] for row in zip(self.clipped_low, self.clipped_high, strict=True)
        ]


def naive_loss(
    name: str,
    new: Sequence[torch.Tensor],
    old: Sequence[torch.Tensor],
    advantages: Sequence[Sequence[float]],
    weights: Sequence[float],
    clip_low: float,
    clip_high: float,
) -> NaiveLoss:
    """arXiv 2507.18071: "gspo" is eq. 5, "gspo-token" eq. 13, "grpo" and "ppo" eq. 2; negated, weighted, summed.

    ``new``, ``old`` and ``advantages`` hold one entry a response token; ``weights`` one a sequence (1 / (P G)).
    """
    losses, log_ratios, lows, highs = [], [], [], []
    for new_R, old_R, advantages_R, weight in zip(new, old, advantages, weights, strict=True):
        length = len(old_R)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(length):
            total = total + (new_R[t] - old_R[t])
        sequence_ratio = torch.exp(total / length)
        objective, low, high = torch.zeros((), dtype=torch.float64), [], []
        for t in range(length):
            if name == "gspo":
                ratio = sequence_ratio
            elif name == "gspo-token":
                ratio = sequence_ratio.detach() * torch.exp(new_R[t]) / torch.exp(new_R[t]).detach()
            else:
                ratio = torch.exp(new_R[t]) / torch.exp(old_R[t])
            a = advantages_R[t]
            clipped = min(max(ratio.item(), 1 - clip_low), 1 + clip_high)
            objective = objective + min(ratio * a, torch.tensor(clipped * a, dtype=torch.float64)) / length
            on_clipped_branch = clipped * a < ratio.item() * a
            low.append(on_clipped_branch and ratio.item() < 1 - clip_low)
            high.append(on_clipped_branch and ratio.item() > 1 + clip_high)
        losses.append(-weight * objective)
        log_ratios.append(float(total.detach()) / length)
        lows.append(low)
        highs.append(high)
    return NaiveLoss(sum(losses, torch.zeros((), dtype=torch.float64)), losses, log_ratios, lows, highs)


def naive_kl(
    new: Sequence[torch.Tensor], old: Sequence[torch.Tensor], ref: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """sum_i weight_i / |y_i| sum_t (pi / pi_old) (pi_ref / pi - log(pi_ref / pi) - 1), differentiable throughout."""
    total = torch.zeros((), dtype=torch.float64)
    for new_R, old_R, ref_R, weight in zip(new, old, ref, weights, strict=True):
        for t in range(len(old_R)):
            r = torch.exp(ref_R[t]) / torch.exp(new_R[t])
            total = total + weight / len(old_R) * torch.exp(new_R[t]) / torch.exp(old_R[t]) * (r - torch.log(r) - 1)
    return total


# --------------------------------------------------------------------------------------------------- tiny models


def make_tiny_qwen3_moe(
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    vocab: int = 67,
    hidden: int = 32,
    tie: bool = False,
    norm_topk_prob: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a Qwen3-MoE checkpoint of random weights at scale: logits vary by O(1), norms lie in [0.5, 1.5].

    The default vocabulary divides by nothing and heads x head_dim differs from ``hidden``, on purpose. ``overrides``
    go to ``Qwen3MoeConfig``.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings = _tiny_settings(layers, vocab, hidden, tie) | {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": 24,
        "norm_topk_prob": norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }
    return _write_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | overrides))), directory, seed, dtype)


def make_tiny_qwen3(
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    layers: int = 4,
    vocab: int = 67,
    hidden: int = 32,
    tie: bool = False,
    **overrides: Any,
) -> Path:
    """The same for a dense Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = _tiny_settings(layers, vocab, hidden, tie)
    return _write_model(Qwen3ForCausalLM(Qwen3Config(**(settings | overrides))), directory, seed, dtype)


def _tiny_settings(layers: int, vocab: int, hidden: int, tie: bool) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": vocab - 1,
        "pad_token_id": None,
    }


@torch.no_grad()
def _write_model(model: Any, directory: str | Path, seed: int, dtype: torch.dtype) -> Path:
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            weight.copy_(1.0 + 0.5 * torch.tanh(noise))
        elif "embed_tokens" in name and not model.config.tie_word_embeddings:
            weight.copy_(noise)
        else:
            weight.copy_(noise * 1.5 / math.sqrt(weight.shape[-1]))
    model.to(dtype).save_pretrained(str(directory))
    return Path(directory)


def random_samples(
    *, vocab: int = 67, groups: int = 4, group_size: int = 3, seed: int = 0, max_prompt: int = 9, max_response: int = 14
) -> list[PlacedSample]:
    """Groups of uneven prompts and responses, with advantages of both signs and weights 1 / (P G)."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        prompt_ids = rng.integers(0, vocab, rng.integers(1, max_prompt + 1)).astype(np.int32)
        advantages = rng.normal(size=group_size)
        for sample, advantage in enumerate(advantages - advantages.mean()):
            length = int(rng.integers(1, max_response + 1))
            samples.append(
                PlacedSample.of_response(
                    group=group,
                    sample=sample,
                    prompt_ids=prompt_ids,
                    response_ids=rng.integers(0, vocab, length).astype(np.int32),
                    rollout_logprobs=rng.normal(-2, 0.5, length).astype(np.float32),
                    advantage=float(advantage),
                    token_advantages=np.full(length, advantage),
                    weight=1.0 / (groups * group_size),
                )
            )
    return samples


# ---------------------------------------------------------------------------------------------------- model oracle


@dataclass(frozen=True)
class OracleStep:
    """One mini-batch, computed without any parallelism, packing or padding; all float64."""

    logprobs: list[torch.Tensor]
    """By sample, [R]: log pi_theta of each response token at the given temperature."""
    entropy: list[torch.Tensor]
    """By sample, [R]: full-vocabulary entropy at each response token, in nats."""
    loss: float
    """With the KL term."""
    loss_S: list[float]
    """By sample, without the KL term."""
    log_ratio_S: torch.Tensor
    """[S] log s_i."""
    clipped_S: torch.Tensor
    """[S] bool: a token of the sequence is on the clipped branch."""
    gradients: dict[str, torch.Tensor]
    """By Hugging Face checkpoint name, one entry an expert."""


def oracle_logprobs(
    hf_dir: str | Path, samples: Sequence[PlacedSample], *, temperature: float = 1.0, exact_rotary: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(log-probabilities, entropies), each a list of [R] float64 by sample."""
    with float64_throughout(exact_rotary), torch.no_grad():
        model = load_oracle(hf_dir)
        results = [_score(model, sample, temperature) for sample in samples]
    return [logprobs for logprobs, _ in results], [entropy for _, entropy in results]


def oracle_step(
    hf_dir: str | Path,
    samples: Sequence[PlacedSample],
    old_logprobs: Sequence[torch.Tensor],
    *,
    loss: str = "gspo",
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    temperature: float = 1.0,
    ref_logprobs: Sequence[torch.Tensor] | None = None,
    kl_loss_coef: float = 0.0,
    exact_rotary: bool = True,
) -> OracleStep:
    """Loss and all gradients of one mini-batch; advantages and weights are the samples' own.

    ``old_logprobs`` and ``ref_logprobs``: by sample, [R]. ``exact_rotary``: see ``float64_throughout``.
    """
    with float64_throughout(exact_rotary):
        model = load_oracle(hf_dir)
        scores = [_score(model, sample, temperature) for sample in samples]
        new = [logprobs for logprobs, _ in scores]
        old = [torch.as_tensor(values, dtype=torch.float64) for values in old_logprobs]
        weights = [sample.weight for sample in samples]
        advantages = [[s.advantage] * s.num_trained if loss == "gspo" else s.token_advantages.tolist() for s in samples]
        result = naive_loss(loss, new, old, advantages, weights, clip_low, clip_high)
        total = result.loss
        if kl_loss_coef:
            assert ref_logprobs is not None
            ref = [torch.as_tensor(values, dtype=torch.float64) for values in ref_logprobs]
            total = total + kl_loss_coef * naive_kl(new, old, ref, weights)
        total.backward()
    return OracleStep(
        logprobs=[logprobs.detach() for logprobs in new],
        entropy=[entropy.detach() for _, entropy in scores],
        loss=total.item(),
        loss_S=[value.item() for value in result.loss_S],
        log_ratio_S=torch.tensor(result.log_ratio_S, dtype=torch.float64),
        clipped_S=torch.tensor([any(row) for row in result.clipped]),
        gradients=_stored_gradients(model),
    )


def straddling_old_logprobs(
    logprobs: Sequence[torch.Tensor], *, spread: float = 1e-3, seed: int = 0
) -> list[torch.Tensor]:
    """Old log-probabilities whose sequence log-ratios alternate between inside and outside +-``spread``.

    Even sequences move by a third of ``spread`` and odd ones by three times, in alternating directions, with noise on
    top that sums to zero over the sequence. So a clip range near ``spread`` clips some sequences and not others.
    """
    generator = torch.Generator().manual_seed(seed)
    olds = []
    for i, new_R in enumerate(logprobs):
        shift = spread * (1 / 3 if i % 2 == 0 else 3.0) * (1 if (i // 2) % 2 == 0 else -1)
        noise = spread * torch.randn(new_R.shape, generator=generator, dtype=torch.float64)
        olds.append(new_R.detach().double() - shift - (noise - noise.mean()))
    return olds


def assert_meaningful(
    gradients: Mapping[str, torch.Tensor], log_ratio_S: torch.Tensor, clipped_S: torch.Tensor
) -> None:
    """Fails a comparison that could not have told right from wrong."""
    silent = [name for name, gradient in gradients.items() if not bool((gradient != 0).any())]
    assert not silent, f"these gradients are all zero, so nothing is compared: {silent}"
    assert bool((log_ratio_S != 0).any()), "every ratio is exactly 1: old and new log-probabilities are the same"
    assert bool(clipped_S.any()), "no sequence is clipped"
    assert not bool(clipped_S.all()), "every sequence is clipped"


def load_oracle(hf_dir: str | Path) -> Any:
    """transformers' model in float64, with the plainest of its attention and expert implementations."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(hf_dir), dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    )
    return model.eval()


@contextmanager
def float64_throughout(exact_rotary: bool = True) -> Iterator[None]:
    """Takes out the three places where transformers' Qwen3 rounds to float32: RMS norm, rotary angles, router.

    ``exact_rotary=False`` leaves transformers' own float32 angles, for a model that rounds them in the same way.
    """
    from transformers.models.qwen3 import modeling_qwen3 as dense
    from transformers.models.qwen3_moe import modeling_qwen3_moe as moe

    with ExitStack() as stack:
        for norm in (dense.Qwen3RMSNorm, moe.Qwen3MoeRMSNorm):
            stack.enter_context(mock.patch.object(norm, "forward", _rms_norm))
        for rotary in (dense.Qwen3RotaryEmbedding, moe.Qwen3MoeRotaryEmbedding) if exact_rotary else ():
            stack.enter_context(mock.patch.object(rotary, "forward", _rotary))
        stack.enter_context(mock.patch.object(moe.Qwen3MoeTopKRouter, "forward", _route))
        yield


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)


def _rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = self.config.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = position_ids[..., None].double() * self.config.rope_parameters["rope_theta"] ** -exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _route(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = x.reshape(-1, self.hidden_dim) @ self.weight.T
    scores, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
    if self.norm_topk_prob:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return logits, scores, experts


def _score(model: Any, sample: PlacedSample, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """([R] log-probabilities of the response, [R] entropies)."""
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    response_logits = logits[sample.predicting] / temperature
    log_probs = torch.log_softmax(response_logits, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    labels = ids[sample.predicting + 1]
    return log_probs[torch.arange(len(labels)), labels], entropy


def _stored_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by checkpoint name. In memory an MoE layer's experts are two tensors; on disk three an expert."""
    gradients: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        if name.endswith("experts.gate_up_proj"):  # [E, 2 I, H]: the gate's rows, then the up projection's
            prefix = name.removesuffix("gate_up_proj")
            for e, both in enumerate(gradient):
                gate, up = both.chunk(2)
                gradients |= {f"{prefix}{e}.gate_proj.weight": gate, f"{prefix}{e}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):  # [E, H, I]
            prefix = name.removesuffix("down_proj")
            gradients |= {f"{prefix}{e}.down_proj.weight": down for e, down in enumerate(gradient)}
        else:
            gradients[name] = gradient
    return gradients
