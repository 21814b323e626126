"""The quickstart's model and prompts, a real SGLang server that holds the model, and runs on the pool of ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import RunConfig, load
from megatron_gspo.rollout.sglang.launcher import LocalServers
from tests.pool import RankPool
from tests.rollout.conftest import require_sglang

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    return RankPool()


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``examples/quickstart/prepare.py`` writes."""
    directory = tmp_path_factory.mktemp("quickstart")
    script = [sys.executable, str(QUICKSTART / "prepare.py"), str(directory)]
    subprocess.run([*script, "--sft-examples", "64", "--train-prompts", "64", "--eval-prompts", "16"], check=True)
    return directory


@pytest.fixture(scope="session")
def server(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real server with the quickstart's random model; a run pushes its own weights first."""
    require_sglang()
    config = load(QUICKSTART / "gspo.toml").rollout
    logs = tmp_path_factory.mktemp("logs")
    with LocalServers(
        config, quickstart / "model", logs, device="cpu", dtype="float32", routes=True, key=""
    ) as servers:
        yield servers.urls[0]


@pytest.fixture
def overrides(quickstart: Path, tmp_path: Path) -> list[str]:
    """The quickstart's own configuration, cut to two short outer steps on babble that is rewarded."""
    return [
        f'model.path="{quickstart}/model"',
        f'data.path="{quickstart}/train.jsonl"',
        f'data.eval_path="{quickstart}/eval.jsonl"',
        f'reward.function="{Path(__file__).with_name("rewards.py")}:share_of_even_tokens"',
        f'train.run_dir="{tmp_path}/run"',
        "train.outer_steps=2",
        "train.prompts_per_step=4",
        "train.minibatches=2",
        "train.tensorboard=false",
        "eval.prompts=16",
    ]


@pytest.fixture
def make_config(overrides: list[str], server: str) -> MakeConfig:
    """The cut configuration against the real server, with further settings."""

    def make(*more: str, **settings: Any) -> RunConfig:
        return load(QUICKSTART / "gspo.toml", [*overrides, f'rollout.servers=["{server}"]', *more])

    return make
