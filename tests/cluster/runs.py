"""A short run against stand-ins for servers, which draw by the seeds of the requests; and the one nobody disturbs."""

from __future__ import annotations

from pathlib import Path

from megatron_gspo.config import RunConfig, load
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART, ROOT
from tests.training.stand_in import StandIn
from tests.training.test_runs import train

OUTER_STEPS = 6


def settings_of(quickstart: Path) -> list[str]:
    """Of six short outer steps, a checkpoint after every second, and a reward with chance in it."""
    return [
        f'model.path="{quickstart}/model"',
        f'data.path="{quickstart}/train.jsonl"',
        'data.eval_path=""',
        f'reward.function="{ROOT}/tests/training/rewards.py:share_of_even_tokens_and_chance"',
        f"train.outer_steps={OUTER_STEPS}",
        "train.prompts_per_step=4",
        "train.minibatches=2",
        "train.checkpoint_every=2",
        "train.tensorboard=false",
        "train.overwrite=false",
        "eval.every=0",
    ]


def of_stand_ins(directory: Path) -> list[str]:
    """They draw from no model, and have no weights to hash."""
    return ["rollout.max_engine_k3=0", 'sync.method="disk"', f'sync.directory="{directory}"', 'sync.verify="off"']


def undisturbed(ranks: RankPool, settings: list[str], run: Path, server: str) -> RunConfig:
    """The same run on one machine, against one server, which nobody disturbs."""
    config = load(QUICKSTART / "gspo.toml", [*settings, f'train.run_dir="{run}"', f'rollout.servers=["{server}"]'])
    ranks.run(2, train, config)
    return config


def undisturbed_with_stand_in(ranks: RankPool, settings: list[str], run: Path, model: Path) -> RunConfig:
    """As ``undisturbed``, against a stand-in."""
    with StandIn(model) as server:
        return undisturbed(ranks, settings, run, server.url)
