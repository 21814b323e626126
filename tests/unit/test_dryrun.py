"""A dry run on fake tensors: what it counts is what a step does, and what ``doctor`` says without one."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_gspo import dryrun, kernels, platforms
from megatron_gspo.config import ModelConfig, ParallelConfig, RunConfig
from megatron_gspo.doctor.estimate import estimate, layers_of
from megatron_gspo.doctor.passing import Passing, peak
from megatron_gspo.doctor.tensors import adapters_of, tensors_of
from megatron_gspo.dryrun import GPU, Rank, run_jobs
from megatron_gspo.dryrun import kernels as standins
from megatron_gspo.dryrun.child import Job
from megatron_gspo.dryrun.depths import chunks_of, composed, depths_for, kinds_of, shortened
from megatron_gspo.dryrun.meter import BLOCK, Meter
from megatron_gspo.dryrun.result import Collectives, Moment, Peak
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.family import Family, ModelShape

SIZES = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
}
FULL = {"model": {"recompute": "full"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "recompute, experts over ranks": {**FULL, "parallel": {"expert": 4, "data": 4}},
    "tensor ranks": {"parallel": {"tensor": 2}},
    "context ranks": {**FULL, "parallel": {"context": 2}, "optimizer": {"offload": True}},
    "stages": {**FULL, "parallel": {"pipeline": 2}},
    "adapters": {"lora": {"rank": 64}},
    "adapters, tensor ranks": {**FULL, "lora": {"rank": 64}, "parallel": {"tensor": 2}, "sync": {"bucket_mb": 16}},
}


def configured(**sections: Any) -> RunConfig:
    plain: dict[str, Any] = {
        "model": {"path": "unused", "dtype": "bfloat16"},
        "data": {"path": "unused"},
        "train": {"run_dir": "run", "microbatch_tokens": 2048, "prompts_per_step": 16},
        "rollout": {"max_prompt_tokens": 256, "max_response_tokens": 768, "group_size": 2},
    }
    for name, settings in sections.items():
        plain[name] = {**plain.get(name, {}), **settings}
    return RunConfig(**plain)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, ModelShape]:
    directory = tmp_path_factory.mktemp("dryrun")
    (directory / "config.json").write_text(json.dumps(SIZES))
    return read_model(directory)


@pytest.fixture(scope="module")
def ranks(model: tuple[Family, ModelShape]) -> dict[tuple[str, int], tuple[RunConfig, Rank]]:
    """(layout, stage) -> what its rank does; all of them in one process of its own."""
    jobs, names = [], []
    for layout, sections in LAYOUTS.items():
        config = configured(**sections)
        for kind in kinds_of(config.parallel, model[1]):
            jobs.append(Job(config, model[1], kind.stage, config.parallel.world_size(), GPU))
            names.append((layout, kind.stage))
    found = run_jobs(jobs)
    return {name: (job.config, rank) for name, job, rank in zip(names, jobs, found, strict=True)}


def by_doctor(config: RunConfig, model: tuple[Family, ModelShape], stage: int) -> float:
    data, tensors = config.parallel.data_size(), tuple(tensors_of(*model))
    adapters = tuple(adapters_of(*model, config.lora))
    needed = estimate(config, model[1], tensors, data_size=data, stage=stage, adapters=adapters, machine=GPU)
    return peak(needed.on_card(config), Passing.of(config, model[1], stage, data, GPU))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_doctors_sum_is_within_a_twentieth_of_the_peak_of_a_dry_run(
    ranks: dict[tuple[str, int], tuple[RunConfig, Rank]], model: tuple[Family, ModelShape], layout: str
) -> None:
    stages = [stage for name, stage in ranks if name == layout]
    assert stages
    for stage in stages:
        config, rank = ranks[layout, stage]
        assert by_doctor(config, model, stage) == pytest.approx(rank.peak.total, rel=0.05)


def test_states_are_counted_to_the_byte(ranks: Any, model: tuple[Family, ModelShape]) -> None:
    _, rank = ranks["one rank", 0]
    parts, elements = rank.peak.parts, sum(tensor.local_size(1, 1) for tensor in tensors_of(*model))
    rounding = 1000 * BLOCK
    assert 2 * elements <= parts["weights"] <= 2 * elements + rounding
    assert 4 * elements <= parts["gradients"] <= 4 * elements + rounding
    assert 12 * elements <= parts["optimizer"] <= 12 * elements + rounding


def test_offloaded_states_lie_in_host_memory(ranks: Any, model: tuple[Family, ModelShape]) -> None:
    _, rank = ranks["context ranks", 0]
    elements = sum(tensor.local_size(1, 1) for tensor in tensors_of(*model))
    assert rank.host == pytest.approx(12 * elements / 2, rel=0.01)
    assert "optimizer" not in rank.peak.parts and "host" not in rank.peak.parts


def test_a_policy_is_built_without_a_second_copy_of_its_weights(ranks: Any) -> None:
    """Its states lie on the host, so that nothing else would hide one."""
    _, rank = ranks["context ranks", 0]
    built = max(peak.total for moment, peak in rank.peaks.items() if moment.phase == "start")
    assert built == pytest.approx(rank.peak.parts["weights"] + rank.peak.parts["gradients"], rel=0.02)


def test_operations_are_those_of_the_formula(ranks: Any, model: tuple[Family, ModelShape]) -> None:
    """A product is 2 operations in pi_old, in forward and in recompute, and 4 in backward; the head, whose logits
    backward makes again, likewise. Causal attention has two products a pass, and five in backward."""
    _, rank = ranks["recompute, experts over ranks", 0]
    shape, tokens = model[1], 2048
    hidden, q, k = shape.hidden_size, 512, 128
    layer = hidden * (q + 2 * k) + q * hidden + hidden * shape.num_experts
    layer += shape.top_k * 3 * hidden * shape.expert_hidden_size
    products = 10 * tokens * (shape.num_layers * layer + hidden * shape.vocab_size)
    scores = tokens // 1024 * 1024 * 1025 // 2
    attention = shape.num_layers * (3 * 4 + 10) * q * scores
    microbatches = 16 // 4 * 2 // 4 // 2  # responses of a mini-batch, over ranks, two in each
    assert rank.flops == microbatches * (products + attention)


def test_collectives_are_counted_by_kind_and_group(ranks: Any, model: tuple[Family, ModelShape]) -> None:
    """Of a layer: rows and probabilities to the experts and rows back, in pi_old, forward, recompute and backward."""
    _, rank = ranks["recompute, experts over ranks", 0]
    found = {(each.kind, each.group): each for each in rank.collectives}
    exchanges = found["alltoall_base", "tp_ep"]
    assert exchanges.count == model[1].num_layers * 3 * 4
    rows = 2048 * 4
    assert exchanges.bytes == model[1].num_layers * 4 * rows * (2 * 512 * 2 + 4)
    elements = [t.local_size(1, 1) for t in tensors_of(*model) if not t.is_expert]
    reduced = found["reduce_scatter_tensor_coalesced", "data_context"].bytes
    assert reduced == pytest.approx(4 * sum(elements), rel=0.01)


def test_stages_send_activations_on(ranks: Any) -> None:
    first, last = (dict(zip(*_sent(ranks["stages", stage][1]), strict=True)) for stage in (0, 1))
    assert first["send"] == last["recv"] and first["recv"] > 0


def _sent(rank: Rank) -> tuple[list[str], list[float]]:
    kinds = [each for each in rank.collectives if each.kind in ("send", "recv")]
    return [each.kind for each in kinds], [each.bytes for each in kinds]


def test_the_process_that_asks_is_as_it_was(ranks: Any) -> None:
    assert ranks and not dist.is_initialized()
    assert platforms.here() in (platforms.CPU, platforms.CUDA)
    assert torch.nn.Module.to.__module__ == "torch.nn.modules.module"


# ----------------------------------------------------------------------------------------------------------- the meter


def metered(use: Callable[[Meter], None]) -> Meter:
    meter = Meter()
    with FakeTensorMode(), meter:
        use(meter)
    return meter


def test_a_peak_is_of_what_is_alive_at_one_time() -> None:
    def use(meter: Meter) -> None:
        with meter.at(phase="train", part="passing"):
            first = torch.empty(1000)  # 4000 bytes, in 8 blocks
            del first
            second, third = torch.empty(1), torch.empty(300)
            with meter.at(part="head", site="head"):
                fourth = second.expand(100) + 0
            view = third[3:].view(-1)
        assert len(view) + len(fourth)

    meter = metered(use)
    assert meter.peaks["train", "layers"] == (8 * BLOCK, {"passing": 8 * BLOCK})  # type: ignore[index]
    assert meter.peaks["train", "head"] == (5 * BLOCK, {"passing": 4 * BLOCK, "head": BLOCK})  # type: ignore[index]
    assert not +meter.live


def test_what_forward_makes_is_kept_and_what_backward_makes_passes() -> None:
    def use(meter: Meter) -> None:
        weight = torch.empty(64, 64, requires_grad=True)
        with meter.at(phase="train", part=""):
            loss = (weight @ weight).sin().sum()
            assert meter.live["activations"] == 64 * 64 * 4 + BLOCK  # the argument of the sine, and the sum
            loss.backward()

    meter = metered(use)
    assert meter.flops["train"] == 3 * 2 * 64**3
    assert {"activations", "passing", "weights"} == set(meter.peaks["train", "layers"][1])  # type: ignore[index]


def test_a_size_that_depends_on_data_is_refused_and_a_norm_is_one() -> None:
    with FakeTensorMode(), Meter():
        assert float(torch.empty(3).norm()) == 1.0
        with pytest.raises(ConfigError, match="depends on the data"):
            torch.empty(3, dtype=torch.int64).tolist()


# ------------------------------------------------------------------------------------------------------------- depths


def test_every_kind_of_stage_is_run_once(model: tuple[Family, ModelShape]) -> None:
    shape = replace(model[1], num_layers=10, moe_layers=(False,) + (True,) * 9)
    kinds = kinds_of(ParallelConfig(pipeline=5), shape)
    assert [(kind.stage, kind.stages) for kind in kinds] == [(0, 1), (1, 3), (4, 1)]
    assert [kind.name for kind in kinds] == ["stage 0 of 5", "stage 1 of 5 (and 2 more)", "stage 4 of 5"]
    assert chunks_of(0, ParallelConfig(pipeline=5), shape) == [(False, True)]


def test_two_depths_stand_for_layers_of_one_kind_alone() -> None:
    plain, full = ModelConfig(path="x"), ModelConfig(path="x", recompute="full", recompute_layers=2)
    block = ModelConfig(path="x", recompute="full", recompute_method="block")
    assert depths_for(plain, [(True,) * 12]) == (2, 3)
    assert depths_for(full, [(True,) * 12]) == (4, 6)
    assert depths_for(plain, [(True,) * 5]) is None  # as much work as the two
    assert depths_for(plain, [(False,) + (True,) * 11]) is None
    assert depths_for(block, [(True,) * 12]) is None


def test_a_shortened_model_has_a_depth_in_every_virtual_stage(model: tuple[Family, ModelShape]) -> None:
    shape = replace(model[1], num_layers=48, moe_layers=(True,) * 48)
    config, short = shortened(configured(parallel={"pipeline": 4, "virtual_pipeline": 2}), shape, 1, 3)
    assert config.parallel.stage_layers == (3,) * 8 and short.num_layers == len(short.moe_layers) == 24


def test_layers_add_what_the_one_between_two_depths_does() -> None:
    moment = Moment("train", "layers")

    def rank(layers: int) -> Rank:
        parts = {"weights": 10.0 * layers, "head": 7.0, "passing": 5.0}
        reduced = (Collectives("alltoall", "tp_ep", 6.0 * layers, 100.0 * layers),)
        return Rank({moment: Peak(parts, moment, 2.0 * layers)}, reduced, 5.0 + layers, 2.0 * layers)

    assert composed(rank(2), rank(3), 10.0) == rank(12)


# ---------------------------------------------------------------------------------------------------------- the rest


def test_stand_ins_of_kernels_have_their_sizes() -> None:
    """The files of kernels need Triton; their constants are read from the source."""
    for name, constants in {"triton_head": ("SPLIT", "COLUMNS"), "triton_norm": ("PROGRAMS", "ELEMENTS")}.items():
        source = Path(kernels.__file__).with_name(f"{name}.py").read_text()
        assigned = {
            target.id: ast.literal_eval(node.value)
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for constant in constants:
            assert getattr(standins, constant) == assigned[constant]


def test_kernels_keep_less_of_a_layer_than_torch_does(model: tuple[Family, ModelShape]) -> None:
    config = configured()
    kept = {
        machine: layers_of(config, model[1], 0, 1, machine)[0][0].kept(())
        for machine in (GPU, replace(GPU, triton=False))
    }
    assert kept[GPU] < 0.8 * kept[replace(GPU, triton=False)]


def test_a_dry_run_that_fails_says_its_last_line(
    monkeypatch: pytest.MonkeyPatch, model: tuple[Family, ModelShape]
) -> None:
    failed = subprocess.CompletedProcess([], 1, b"", b"Traceback\nValueError: no such group\n")
    monkeypatch.setattr(dryrun.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match="the dry run failed: ValueError: no such group"):
        run_jobs([Job(configured(), model[1], 0, 1, GPU)])


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"kernels": "reference"}])
def test_what_cannot_be_run_on_fake_tensors_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    with pytest.raises(ConfigError, match="a dry run is of bfloat16"):
        dryrun.verify(configured(model=settings), tmp_path, 1)


def test_verify_names_ranks_and_says_how_doctor_compares(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: tuple[Family, ModelShape]
) -> None:
    moment = Moment("train", "layers")
    seen: list[Job] = []

    def run(*_: Any, input: bytes, **__: Any) -> subprocess.CompletedProcess[bytes]:
        seen.extend(pickle.loads(input))
        ranks = [Rank({moment: Peak({"weights": 1e9 * (i + 1)}, moment)}, (), 3.0) for i in range(len(seen))]
        Path(_[0][-1]).write_bytes(pickle.dumps(ranks))
        return subprocess.CompletedProcess([], 0, b"", b"")

    monkeypatch.setattr(dryrun.subprocess, "run", run)
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "num_hidden_layers": 16}))
    config = configured(**FULL, parallel={"pipeline": 2})
    found = dryrun.verify(config, tmp_path / "config.json", 2)
    assert [job.stage for job in seen] == [0, 1] and not found.full_depth
    assert found.fullest == "stage 1 of 2" and found.peaks["stage 0 of 2"].total == 1e9
    assert found.agreement == found.estimate["stage 1 of 2"] / 2e9
