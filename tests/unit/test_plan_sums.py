"""``plan``: sizes, operations, bytes and seconds against values worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.config import ParallelConfig
from megatron_gspo.doctor.served import cache_per_token
from megatron_gspo.doctor.tensors import elements_of_stage
from megatron_gspo.errors import ConfigError
from megatron_gspo.plan import published, rates
from megatron_gspo.plan.estimates import Range, total
from megatron_gspo.plan.flops import forward, training
from megatron_gspo.plan.models import Model, find_model, names
from megatron_gspo.plan.rates import GPUS
from megatron_gspo.plan.serving import Servers, decode_seconds, rollout_seconds, weights_per_card
from megatron_gspo.plan.training import Trainer, balance, busy, gradients, links, optimizer, pass_seconds
from megatron_gspo.plan.workload import Workload

H100 = GPUS["h100-80"]
WORK = Workload(64, 16, 1024, 7168, 256, 3584, 4)


@pytest.fixture(scope="module")
def moe() -> Model:
    return find_model("qwen3-30b-a3b")


# -------------------------------------------------------------------------------------------------- models


def test_published_shapes_have_the_numbers_of_parameters_of_their_names():
    """Billions, as the models' cards say them."""
    cards = {"qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-8b": 8.2, "qwen3-14b": 14.8, "qwen3-32b": 32.8}
    cards |= {"qwen3-4b": 4.0, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235, "moonlight-16b-a3b": 16}
    cards |= {"deepseek-v3": 671}
    assert set(cards) == set(names())
    for name, billions in cards.items():
        assert find_model(name).parameters / 1e9 == pytest.approx(billions, rel=0.02), name


def test_a_directory_a_config_json_and_a_name_are_the_same_model(tmp_path: Path, moe: Model):
    (tmp_path / "config.json").write_text(json.dumps(dict(moe.config)))
    for text in (str(tmp_path), str(tmp_path / "config.json"), "Qwen/Qwen3-30B-A3B"):
        assert find_model(text).shape == moe.shape
    assert find_model(str(tmp_path / "config.json")).path == str(tmp_path)
    assert moe.path == "Qwen/Qwen3-30B-A3B"


@pytest.mark.parametrize(
    ("text", "said"),
    [("qwen3-30b", "did you mean qwen3-"), ("xyzzy", "known names: qwen3-0.6b"), ("Qwen/nothing-like", "known names")],
)
def test_a_name_that_is_none_brings_those_that_are(text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        find_model(text)


def test_merged_tensors_give_a_rank_the_same_elements(moe: Model):
    for parallel in (ParallelConfig(tensor=4, expert=8, data=2), ParallelConfig(pipeline=8, expert=2, data=2)):
        for stage in (0, parallel.pipeline - 1):
            whole = elements_of_stage(moe.every, moe.shape, parallel, stage)
            assert elements_of_stage(moe.tensors, moe.shape, parallel, stage) == whole


# ------------------------------------------------------------------------------------------------ operations


def test_operations_of_a_token_of_the_30b_by_hand(moe: Model):
    """A layer: attention 2 x 2048 x (32 + 32) x 128 + 2 x 2048 x 4 x 128 elements, a router of 2048 x 128, eight
    experts of 3 x 2048 x 768. A head of 151,936 x 2048. Scores and sums over 1,000 tokens: 1000 x 32 x 256 a layer."""
    once = forward(moe, 1000.0)
    attention = 2048 * 128 * (32 + 32) + 2 * 2048 * 4 * 128
    assert once.dense == 2 * 48 * (attention + 2048 * 128)
    assert once.experts == 2 * 48 * 8 * 3 * 2048 * 768
    assert once.head == 2 * 151_936 * 2048
    assert once.attention == 48 * 1000 * 32 * 256
    assert moe.matrices.active == pytest.approx(3.04e9, rel=0.01)


def test_training_takes_three_forwards_and_recompute_a_fourth(moe: Model):
    once = forward(moe, 4096.0)
    products = once.dense + once.experts
    plain = 3 * products + 3.5 * once.attention + 4 * once.head
    assert training(once) == pytest.approx(plain)
    assert training(once, "full") == pytest.approx(plain + products + once.attention)
    assert training(once, "selective") == pytest.approx(plain + once.experts)
    assert training(once, frozen=True) == pytest.approx(plain - products - once.head)


def test_longer_sequences_of_the_same_mean_cost_more_attention():
    """E[n^2] of lengths spread from 0 to twice the mean is 4/3 of the mean's square; of equal ones it is that."""
    even, equal = Workload(1, 2, 1, 2000, 1, 1000, 1), Workload(1, 2, 1, 1000, 1, 1000, 1)
    assert even.square_length == pytest.approx(1 + 2000 + 4 / 3 * 1e6)
    assert equal.square_length == pytest.approx(1001.0**2)
    assert even.running(1000) == pytest.approx(0.5) and equal.running(999) == 1.0


def test_a_mean_above_the_longest_is_refused():
    with pytest.raises(ConfigError, match="mean response of 11 tokens"):
        Workload(1, 2, 8, 10, 8, 11, 1)


# --------------------------------------------------------------------------------------------------- servers


def test_keys_and_values_of_a_token_by_hand(moe: Model):
    """48 layers x 4 heads x 128 x (key and value) x 2 bytes; at eight cards heads are repeated; latent attention keeps
    512 + 64 numbers in 27 layers, on every card."""
    assert cache_per_token(moe.shape, 1) == 48 * 4 * 128 * 2 * 2 == 98_304
    assert cache_per_token(moe.shape, 4) == cache_per_token(moe.shape, 8) == 98_304 // 4
    moonlight = find_model("moonlight-16b-a3b").shape
    assert cache_per_token(moonlight, 1) == cache_per_token(moonlight, 8) == 27 * 576 * 2


def test_a_decoding_step_by_hand():
    """Qwen3-8B alone on a card: 7.57 B elements are read, and 1,000 tokens of 36 x 8 x 128 x 4 bytes each."""
    model = find_model("qwen3-8b")
    read = 2 * model.matrices.active / (0.85 * 3.35e12)
    cache = 36 * 8 * 128 * 4 * 1000 / (0.9 * 3.35e12)
    products = 2 * model.matrices.active / (0.6 * 989e12)
    assert decode_seconds(model, H100, Servers(1, 1), 1, 1000) == pytest.approx(
        read + cache + products + 36 * 7e-5 + 6e-5
    )


def test_a_batch_reads_the_experts_that_it_touches(moe: Model):
    """One token touches 8 of 128, and a thousand all of them."""
    one, many = (decode_seconds(moe, H100, Servers(1, 1), batch, 1e-9) for batch in (1, 1000))
    experts = 2 * moe.matrices.experts / (0.85 * 3.35e12)
    per_token = 999 * (2 * moe.matrices.active / (0.6 * 989e12) + 6e-5)
    assert many - one - per_token == pytest.approx(experts * (1 - 8 / 128), rel=1e-6)


def test_a_rollout_ends_with_its_longest_response(moe: Model):
    """A single response of one length takes its tokens' steps; waiting ones take their turn."""
    work = Workload(1, 1, 1, 1000, 1, 1000, 1)
    alone = rollout_seconds(moe, H100, Servers(1, 4), work, 100, False)
    steps = [decode_seconds(moe, H100, Servers(1, 4), 1, 1 + token) for token in range(1000)]
    assert alone.mid == pytest.approx(sum(steps), rel=1e-3)
    several = Workload(8, 1, 1, 1000, 1, 1000, 1)
    turns = rollout_seconds(moe, H100, Servers(1, 4), several, 1, False)
    assert turns.mid == pytest.approx(8 * alone.mid, rel=1e-3)


def test_more_servers_are_never_slower(moe: Model):
    times = [rollout_seconds(moe, H100, Servers(count, 2), WORK, 64, False).mid for count in (1, 2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)


def test_weights_are_shared_out_over_a_servers_cards(moe: Model):
    assert weights_per_card(moe, Servers(1, 4)) == moe.parameters * 2 // 4


# --------------------------------------------------------------------------------------------------- trainer


def trainer(gpus: int = 8, tokens: int = 8192, recompute: str = "off", **parallel: int) -> Trainer:
    return Trainer(ParallelConfig(**parallel), gpus, 8, tokens, recompute)


def test_a_pass_of_one_dense_rank_by_hand():
    """Operations over the peak's share, and 28 layers' waiting for each of four mini-batches' micro-batches."""
    model = find_model("qwen3-0.6b")
    work = Workload(4, 2, 1, 1000, 1, 1000, 4)
    alone = trainer(1, 1001)
    assert alone.microbatches(work) == 2 and busy(alone, work) == balance(model, alone.parallel) == 1.0
    seconds = training(forward(model, 1001.0, work.square_length)) * 8 * 1001 / (0.38 * 989e12)
    got = pass_seconds(model, H100, alone, work, backward=True).mid
    assert got == pytest.approx(seconds + 4 * 2 * 28 * 3 * 2e-4)


def test_a_pipeline_waits_at_both_ends():
    """m / (m + p - 1), and with v virtual stages m / (m + (p - 1) / v)."""
    work = Workload(16, 16, 1, 1000, 1, 1000, 4)
    plain = trainer(4, 1001, pipeline=4, data=1)
    assert plain.microbatches(work) == 64 and busy(plain, work) == 64 / 67
    assert busy(trainer(4, 1001, pipeline=4, virtual_pipeline=2, data=1), work) == 64 / 65.5


def test_a_pipeline_goes_at_the_pace_of_its_slowest_stage(moe: Model):
    """The head is worth 5.5 layers of the 30B: eight stages of six layers wait for the last one."""
    layer = (moe.matrices.active - moe.matrices.head) / 48
    mean = (48 * layer + moe.matrices.head) / 8
    assert balance(moe, ParallelConfig(pipeline=8)) == pytest.approx(mean / (6 * layer + moe.matrices.head))


def test_bytes_of_experts_by_hand(moe: Model):
    """Eight copies of 2,048 numbers, there and back in 48 layers, 7/8 of them to other ranks, over NVLink on one node;
    over two nodes half of the ranks are away."""
    one = links(moe, H100, trainer(8, expert=8), WORK)
    size = 2 * 8 * 2048 * 2 * 48 * WORK.tokens / 8 * 7 / 8
    assert one.mid == pytest.approx(size / (0.7 * 450e9))
    two = links(moe, H100, trainer(16, expert=16), WORK)
    size = 2 * 8 * 2048 * 2 * 48 * WORK.tokens / 16 * 15 / 16
    assert two.mid == pytest.approx(size / 2 / (0.7 * 450e9) + size / 2 / (0.7 * 50e9))


def test_a_step_moves_tokens_there_back_and_once_more_with_recompute(moe: Model):
    """What an NVLink without end would save: a forward's exchange, two of a step, three with recompute."""
    endless = dataclasses.replace(H100, nvlink_gb=1e15)
    moved = links(moe, H100, trainer(8, expert=8), WORK).mid
    for times, backward, recompute in ((1, False, "off"), (2, True, "off"), (3, True, "full")):
        ranks = trainer(8, 8192, recompute, expert=8)
        with_it, without = (pass_seconds(moe, gpu, ranks, WORK, backward=backward).mid for gpu in (H100, endless))
        assert with_it - without == pytest.approx(times * moved)


def test_gradients_that_hide_behind_backward_take_no_time(moe: Model):
    long, none = Range(1e3, 1e3, 1e3), Range(0.0, 0.0, 0.0)
    assert gradients(H100, trainer(8, expert=8), WORK, 10**9, 10**9, long).mid == 0.0
    exposed = gradients(H100, trainer(8, expert=8), WORK, 10**9, 10**9, none).mid
    assert exposed == pytest.approx(4 * 6 * 1e9 * 7 / 8 / (0.7 * 450e9))  # experts lie once: nothing to reduce


def test_states_in_host_memory_cross_the_bus_twice():
    assert optimizer(H100, WORK, 10**9, offloaded=True).mid == pytest.approx(4 * 2e9 / (0.7 * 64e9))
    assert optimizer(H100, WORK, 10**9, offloaded=False).mid == pytest.approx(4 * 2e9 / (0.7 * 3.35e12))


def test_more_ranks_are_never_slower_at_the_same_layout(moe: Model):
    for layout in ({"expert": 8}, {"tensor": 2, "expert": 8}, {"pipeline": 4, "expert": 2}):
        times = [
            pass_seconds(moe, H100, trainer(gpus, **layout), WORK, backward=True).mid for gpus in (8, 16, 32, 64, 128)
        ]
        assert times == sorted(times, reverse=True), layout


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(GPUS)), st.sampled_from(["tflops", "nvlink_gb", "network_gb"]), st.floats(1.1, 4))
def test_a_faster_gpu_is_never_slower(name: str, what: str, factor: float):
    gpu = GPUS[name]
    faster = dataclasses.replace(gpu, **{what: factor * getattr(gpu, what)})
    model = find_model("qwen3-0.6b")
    for backward in (False, True):
        before, after = (
            pass_seconds(model, card, trainer(16, tensor=2), WORK, backward=backward) for card in (gpu, faster)
        )
        assert after.low <= before.low and after.mid <= before.mid and after.high <= before.high


def test_every_range_is_in_order(moe: Model):
    parts = [
        rollout_seconds(moe, gpu, Servers(2, 4), WORK, 64, False)
        + pass_seconds(moe, gpu, trainer(8, expert=8), WORK, backward=True)
        for gpu in GPUS.values()
    ]
    assert all(0 < part.low < part.mid < part.high for part in parts)
    assert total({"a": Range(1, 2, 3), "b": Range(1, 1, 1)}) == Range(2, 3, 4)


# -------------------------------------------------------------------------------------------- published times


def test_every_source_is_named():
    shares = [value for value in vars(rates).values() if isinstance(value, rates.Share)]
    assert len(shares) > 8 and all(share.source for share in shares)
    assert all(gpu.source and prod((gpu.tflops, gpu.hbm_tb, gpu.nvlink_gb, gpu.network_gb)) for gpu in GPUS.values())


def test_predictions_are_as_far_from_published_times_as_the_docs_say():
    """By kind, the factor on average; whoever changes a rate sees here what it does."""
    rows = published.compared()
    off = {
        kind: published.factor_off([row for row in rows if row.point.kind == kind])
        for kind in ("step", "training", "decoding")
    }
    assert off["step"] < 1.25 and off["decoding"] < 1.25
    assert 2.2 < off["training"] < 3.2  # the fastest published trainers, which exchange tokens otherwise
    steps = [row for row in rows if row.point.kind == "step"]
    assert len(steps) == 5 and all(row.inside for row in steps)


def test_decoding_on_an_h100_is_within_a_quarter():
    rows = [row for row in published.compared() if "H100, batch" in row.point.name]
    assert len(rows) == 12 and all(1 / 1.27 < row.ratio < 1.27 for row in rows)
