"""A reward with spread on a random model's babble, so that a test's steps have gradients."""

from __future__ import annotations

from megatron_gspo.types import Prompt, Rollout


def share_of_even_tokens(prompt: Prompt, response: Rollout) -> float:
    return float((response.response_ids % 2 == 0).mean())


def share_of_odd_tokens_then_fails(prompt: Prompt, response: Rollout) -> float:
    return 1.5


async def share_of_even_tokens_and_chance(prompt: Prompt, response: Rollout) -> float:
    """Draws from every global generator, in one event loop, so in a fixed order."""
    import random

    import numpy as np
    import torch

    chance = (random.random() + float(np.random.rand()) + float(torch.rand(()))) / 3
    return 0.5 * share_of_even_tokens(prompt, response) + 0.5 * chance


def first_token_is_even(prompt: Prompt, response: Rollout) -> float:
    return float(response.response_ids[0] % 2 == 0)


def equal_for_every_other_prompt(prompt: Prompt, response: Rollout) -> float:
    return share_of_even_tokens(prompt, response) if sum(map(ord, prompt.id)) % 2 else 0.5


def always_equal(prompt: Prompt, response: Rollout) -> float:
    return 1.0


def share_of_even_tokens_of_an_answer(prompt: Prompt, response: Rollout) -> float:
    if prompt.answer == "none":
        raise ValueError(f"{prompt.id} has no answer")
    return share_of_even_tokens(prompt, response)


def jams_at_the_second_sample(prompt: Prompt, response: Rollout) -> float:
    if response.sample == 1:
        raise RuntimeError("paper jam")
    return 1.0


def sleeps(prompt: Prompt, response: Rollout) -> float:
    import time

    time.sleep(600)
    return 1.0
