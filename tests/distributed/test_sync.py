"""Weight sync over a process group from a model that is spread over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_gspo.config import SyncConfig
from megatron_gspo.sync.base import make_weight_sync
from megatron_gspo.train.assembly import make_peers
from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import LAYOUTS, Case
from tests.pool import RankPool
from tests.rollout.standin import digest, stand_ins, state_of

pytestmark = pytest.mark.distributed


def pushed(path: str, parallel: dict[str, int], urls: list[str], method: str) -> None:
    policy, groups = steps.make_policy(Case(path, (), ()), parallel)
    config = SyncConfig.model_validate({"method": method, "bucket_mb": 1})
    sync = make_weight_sync(config, urls, make_peers(groups), model_path=path)
    for version in (1, 2):
        sync.push(policy.weights(copies=False, host=False), version)
    sync.close()


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        ("EP2", "ipc"),
        ("TP2xPP2xDP2xEP2", "distributed"),
        ("TP2xDP2xEP2xETP2", "ipc"),
        ("TP2xDP2xEP2xETP2", "distributed"),
    ],
)
def test_what_servers_get_from_any_layout_are_the_files_tensors(
    ranks: RankPool, tmp_path: Path, layout: str, method: str
) -> None:
    path = oracle.make_tiny_qwen3_moe(tmp_path)
    expected = {name: digest(tensor) for name, tensor in load_file(path / "model.safetensors").items()}
    world, parallel = LAYOUTS[layout]
    with stand_ins((1, None), (2, None)) as urls:
        ranks.run(world, pushed, str(path), parallel, urls, method)
        states = [state_of(url) for url in urls]
    assert [state["received"] for state in states] == [[expected], [expected, expected]]
    assert [state["weight_version"] for state in states] == ["2", "2"]
