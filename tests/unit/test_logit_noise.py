"""The simulation of docs/numerics.md, on a small head."""

from __future__ import annotations

import argparse

import torch

from tools.logit_noise import simulate

OPTIONS = argparse.Namespace(tokens=512, vocab=512, hidden=64)


def rms(size: float, noise: float) -> dict[str, float]:
    found = simulate(size, noise, OPTIONS, torch.Generator().manual_seed(0))
    return {name: float(of_token.square().mean().sqrt()) for name, of_token in found.items()}


def test_rounded_logits_are_noisier_and_noise_grows_with_the_logits() -> None:
    small, large = rms(8.0, 0.1), rms(32.0, 0.1)
    assert small["bf16"] > 1.3 * small["fp32"]
    assert large["bf16"] > 1.3 * large["fp32"]
    assert large["fp32"] > 1.3 * small["fp32"]


def test_the_same_hidden_states_have_no_noise_in_float32() -> None:
    assert rms(16.0, 0.0)["fp32"] < 1e-5
