"""The benchmarks' arithmetic and what their commands print."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_gspo.bench import packing, sync
from megatron_gspo.bench.logprobs import Settings, ratios
from megatron_gspo.bench.logprobs import run as run_logprobs
from megatron_gspo.bench.measure import PeakMemory, Spread
from megatron_gspo.cli import main
from megatron_gspo.errors import ConfigError


def test_a_ratio_is_of_runs_of_the_same_turn_against_the_faster_way_to_run_the_products() -> None:
    samples = {
        "ours": [(1.0, 1.0, 2.0, 10), (5.0, 5.0, 2.2, 11), (1.0, 2.0, 2.4, 12)],
        "matmuls": [(1.0, 3.0, 2.0, 9), (5.0, 3.0, 2.0, 9), (1.0, 2.0, 2.0, 9)],
        "matmuls-tiled": [(0.5, 0.5, 4.0, 3), (10.0, 10.0, 4.0, 3), (2.0, 0.0, 4.0, 3)],
    }
    alone = {"full-logits": [(0.0, 0.0, 0.0, 480)]}
    found = ratios(4096, 2, samples, {(4096, 1): alone})
    assert found["time"] == 1.5  # of 2 / 1, 10 / 8, 3 / 2
    assert found["cpu_time"] == pytest.approx(1.1)
    assert found["memory"] == 2 * 12 / 480


def test_ours_alone_is_held_against_nothing() -> None:
    assert ratios(32768, 1, {"ours": [(1.0, 1.0, 2.0, 10)]}, {}) == {}


def test_a_spread_is_the_median_between_the_extremes() -> None:
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)


def test_peak_memory_sees_what_was_freed_again() -> None:
    memory = PeakMemory(torch.device("cpu"))
    for _ in range(2):
        torch.ones(25_000_000)  # 100 MB of float32
    assert 95e6 < memory.read() < 110e6


def test_sizes_that_ranks_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 tensor ranks do not divide 151935"):
        run_logprobs(Settings(tokens=(1024,), vocab=151_935))


def test_a_size_of_zero_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["logprobs", "--tokens", "0"], ["packing", "--ranks", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", *arguments])
        assert "0 is not positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sync", "--methods", "disk", "pigeon"], "--methods pigeon: there are disk, tensor, distributed, ipc"),
        (["experts", "--widths", "64", "3"], "--widths 3: an expert is half as wide, so choose an even one"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is_started(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_bench_logprobs_prints_a_line_a_head_and_what_it_is_held_against(capfd: pytest.CaptureFixture[str]) -> None:
    sizes = "--tokens 8 --ranks 1 --vocab 64 --hidden 8 --repetitions 1"
    assert main(["bench", "logprobs", *sizes.split()]) == 0
    out = capfd.readouterr().out
    heads = ["ours", "matmuls", "matmuls-tiled", "full-logits", "megatron"]
    assert [line.split()[2] for line in out.splitlines() if line.startswith("      8     1  ")] == heads
    assert "8 tokens, 1 rank(s): " in out.splitlines()[-1] and "aim: at most" in out


def test_bench_logprobs_prints_every_head_at_every_size_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    sizes = "--tokens 8 --alone 16 --ranks 1 2 --vocab 64 --hidden 8 --repetitions 2 --json"
    assert main(["bench", "logprobs", *sizes.split()]) == 0
    result = json.loads(capfd.readouterr().out)
    rows = {(row["tokens"], row["ranks"], row["head"]): row for row in result["rows"]}
    on_two = ["ours", "matmuls", "matmuls-tiled", "megatron"]
    on_one = [*on_two, "full-logits"]
    assert set(rows) == (
        {(8, 1, head) for head in on_one} | {(8, 2, head) for head in on_two} | {(16, n, "ours") for n in (1, 2)}
    )
    assert rows[8, 2, "ours"]["repetitions"] == 2 and rows[16, 2, "ours"]["repetitions"] == 1
    assert all(0 < row["forward_s"]["smallest"] <= row["forward_s"]["largest"] for row in rows.values())
    assert [(ratio["tokens"], ratio["ranks"]) for ratio in result["ratios"]] == [(8, 1), (8, 2)]
    assert result["machine"]["device"] and result["machine"]["threads_per_rank"] == 1


@pytest.mark.parametrize("name", list(packing.MIXES))
def test_a_mix_is_the_same_for_a_seed_and_never_empty(name: str) -> None:
    first, second = (packing.MIXES[name](np.random.default_rng(7), 1000) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.min() >= 1 and len(np.unique(first)) > 100


def test_bounds_are_those_of_a_problem_solved_by_hand() -> None:
    lengths = np.array([60, 60, 60, 20])
    cost, microbatches = packing.lower_bounds(lengths, token_budget=100, num_ranks=2)
    assert cost == pytest.approx((200 + packing.ATTENTION_COST * (3 * 3600 + 400)) / 2)
    assert microbatches == 2  # three above half the budget, over two ranks


def test_bench_packing_prints_each_mix_and_size_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "packing", "--sequences", "3000", "--ranks", "1", "8", "--repetitions", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert {(row["mix"], row["ranks"]) for row in result["rows"]} == {(m, n) for m in packing.MIXES for n in (1, 8)}
    for row in result["rows"]:
        assert 0 < row["ms"]["smallest"] <= row["ms"]["median"] <= row["ms"]["largest"]
        assert 1 - 1e-12 <= row["heaviest_rank"] <= 1.02
        assert 1 <= row["microbatches"] <= 1.05


def test_bench_experts_times_every_form_in_turns_and_marks_the_one_that_a_run_takes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["--widths", "16", "32", "--experts", "2", "--rows", "2", "--repetitions", "2"]
    assert main(["bench", "experts", *words, "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert {(row["width"], row["form"]) for row in rows} == {
        (width, form) for width in (16, 32) for form in ("grouped_mm", "loop", "sequential")
    }
    assert all(0 < row["ms"]["smallest"] <= row["ms"]["median"] <= row["ms"]["largest"] for row in rows)
    assert [row["width"] for row in rows if row["chosen"]] == [16, 32]
    assert main(["bench", "experts", *words]) == 0
    table = capfd.readouterr().out
    assert table.count("  chosen") == 2 and "2 experts of 2 tokens, float32" in table


def test_a_sync_s_ratio_is_of_the_broadcast_in_the_same_turn() -> None:
    def turn(bare: float, mine: float) -> sync.Turn:
        return {"broadcast": sync.Sample(bare, bare / 2, 0, 7), "disk": sync.Sample(mine, mine, 5, 6)}

    row = sync.row("disk", [turn(1.0, 2.0), turn(4.0, 4.0), turn(3.0, 4.0)], size=800)
    assert row["seconds"] == {"median": 4.0, "smallest": 2.0, "largest": 4.0}
    assert row["bytes_per_s"] == 200.0
    assert row["ratio"] == {"median": 0.75, "smallest": 0.5, "largest": 1.0}
    assert row["cpu_ratio"]["median"] == 0.375
    assert (row["trainer_bytes"], row["server_bytes"]) == (5, 6)


def test_processor_time_below_a_tick_of_the_clock_is_no_division_by_zero() -> None:
    turn = {"broadcast": sync.Sample(0.1, 0.02, 0, 0), "ipc": sync.Sample(0.1, 0.0, 0, 0)}
    assert sync.row("ipc", [turn], size=8)["cpu_ratio"]["median"] == pytest.approx(2.0)
    assert sync.row("broadcast", [turn | {"broadcast": turn["ipc"]}], size=8)["cpu_ratio"]["median"] == 1.0


def test_a_bare_broadcast_waits_until_every_byte_is_there() -> None:
    weights = {"a": torch.ones(300_000), "b": torch.ones(300_000)}
    with sync.BareBroadcast(weights, bucket_mb=2) as bare:
        for _ in range(3):
            bare.send()
