"""A checkpoint is the policy: training goes on from it, at any layout, as if it had never stopped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import LAYOUTS, Case
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

EXTRA = {"outer_step": 7, "cursor": {"epoch": 1, "position": [3, 5]}, "seed": 2**40}
UPDATES = 2
"""Steps before saving: the moments are full and Adam's bias correction is large."""


@dataclass
class Trained:
    """Weights by Hugging Face name, put together from all ranks."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    """When the checkpoint was written, or loaded."""
    next: dict[str, np.ndarray] = field(default_factory=dict)
    """One step later."""
    extra: list[Any] = field(default_factory=list)
    """What each rank's load returned."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """67 rows of vocabulary, so that two tensor ranks pad it; the first of two layers is dense, so that the first of
    two stages has no experts."""
    return str(oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), layers=2, mlp_only_layers=[0]))


@pytest.fixture(scope="module")
def deep_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five layers, the first one dense, and one matrix for embedding and head: no two stages are alike."""
    directory = tmp_path_factory.mktemp("deep")
    return str(oracle.make_tiny_qwen3_moe(directory, layers=5, mlp_only_layers=[0], tie=True))


@pytest.fixture(scope="module")
def tied_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("tied"), layers=2, tie=True))


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, str], tuple[Path, Trained]]:
    """Trains and saves a case at a layout, once."""
    made: dict[tuple[str, str, str], tuple[Path, Trained]] = {}

    def get(case: Case, layout: str) -> tuple[Path, Trained]:
        key = (case.path, case.dtype, layout)
        if key not in made:
            directory = tmp_path_factory.mktemp("saved") / "checkpoint"
            made[key] = directory, run(ranks, train_and_save, case, layout, directory)
        return made[key]

    return get


def case_of(path: str, dtype: str = "float64") -> Case:
    """Gradients are not clipped: Megatron scales them by a float32 number, which would be 3e-8 of a step."""
    optimizer = {"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 0.0, "betas": [0.9, 0.95]}
    return Case(path, tuple(oracle.random_samples(seed=3)), old=(), dtype=dtype, optimizer=optimizer)


def run(ranks: RankPool, function: Callable[..., Trained], case: Case, layout: str, *args: Any) -> Trained:
    world, parallel = LAYOUTS[layout]
    plan = steps.filled_up(steps.uneven_plan(len(case.samples), steps.data_size(layout)), parallel)
    whole = Trained()
    for part in ranks.run(world, function, case, parallel, plan, *args):
        whole.weights |= part.weights
        whole.next |= part.next
        whole.extra += part.extra
    return whole


def error_of_step(actual: Trained, expected: Trained) -> float:
    """The largest difference between two next steps, as a part of the longest movement that the step made."""
    moved = max(np.abs(expected.next[name] - expected.weights[name]).max() for name in expected.next)
    assert moved > 1e-3, "nothing moved, so nothing is compared"
    return max(np.abs(actual.next[name] - expected.next[name]).max() for name in expected.next) / moved


# ------------------------------------------------------------------------------------------------ what ranks do


@contextmanager
def policy_of(case: Case, parallel: dict[str, int]) -> Iterator[Any]:

    with steps.exact_router():
        yield steps.make_policy(case, parallel)[0]


def update(policy: Any, case: Case, plan: steps.Plan) -> None:
    """One step on the policy-gradient loss without ratios: nothing is clipped, so every step has gradients."""
    from megatron_gspo.batching.packing import shard_tokens

    groups = policy.groups
    batches = [steps.pack_samples(case, part, groups.shard) for part in plan[groups.data_rank]]
    shards = [shard_tokens(batch, groups.shard) for batch in batches]
    policy.gradients(batches, lambda i, logprobs_T, _: -(logprobs_T * shards[i].advantages_T).sum())
    policy.step(0, 1)


def weights_of(policy: Any) -> dict[str, np.ndarray]:
    return {name: weight.double().numpy() for name, weight in policy.weights()}


def train_and_save(
    case: Case, parallel: dict[str, int], plan: steps.Plan, directory: Path, further: int = 1
) -> Trained:
    from megatron_gspo.megatron.checkpoint import save_checkpoint

    with policy_of(case, parallel) as policy:
        for _ in range(UPDATES):
            update(policy, case, plan)
        save_checkpoint({"policy": policy}, directory, EXTRA)
        weights = weights_of(policy)
        for _ in range(further):
            update(policy, case, plan)
        return Trained(weights, weights_of(policy))


def load_and_train(
    case: Case, parallel: dict[str, int], plan: steps.Plan, directory: Path, further: int = 1
) -> Trained:
    from megatron_gspo.megatron.checkpoint import load_checkpoint

    with policy_of(case, parallel) as policy:
        extra = load_checkpoint({"policy": policy}, directory)
        weights = weights_of(policy)
        for _ in range(further):
            update(policy, case, plan)
        return Trained(weights, weights_of(policy), [extra])


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("float64", "TP2xPP2xEP2"), ("float32", "TP2xEP2"), ("float32", "CP2"), ("bfloat16", "DP2"), ("bfloat16", "PP2")],
)
def test_training_goes_on_bitwise_from_a_checkpoint_of_the_same_layout(
    ranks: RankPool, saved: Any, path: str, dtype: str, layout: str
) -> None:
    case = case_of(path, dtype)
    directory, before = saved(case, layout)
    after = run(ranks, load_and_train, case, layout, directory)
    assert all(extra == EXTRA for extra in after.extra)
    assert steps.worst(after.weights, before.weights)[0] == 0.0
    assert steps.worst(after.next, before.next)[0] == 0.0
    assert error_of_step(after, before) == 0.0


@pytest.mark.parametrize(("dtype", "layout"), [("bfloat16", "DP2"), ("float32", "TP1")])
def test_it_goes_on_bitwise_with_moments_that_are_rounded_by_chance_and_kept_in_host_memory(
    ranks: RankPool, path: str, tmp_path: Path, dtype: str, layout: str
) -> None:
    case = case_of(path, dtype)
    case = replace(case, optimizer={**case.optimizer, "state_dtype": "bfloat16", "offload": True})
    before = run(ranks, train_and_save, case, layout, tmp_path / "checkpoint", 2)
    after = run(ranks, load_and_train, case, layout, tmp_path / "checkpoint", 2)
    assert error_of_step(after, before) == 0.0
    onto_float32 = run(ranks, load_and_train, case_of(path, dtype), layout, tmp_path / "checkpoint", 2)
    within = 0.05 if dtype == "float32" else 0.5  # the last bit of a bfloat16 weight is a quarter of what it moved
    assert error_of_step(onto_float32, before) < within, "they are taken, and what is rounded no more differs a little"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("TP2xEP2", "PP2"),
        ("TP1", "TP2"),  # the vocabulary gains a row of padding, experts gain a replica
        ("TP2", "TP1"),
        ("DP2", "TP1"),
        ("TP1", "EP2"),
        ("EP2", "TP2"),
        ("TP2xPP2xEP2", "DP2"),
        ("TP2xCP2xEP2", "PP2"),
        ("TP1", "CP2xPP2"),
    ],
)
def test_the_next_step_is_the_same_at_another_layout(
    ranks: RankPool, saved: Any, path: str, source: str, target: str
) -> None:
    case = case_of(path)
    directory, before = saved(case, source)
    after = run(ranks, load_and_train, case, target, directory)
    assert steps.worst(after.weights, before.weights)[0] == 0.0
    assert error_of_step(after, before) < 1e-10


@pytest.mark.parametrize("wrote", ["auto", "reference"])
def test_grouped_experts_and_single_ones_load_what_the_other_wrote(
    ranks: RankPool, path: str, tmp_path: Path, wrote: str
) -> None:
    """Weights, master weights and moments; over expert ranks and cut over tensor ranks."""
    case = replace(case_of(path), kernels=wrote)
    other = replace(case, kernels="reference" if wrote == "auto" else "auto")
    before = run(ranks, train_and_save, case, "TP2xETP2", tmp_path / "checkpoint")
    after = run(ranks, load_and_train, other, "TP2xEP2", tmp_path / "checkpoint")
    assert steps.worst(after.weights, before.weights)[0] == 0.0
    assert error_of_step(after, before) < 1e-10


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("PP2xVPP2", "TP2xETP2"),
        ("TP2xETP2", "PP3"),
        ("DP2xETP2", "PP2xVPP2"),
    ],
)
def test_virtual_stages_and_cut_experts_are_saved_by_their_place_in_the_whole(
    ranks: RankPool, saved: Any, deep_path: str, source: str, target: str
) -> None:
    case = case_of(deep_path)
    directory, before = saved(case, source)
    after = run(ranks, load_and_train, case, target, directory)
    assert steps.worst(after.weights, before.weights)[0] == 0.0
    assert error_of_step(after, before) < 1e-10


@pytest.mark.parametrize(("source", "target"), [("TP1", "PP2"), ("PP2", "TP2"), ("TP2xPP2xEP2", "TP1")])
def test_a_tied_embedding_is_one_weight_at_every_layout(
    ranks: RankPool, saved: Any, tied_path: str, source: str, target: str
) -> None:
    case = case_of(tied_path)
    directory, before = saved(case, source)
    after = run(ranks, load_and_train, case, target, directory)
    assert steps.worst(after.weights, before.weights)[0] == 0.0
    assert error_of_step(after, before) < 1e-10


def test_float32_state_gives_the_next_step_of_another_layout_to_its_own_precision(
    ranks: RankPool, saved: Any, path: str
) -> None:
    case = case_of(path, "float32")
    directory, before = saved(case, "TP2xEP2")
    after = run(ranks, load_and_train, case, "PP2", directory)
    assert steps.worst(after.weights, before.weights)[0] == 0.0
    assert error_of_step(after, before) < 1e-3


# --------------------------------------------------------------------------------------------------- its contents


def count_steps(case: Case, parallel: dict[str, int], plan: steps.Plan, directory: Path) -> list[list[float]]:
    """Counters of every parameter after loading, and after one more step; whether two of them share memory."""
    from megatron_gspo.megatron.checkpoint import load_checkpoint

    with policy_of(case, parallel) as policy:
        load_checkpoint({"policy": policy}, directory)
        inner = [part.optimizer for part in policy.optimizer.megatron.chained_optimizers]
        counters = [state["step"] for one in inner for state in one.state.values()]
        loaded = [float(counter) for counter in counters]
        update(policy, case, plan)
        return [loaded, [float(counter) for counter in counters]]


def test_every_parameter_counts_its_own_steps_after_loading(ranks: RankPool, saved: Any, path: str) -> None:
    """Counters that share one tensor advance once a parameter, and Adam's bias correction with them."""
    case = case_of(path)
    directory, _ = saved(case, "TP1")
    [(loaded, stepped)] = ranks.run(1, count_steps, case, {}, steps.uneven_plan(len(case.samples), 1), directory)
    assert len(loaded) > 10
    assert set(loaded) == {UPDATES}
    assert set(stepped) == {UPDATES + 1}


def load_with_other_settings(case: Case, parallel: dict[str, int], directory: Path) -> Any:
    from megatron_gspo.megatron.checkpoint import load_checkpoint

    with policy_of(case, parallel) as policy:
        load_checkpoint({"policy": policy}, directory)
        groups = policy.optimizer.megatron.param_groups
        return {(group["lr"], tuple(group["betas"]), group["eps"]) for group in groups}


def test_optimizer_settings_are_those_of_the_configuration(ranks: RankPool, saved: Any, path: str) -> None:
    case = case_of(path)
    directory, _ = saved(case, "TP1")
    other = replace(case, optimizer={"lr": 3e-5, "betas": [0.5, 0.6], "eps": 1e-6})
    assert ranks.run(1, load_with_other_settings, other, {}, directory) == [{(3e-5, (0.5, 0.6), 1e-6)}]


def save_untrained(case: Case, parallel: dict[str, int], directory: Path) -> Trained:
    from megatron_gspo.megatron.checkpoint import save_checkpoint

    with policy_of(case, parallel) as policy:
        save_checkpoint({"policy": policy}, directory, {})
        return Trained(weights_of(policy))


def test_a_policy_saves_before_its_first_step_and_the_saving_moves_nothing(
    ranks: RankPool, path: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    case = case_of(path)
    [before] = ranks.run(1, save_untrained, case, {}, tmp_path / "checkpoint")
    assert steps.worst(before.weights, load_file(f"{path}/model.safetensors"))[0] == 0.0
    plan = steps.uneven_plan(len(case.samples), 1)
    [(loaded, stepped)] = ranks.run(1, count_steps, case, {}, plan, tmp_path / "checkpoint")
    assert (set(loaded), set(stepped)) == ({0.0}, {1.0})


def load_weights_alone(case: Case, parallel: dict[str, int], directory: Path) -> Trained:
    from megatron_gspo.megatron.checkpoint import load_checkpoint

    with policy_of(case, parallel) as policy:
        policy.optimizer = None  # as trainable=False leaves it
        return Trained(extra=[load_checkpoint({"policy": policy}, directory)], weights=weights_of(policy))


def test_a_policy_that_is_not_trained_loads_the_weights(ranks: RankPool, saved: Any, path: str) -> None:
    case = case_of(path)
    directory, before = saved(case, "TP1")
    [after] = ranks.run(1, load_weights_alone, case, {}, directory)
    assert steps.worst(after.weights, before.weights)[0] == 0.0


# -------------------------------------------------------------------------------------------------- what goes wrong


def save_twice_and_die(case: Case, parallel: dict[str, int], root: Path, at: str) -> None:
    """A second save is killed at a point of it, on every rank."""
    from megatron_gspo.megatron import checkpoint_files, checkpoint_stream, checkpoint_write
    from megatron_gspo.megatron.checkpoint import save_checkpoint

    def die(*args: Any, **kwargs: Any) -> None:
        if at == "within a file":
            args[0]._file.write(b"half")
            args[0]._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    points = {
        "before any file": (checkpoint_write, "BlockWriter"),
        "within a file": (checkpoint_stream.BlockWriter, "tensor"),
        "before the description": (checkpoint_write.PendingSave, "_publish"),
        "before the name": (checkpoint_files.Path, "rename"),
    }
    with policy_of(case, parallel) as policy:
        save_checkpoint({"policy": policy}, root / "outer_00001", {"save": 1})
        with mock.patch.object(*points[at], die):
            save_checkpoint({"policy": policy}, root / "outer_00002", {"save": 2})


@pytest.mark.parametrize("at", ["before any file", "within a file", "before the description", "before the name"])
def test_a_kill_while_saving_leaves_the_checkpoint_before_it_and_no_half_one(
    ranks: RankPool, path: str, tmp_path: Path, at: str
) -> None:
    from megatron_gspo.megatron.checkpoint_files import checkpoints_in, clear_leftovers, latest_in

    case = case_of(path)
    with pytest.raises(RankError, match="the process died"):
        ranks.run(2, save_twice_and_die, case, {"tensor": 2}, tmp_path, at)
    whole, half = sorted(entry.name for entry in tmp_path.iterdir())
    assert whole == "outer_00001" and re.fullmatch(r"outer_00002\.[0-9a-f]{8}\.unfinished", half)
    assert latest_in(tmp_path) == tmp_path / "outer_00001"
    clear_leftovers(tmp_path)
    assert list(checkpoints_in(tmp_path)) == [1]
    after = run(ranks, load_and_train, case, "TP2", tmp_path / "outer_00001")
    assert after.extra == [{"save": 1}] * 2


def save_with_little_room(case: Case, parallel: dict[str, int], root: Path, full: str, background: bool) -> list[str]:
    """What each save says: the first while a file of more than 4 KB cannot be written where ``full`` says."""
    from megatron_gspo.errors import WriteError
    from megatron_gspo.megatron import checkpoint_write
    from megatron_gspo.megatron.checkpoint import begin_save, save_checkpoint

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []

    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limit[1]))

    def fill_up_and_publish(self: Any, parts: Any) -> None:
        fill_up()
        publish(self, parts)

    publish = checkpoint_write.PendingSave._publish
    with policy_of(case, parallel) as policy:
        save_checkpoint({"policy": policy}, root / "outer_00001", {"save": 1})
        with contextlib.ExitStack() as stack:
            if full == "description":
                stack.enter_context(mock.patch.object(checkpoint_write.PendingSave, "_publish", fill_up_and_publish))
            elif policy.groups.world.rank() == 1:
                fill_up()
            try:
                begin_save({"policy": policy}, root / "outer_00002", {"save": 2}, background=background).finish()
            except WriteError as error:
                said.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        save_checkpoint({"policy": policy}, root / "outer_00003", {"save": 3})
    return said


@pytest.mark.parametrize(("full", "background"), [("shard", False), ("shard", True), ("description", False)])
def test_a_disk_that_is_full_on_one_rank_is_one_error_on_all_and_the_next_save_succeeds(
    ranks: RankPool, path: str, tmp_path: Path, full: str, background: bool
) -> None:
    (first,), (second,) = ranks.run(2, save_with_little_room, case_of(path), {"tensor": 2}, tmp_path, full, background)
    assert "outer_00002: the checkpoint cannot be written: [Errno 27] File too large" in first
    assert first == second
    assert first.startswith("rank 1: ") == (full == "shard")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["outer_00001", "outer_00003"]
    assert run(ranks, load_and_train, case_of(path), "TP2", tmp_path / "outer_00001").extra == [{"save": 1}] * 2


def save_while_training(case: Case, parallel: dict[str, int], plan: steps.Plan, directory: Path) -> Trained:
    """Training moves every weight and moment before a byte of the checkpoint is written."""
    from megatron_gspo.megatron.checkpoint import begin_save
    from megatron_gspo.megatron.checkpoint_stream import BlockWriter

    trained = threading.Event()
    write = BlockWriter.tensor

    def write_late(*args: Any) -> Any:
        assert trained.wait(60)
        return write(*args)

    with policy_of(case, parallel) as policy, mock.patch.object(BlockWriter, "tensor", write_late):
        update(policy, case, plan)
        weights = weights_of(policy)
        pending = begin_save({"policy": policy}, directory, {}, background=True)
        update(policy, case, plan)
        assert not pending.written()
        assert not directory.exists()
        trained.set()
        pending.finish()
        return Trained(weights, weights_of(policy))


@pytest.mark.parametrize("layout", ["TP1", "DP2"])
def test_a_save_in_the_background_holds_the_weights_and_moments_of_when_it_began(
    ranks: RankPool, path: str, tmp_path: Path, layout: str
) -> None:
    case = case_of(path)
    before = run(ranks, save_while_training, case, layout, tmp_path / "outer_00001")
    after = run(ranks, load_and_train, case, layout, tmp_path / "outer_00001")
    assert steps.worst(after.weights, before.weights)[0] == 0.0
    assert error_of_step(after, before) == 0.0


def held_while_saving(case: Case, directory: Path) -> tuple[int, int]:
    """(Tensors that wait to be written at most, tensors that are written.)"""
    from megatron_gspo.megatron import checkpoint
    from megatron_gspo.megatron.checkpoint_stream import BlockWriter

    made: list[Any] = []
    written: list[Any] = []
    waiting = []
    shares, write = checkpoint._shares, BlockWriter.tensor

    def counted(models: Any) -> Iterator[Any]:
        for share in shares(models):
            if share.tensor is not None:
                made.append(share)
                waiting.append(len(made) - len(written))
            yield share

    def writing(*args: Any) -> None:
        write(*args)
        written.append(args)

    with (
        policy_of(case, {}) as policy,
        mock.patch.object(checkpoint, "_shares", counted),
        mock.patch.object(BlockWriter, "tensor", writing),
    ):
        checkpoint.save_checkpoint({"policy": policy}, directory, {})
    return max(waiting), len(written)


def test_a_save_that_training_waits_for_holds_a_few_tensors_at_a_time(
    ranks: RankPool, path: str, tmp_path: Path
) -> None:
    [(held, written)] = ranks.run(1, held_while_saving, case_of(path), tmp_path / "checkpoint")
    assert held <= 5 < written / 10, "two files, each with one that is being written and one that waits"


def save_with_a_gap(case: Case, directory: Path) -> str:
    from megatron_gspo.errors import WeightError
    from megatron_gspo.megatron import checkpoint

    shares = checkpoint._shares

    def without_one(models: Any) -> Iterator[Any]:
        yield from (share for share in shares(models) if share.key != "optimizer.state.param.output_layer.weight")
        yield from (
            replace(share, tensor=share.tensor[1:])
            for share in shares(models)
            if share.key == "optimizer.state.param.output_layer.weight"
        )

    with policy_of(case, {}) as policy, mock.patch.object(checkpoint, "_shares", without_one):
        try:
            checkpoint.save_checkpoint({"policy": policy}, directory, {})
        except WeightError as error:
            return str(error)
    return "no error"


def test_a_tensor_that_is_not_whole_is_not_a_checkpoint(ranks: RankPool, path: str, tmp_path: Path) -> None:
    [said] = ranks.run(1, save_with_a_gap, case_of(path), tmp_path / "checkpoint")
    assert "optimizer.state.param.output_layer.weight: ranks wrote 2112 elements of 2144, [67, 32]" in said
    assert not list(tmp_path.iterdir())


def refusal(case: Case, parallel: dict[str, int], directory: Path, saving: bool) -> str:
    from megatron_gspo.errors import WeightError, WriteError
    from megatron_gspo.megatron.checkpoint import load_checkpoint, save_checkpoint

    with policy_of(case, parallel) as policy:
        try:
            models = {"policy": policy}
            save_checkpoint(models, directory, {}) if saving else load_checkpoint(models, directory)
        except (WeightError, WriteError) as error:
            return str(error)
    return "no error"


def refusals(ranks: RankPool, case: Case, directory: Path, *, saving: bool = False) -> str:
    """What two ranks say, each on one line that names the directory; the first rank's."""
    messages = ranks.run(2, refusal, case, {"tensor": 2}, directory, saving)
    for message in messages:
        assert "\n" not in message
        assert str(directory) in message
    return messages[0]


def test_a_missing_directory_is_said_to_be_missing(ranks: RankPool, path: str, tmp_path: Path) -> None:
    assert refusals(ranks, case_of(path), tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such checkpoint"


def test_damage_is_named_on_every_rank_whichever_found_it(
    ranks: RankPool, saved: Any, path: str, tmp_path: Path
) -> None:
    whole, _ = saved(case_of(path), "TP1")
    headless, missing, cut, altered = (
        shutil.copytree(whole, tmp_path / name) for name in ("headless", "missing", "cut", "altered")
    )
    (headless / "checkpoint.json").unlink()
    assert "checkpoint.json: FileNotFoundError" in refusals(ranks, case_of(path), headless)
    (missing / "__0_1.distcp").unlink()
    assert "__0_1.distcp: it is missing" in refusals(ranks, case_of(path), missing)
    file = cut / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "__0_0.distcp: it has" in refusals(ranks, case_of(path), cut)
    file = altered / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "__0_0.distcp: it was altered" in refusals(ranks, case_of(path), altered)


def refusal_where_the_last_rank_cannot_read(case: Case, parallel: dict[str, int], directory: Path) -> str:
    import torch.distributed as dist

    from megatron_gspo.megatron import checkpoint_stream

    if dist.get_rank() < dist.get_world_size() - 1:
        return refusal(case, parallel, directory, False)
    with mock.patch.object(checkpoint_stream.torch, "load", side_effect=OSError("Input/output error")):
        return refusal(case, parallel, directory, False)


def test_a_rank_that_cannot_read_stops_all_of_them(ranks: RankPool, saved: Any, path: str) -> None:
    """After the hashes were found right."""
    directory, _ = saved(case_of(path), "TP1")
    for message in ranks.run(2, refusal_where_the_last_rank_cannot_read, case_of(path), {"tensor": 2}, directory):
        assert message.startswith("rank 1: ") and ".distcp: " in message
        assert message.endswith("OSError: Input/output error")


def test_another_model_is_refused_with_both_numbers(ranks: RankPool, saved: Any, path: str, tmp_path: Path) -> None:
    """68 rows of vocabulary are what 67 rows are padded to at two tensor ranks: Megatron alone would load them."""
    directory, _ = saved(case_of(path), "TP1")
    other = str(oracle.make_tiny_qwen3_moe(tmp_path / "other", layers=2, mlp_only_layers=[0], vocab=68))
    assert "vocab_size is 67 there and 68 here" in refusals(ranks, case_of(other), directory)


def test_a_place_that_cannot_be_written_is_named(ranks: RankPool, path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refusals(ranks, case_of(path), tmp_path / "file" / "last", saving=True)


def test_the_header_is_read_by_people(saved: Any, path: str) -> None:
    directory, _ = saved(case_of(path), "TP1")
    header = json.loads((directory / "checkpoint.json").read_text())
    assert header["step"] == UPDATES
    assert header["extra"] == EXTRA
    assert header["model"]["vocab_size"] == 67


class Evil:
    """Code, as a pickle: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def put_into(directory: Path, place: str, payload: bytes) -> None:
    """Puts bytes where a checkpoint holds some of that kind; every hash is that of what is there then."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    from megatron_gspo.megatron import checkpoint_files as files

    if place == "common.pt":
        (directory / place).write_bytes(payload)
    else:
        metadata = files.read_metadata(directory)
        wanted = next(
            key
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata) == (place == "object")
        )
        index, info = next((index, info) for index, info in metadata.storage_data.items() if index.fqn == wanted)
        path = directory / info.relative_path
        metadata.storage_data[index] = replace(info, offset=path.stat().st_size, length=len(payload))
        path.write_bytes(path.read_bytes() + payload)
        (directory / files.METADATA).write_bytes(pickle.dumps(metadata))
    header = files.read_header(directory)
    header.pop("files")
    entries = [files.describe(path) for path in directory.iterdir() if path.name != files.HEADER]
    files.write_header(directory, header, entries)


@pytest.mark.parametrize("place", ["object", "tensor", "common.pt"])
def test_nothing_that_a_checkpoint_holds_runs_code(
    ranks: RankPool, saved: Any, path: str, tmp_path: Path, place: str
) -> None:
    case = case_of(path)
    directory = shutil.copytree(saved(case, "TP1")[0], tmp_path / "checkpoint")
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "touched"), buffer)
    put_into(directory, place, buffer.getvalue())
    if place == "tensor":
        assert "UnpicklingError" in refusals(ranks, case, directory)
    else:  # nobody reads them
        ranks.run(1, load_quietly, case, directory)
    assert not (tmp_path / "touched").exists()


def load_quietly(case: Case, directory: Path) -> None:
    from megatron_gspo.megatron.checkpoint import load_checkpoint

    with policy_of(case, {}) as policy:
        load_checkpoint({"policy": policy}, directory)


# ------------------------------------------------------------------------------------ many ranks, many hosts, one disk


def reads_of_the_description(case: Case, parallel: dict[str, int], directory: Path) -> tuple[int, int]:
    """(How often this rank reads ``.metadata``, the elements that it holds at a time at most.)"""
    from megatron_gspo.megatron import checkpoint, checkpoint_stream

    read, load = checkpoint.read_metadata, checkpoint_stream.torch.load
    reads, alive = [], list[Any]()

    def counted(path: Path) -> Any:
        reads.append(path)
        return read(path)

    def held(*args: Any, **more: Any) -> Any:
        tensor = load(*args, **more)
        alive.append(weakref.ref(tensor))
        most.append(sum(each.numel() for ref in alive if (each := ref()) is not None))
        return tensor

    most: list[int] = []
    with (
        policy_of(case, parallel) as policy,
        mock.patch.object(checkpoint, "read_metadata", counted),
        mock.patch.object(checkpoint_stream, "read_metadata", counted),
        mock.patch.object(checkpoint_stream.torch, "load", held),
    ):
        checkpoint.load_checkpoint({"policy": policy}, directory)
    return len(reads), max(most)


def test_one_rank_reads_the_description_and_each_holds_two_tensors_at_a_time(
    ranks: RankPool, saved: Any, path: str
) -> None:
    directory, _ = saved(case_of(path), "TP1")
    found = ranks.run(2, reads_of_the_description, case_of(path), {"tensor": 2}, directory)
    assert [reads for reads, _ in found] == [1, 0]
    largest = 2 * max(numel for numel in sizes_of(directory))
    assert all(0 < held <= largest for _, held in found)


def sizes_of(directory: Path) -> list[int]:
    from megatron_gspo.megatron.checkpoint_stream import DistributedReader

    reader = DistributedReader(directory)
    return [torch.Size(reader.shape(key)).numel() for key in sorted(reader.keys())]


def save_while_another_still_writes(case: Case, root: Path) -> None:
    """A save of a run that was given up, whose rank hangs in the middle of a file and goes on when the run that took
    its place has saved the same step: as on a machine that was cut off and comes back."""
    from megatron_gspo.megatron import checkpoint
    from megatron_gspo.megatron.checkpoint_files import clear_leftovers
    from megatron_gspo.megatron.checkpoint_stream import BlockWriter

    write, go, hangs = BlockWriter.tensor, threading.Event(), threading.Event()

    def slowly(*args: Any) -> None:
        hangs.set()
        go.wait(60)
        write(*args)

    with policy_of(case, {}) as policy:
        models = {"policy": policy}
        with mock.patch.object(BlockWriter, "tensor", slowly):
            given_up = checkpoint.begin_save(models, root / "outer_00002", {"by": "given up"}, background=True)
            hangs.wait(60)
        clear_leftovers(root)
        checkpoint.save_checkpoint(models, root / "outer_00002", {"by": "the one that goes on"})
        go.set()
        with contextlib.suppress(Exception):
            given_up._result()
        assert checkpoint.load_checkpoint(models, root / "outer_00002") == {"by": "the one that goes on"}


def test_a_rank_that_was_given_up_and_still_writes_does_not_touch_the_new_checkpoint(
    ranks: RankPool, path: str, tmp_path: Path
) -> None:
    ranks.run(1, save_while_another_still_writes, case_of(path), tmp_path)
