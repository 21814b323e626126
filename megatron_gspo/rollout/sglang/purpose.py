"""What local servers are for: how their command lines differ, and how the settings are called that errors name."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.config.reward_server import JUDGE_NAME


@dataclass(frozen=True)
class Purpose:
    """One use of local servers."""

    noun: str
    """Of one of them, in a sentence."""
    settings: str
    """What the names of its settings begin with: ``start_s`` and ``restarts`` follow."""
    sizes: str
    """Where its size is set."""
    more_room: str
    """What to do where its cards do not hold the weights."""
    flags: tuple[str, ...]
    """Of its command line, on every device."""


# --skip-server-warmup: the launcher asks until it is healthy, which is one.
# --enable-fp32-lm-head: logits in bfloat16 are 0.125 apart at 16 to 32, and the clip range is 3e-4.
ROLLOUTS = Purpose(
    "rollout server",
    "rollout.server_",
    "placement, rollout.server_args",
    "more cards a server (placement.tensor), a larger placement.memory, or servers named in rollout.servers",
    ("--skip-tokenizer-init", "--skip-server-warmup", "--enable-fp32-lm-head"),
)
"""Responses of the policy: token ids go in and come out."""
SCORES = Purpose(
    "reward model's server",
    "reward_server.",
    "reward_server.tensor, reward_server.args",
    "more cards a server (reward_server.tensor), or a larger reward_server.memory",
    ("--is-embedding", "--skip-tokenizer-init", "--skip-server-warmup"),
)
"""Scores of a sequence classifier, at ``/classify``: token ids go in."""
GRADES = Purpose(
    "judge's server",
    "reward_server.",
    SCORES.sizes,
    SCORES.more_room,
    ("--served-model-name", JUDGE_NAME, "--skip-server-warmup"),
)
"""Chat completions, of a language model with its own tokenizer."""
PURPOSES = {"reward_model": SCORES, "judge": GRADES}
"""``reward_server.kind`` -> what its servers are for."""
