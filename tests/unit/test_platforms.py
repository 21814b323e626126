"""What a GPU run does otherwise than a CPU run is taken here too, with ``torch.cuda.is_available`` patched."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch

from megatron_gspo.platforms import CPU, CUDA, PLATFORMS, here


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_the_platform_is_what_torch_says(monkeypatch):
    for available, platform in ((True, CUDA), (False, CPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert here() is platform is PLATFORMS[platform.device_type]


def test_every_row_of_the_table_differs():
    """A row that is the same on both has no business in it."""
    assert all(getattr(CPU, field.name) != getattr(CUDA, field.name) for field in fields(CPU))


def test_a_rank_without_a_gpu_of_its_own_is_told_so(with_cuda, monkeypatch):
    from megatron_gspo.errors import LayoutError
    from megatron_gspo.megatron.groups import start_distributed

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(LayoutError, match="rank 2 of this machine has no GPU: there are 2"):
        start_distributed()


def test_a_rank_joins_over_nccl_on_its_own_gpu(with_cuda, monkeypatch):
    from megatron_gspo.megatron import groups

    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda local: seen.append(local))
    monkeypatch.setattr(groups, "join_world", lambda backend, timeout: seen.append(backend))
    monkeypatch.setenv("LOCAL_RANK", "1")
    groups.start_distributed()
    assert seen == [1, "nccl"]


@pytest.mark.parametrize(
    ("dtype", "settings", "capability", "kernel"),
    [
        (torch.bfloat16, {}, (9, 0), "varlen"),
        (torch.bfloat16, {}, (7, 5), "sdpa"),  # flash attention begins with 8.0
        (torch.bfloat16, {"kv_channels": 100}, (9, 0), "sdpa"),
        (torch.bfloat16, {"multi_latent_attention": True}, (9, 0), "sdpa"),
        (torch.float32, {}, (9, 0), "sdpa"),
        (torch.float64, {}, (9, 0), "sdpa"),
    ],
)
def test_the_attention_kernel_of_a_gpu(with_cuda, monkeypatch, dtype, settings, capability, kernel):
    from types import SimpleNamespace

    from megatron_gspo.megatron import attention

    monkeypatch.setattr(attention, "_has_transformer_engine", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = {"params_dtype": dtype, "kv_channels": 128, "multi_latent_attention": False, "deterministic_mode": False}
    assert attention.attention_kernel(SimpleNamespace(**config | settings)) == kernel


def test_a_deterministic_run_takes_no_kernel_that_is_deterministic_by_an_environment_variable(with_cuda, monkeypatch):
    from types import SimpleNamespace

    from megatron_gspo.megatron import attention

    monkeypatch.setattr(attention, "_has_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    config = SimpleNamespace(
        params_dtype=torch.bfloat16, kv_channels=128, multi_latent_attention=False, deterministic_mode=False
    )
    assert attention.attention_kernel(config) == "transformer_engine"
    config.deterministic_mode = True
    assert attention.attention_kernel(config) == "varlen"


MENDED = """
import torch
torch.cuda.is_available = lambda: True
names = {name: getattr(torch.cuda, name) for name in ("current_device", "Stream", "Event")}
from megatron_gspo.megatron import cpu
cpu.install()
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer import multi_latent_attention
assert hasattr(moe_utils, "te_general_gemm")
assert isinstance(multi_latent_attention.TELinear, type)
assert all(getattr(torch.cuda, name) is value for name, value in names.items()), "a stand-in on a GPU"
assert torch.zeros.__module__ != cpu.__name__
print("mended")
"""


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)


def test_on_a_gpu_megatrons_undefined_names_are_mended_and_nothing_stands_in():
    """0.16.1 without Transformer Engine: the first forward of a mixture of experts raises NameError."""
    done = in_a_process(MENDED)
    assert done.stdout.strip() == "mended", done.stderr


BUILDS = """
import os, tempfile
import torch, torch.distributed as dist
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from megatron_gspo.megatron import cpu, groups, optimizer
from megatron_gspo.config import ParallelConfig, OptimizerConfig
cpu.install()
dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
torch.cuda.is_available = lambda: True  # from here on, what asks is told that there is a GPU
made = groups.make_groups(ParallelConfig())
from types import SimpleNamespace
from megatron.core.transformer.transformer_config import TransformerConfig
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True)
config.params_dtype = torch.float32
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.weight = config, torch.nn.Parameter(torch.ones(8))
wrapped = optimizer.wrap_ddp(Model(), made)
built = optimizer.Optimizer(OptimizerConfig(), [wrapped], made)
print(type(built.megatron).__name__)
"""


def test_an_optimizer_is_built_on_a_gpu():
    """Megatron refuses gloo groups of its own beside groups that it is given: ValueError, on both pins."""
    done = in_a_process(BUILDS)
    assert done.stdout.strip().endswith("Optimizer"), done.stderr
