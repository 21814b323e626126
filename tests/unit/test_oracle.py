"""The oracle is itself held to transformers' forward, to finite differences and to the checkpoint's names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle

MAKERS = {
    "moe": oracle.make_tiny_qwen3_moe,
    "moe-tied-unnormalised": lambda path: oracle.make_tiny_qwen3_moe(path, tie=True, norm_topk_prob=False),
    "dense": oracle.make_tiny_qwen3,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def hf_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def test_logprobs_are_those_of_transformers_up_to_its_fp32_roundings(hf_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    samples = oracle.random_samples(seed=1)
    exact, entropies = oracle.oracle_logprobs(hf_dir, samples, temperature=0.7)
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation=attention)
        for sample, logprobs, entropy in zip(samples, exact, entropies, strict=True):
            ids = torch.from_numpy(sample.token_ids.astype(np.int64))
            with torch.no_grad():
                logits = model(ids[None]).logits[0, sample.predicting] / 0.7
            distribution = torch.distributions.Categorical(logits=logits)
            expected = distribution.log_prob(ids[sample.predicting + 1]).double()
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(entropy, distribution.entropy().double(), rtol=0, atol=1e-4)


def test_a_step_is_meaningful_and_names_exactly_what_the_checkpoint_stores(hf_dir: Path) -> None:
    samples = oracle.random_samples()
    step = straddling_step(hf_dir)
    oracle.assert_meaningful(step.gradients, step.log_ratio_S, step.clipped_S)
    stored = load_file(hf_dir / "model.safetensors")
    assert {name: g.shape for name, g in step.gradients.items()} == {name: w.shape for name, w in stored.items()}
    assert torch.cat(step.logprobs).std() > 0.5, "logits do not vary"
    assert len(step.loss_S) == len(samples)


def test_gradients_are_the_slope_of_the_loss_along_every_stored_tensor(hf_dir: Path, tmp_path: Path) -> None:
    # Each tensor of the file moves along its own reported gradient by a different random amount; a gradient under
    # another tensor's name (gate for up, one expert for another) would predict another slope.
    step, stored = straddling_step(hf_dir), load_file(hf_dir / "model.safetensors")
    amounts = dict(
        zip(sorted(stored), torch.randn(len(stored), generator=torch.Generator().manual_seed(3)), strict=True)
    )
    (tmp_path / "config.json").write_bytes((hf_dir / "config.json").read_bytes())
    losses = []
    for h in (1e-6, -1e-6):
        moved = {n: w + h * amounts[n] * step.gradients[n] / step.gradients[n].norm() for n, w in stored.items()}
        save_file(moved, tmp_path / "model.safetensors")
        losses.append(straddling_step(tmp_path, old_from=hf_dir).loss)
    expected = sum(amounts[name].item() * step.gradients[name].norm().item() for name in stored)
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(expected, rel=1e-6)


def test_meaningless_comparisons_fail() -> None:
    gradients, ratio, clipped = {"w": torch.ones(2)}, torch.tensor([0.1, 0.0]), torch.tensor([True, False])
    oracle.assert_meaningful(gradients, ratio, clipped)
    with pytest.raises(AssertionError, match="all zero"):
        oracle.assert_meaningful({**gradients, "b": torch.zeros(2)}, ratio, clipped)
    with pytest.raises(AssertionError, match="exactly 1"):
        oracle.assert_meaningful(gradients, 0 * ratio, clipped)
    with pytest.raises(AssertionError, match="no sequence is clipped"):
        oracle.assert_meaningful(gradients, ratio, torch.tensor([False, False]))
    with pytest.raises(AssertionError, match="every sequence is clipped"):
        oracle.assert_meaningful(gradients, ratio, torch.tensor([True, True]))


def straddling_step(hf_dir: Path, old_from: Path | None = None) -> oracle.OracleStep:
    samples = [replace(s, weight=1.0) for s in oracle.random_samples()]
    logprobs, _ = oracle.oracle_logprobs(old_from or hf_dir, samples)
    old = oracle.straddling_old_logprobs(logprobs)
    return oracle.oracle_step(hf_dir, samples, old, clip_low=1e-3, clip_high=1e-3)
