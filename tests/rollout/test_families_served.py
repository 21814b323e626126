"""Real servers of further families, which start from whatever is in memory: a push fills every parameter."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.rollout.launcher import LocalServers
from megatron_gspo.sync.base import METHODS, make_weight_sync
from megatron_gspo.sync.peers import Peers
from tests.rollout.conftest import require_sglang
from tests.rollout.models import FURTHER, save_further_model, tensors_of
from tests.rollout.test_sglang import draw, logprob_error

pytestmark = pytest.mark.rollout


@pytest.mark.parametrize("model_type", FURTHER)
def test_every_method_fills_a_server_that_started_without_weights(model_type: str, tmp_path: Path) -> None:
    require_sglang()
    first, second = (save_further_model(model_type, tmp_path / str(seed), seed) for seed in (0, 1))
    config = RolloutConfig(server_args=("--load-format", "dummy"))
    with LocalServers(config, first, tmp_path / "logs", device="cpu", dtype="float32") as servers:
        (url,) = servers.urls
        for version, method in enumerate(METHODS, start=1):
            model = second if version == 2 else first  # else one that did nothing would pass
            settings = SyncConfig(method=method, verify="every", directory=str(tmp_path))
            sync = make_weight_sync(settings, [url], Peers(), model_path=model)
            sync.push(tensors_of(model), version)
            sync.close()
            assert logprob_error(draw(url, version=version), model) < 1e-5
