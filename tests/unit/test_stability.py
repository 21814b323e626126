"""How stable an arm is: Firth's logistic curve, its half, and what a sweep's page says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo.algorithm.stability import Half, firth, half_with_interval, halves, ratio_with_interval
from megatron_gspo.compare.plan import Request, make_plan, parse_sweep
from megatron_gspo.errors import ConfigError
from megatron_gspo.report.comparison import draw
from tests.unit.comparison_cases import make_digest, write
from tests.unit.comparison_cases import make_plan as plan_of

RATES = (1e-3, 1.22e-3, 1.48e-3, 1.81e-3, 2.2e-3)


def runs_with(
    half: float, slope: float, seeds: int, draw: int, rates: tuple[float, ...] = RATES
) -> dict[int, dict[float, bool]]:
    rng = np.random.default_rng(draw)
    chance = {rate: 1 / (1 + math.exp(-slope * math.log(rate / half))) for rate in rates}
    return {seed: {rate: bool(rng.random() < chance[rate]) for rate in rates} for seed in range(seeds)}


def test_the_curve_is_the_maximum_of_the_penalised_likelihood() -> None:
    """log L + log det(information) / 2, searched by a grid around the solution."""
    k, n, x = np.array([[0, 1, 2, 4]]), np.full((1, 4), 4.0), np.array([1.0, 1.5, 2.0, 3.0])
    a, b = (float(each[0]) for each in firth(x, k, n))

    def penalised(a: float, b: float) -> float:
        p = 1 / (1 + np.exp(-(a + b * np.log(x))))
        w = n[0] * p * (1 - p)
        z = np.log(x)
        information = np.array([[w.sum(), (w * z).sum()], [(w * z).sum(), (w * z * z).sum()]])
        return float((k[0] * np.log(p) + (n[0] - k[0]) * np.log(1 - p)).sum() + np.log(np.linalg.det(information)) / 2)

    best = penalised(a, b)
    for da, db in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (0.1, -0.2), (-0.1, 0.2)):
        assert penalised(a + da, b + db) < best


def test_it_has_a_half_where_the_plain_likelihood_has_no_maximum() -> None:
    runs = {seed: {rate: rate > 1.3e-3 for rate in RATES} for seed in range(8)}
    found = half_with_interval(runs, dict.fromkeys(runs, "one"))
    assert found.is_inside and 1.22e-3 < found.value < 1.48e-3
    assert found.low < 0.97 * found.value, "every seed says the same, and eight of them are still few"
    assert found.high > 1.03 * found.value


COVERAGE = [
    pytest.param(1.2e-3, 8.0, RATES, 60, id="60 sweeps of five values"),
    pytest.param(1.6e-3, 20.0, RATES[::2], 60, id="60 sweeps of three values"),
    *(
        pytest.param(half, slope, rates, 1000, id=f"{half}-{slope}-{len(rates)}", marks=pytest.mark.slow_suite)
        for half in (1.2e-3, 1.6e-3)
        for slope in (8.0, 20.0)
        for rates in (RATES, RATES[::2])
    ),
]


@pytest.mark.parametrize(("half", "slope", "rates", "sweeps"), COVERAGE)
def test_the_interval_holds_the_known_half_as_often_as_it_says(
    half: float, slope: float, rates: tuple[float, ...], sweeps: int
) -> None:
    inside = 0
    for draw_number in range(sweeps):
        runs = runs_with(half, slope, 8, draw_number, rates)
        found = half_with_interval(runs, {seed: seed % 4 for seed in runs})
        inside += found.low <= half <= found.high
    print(f"{inside} of {sweeps}")
    assert inside >= 0.95 * sweeps - 3 * math.sqrt(0.0475 * sweeps), f"{inside} of {sweeps} intervals of 95%"


@pytest.mark.parametrize("sweeps", [60, pytest.param(1000, marks=pytest.mark.slow_suite)])
def test_arms_that_are_alike_are_seldom_called_apart(sweeps: int) -> None:
    apart = known = 0
    for draw_number in range(sweeps):
        one, other = (runs_with(1.5e-3, 12.0, 8, 2 * draw_number + arm, RATES[::2]) for arm in (0, 1))
        found = ratio_with_interval(one, other, {seed: seed % 4 for seed in one})
        known += found is not None
        apart += found is not None and not found[1] <= 1 <= found[2]
    print(f"{apart} of {known}")
    assert known > sweeps / 2 and apart <= 0.05 * known + 3 * math.sqrt(0.0475 * known)


def test_runs_that_never_collapse_or_always_do_have_no_half_among_the_values() -> None:
    never, always = ({seed: dict.fromkeys(RATES, bad) for seed in range(8)} for bad in (False, True))
    assert math.isinf(halves(never, np.ones((1, 8)))[0])
    assert not half_with_interval(always, dict.fromkeys(always, 0)).is_inside
    assert ratio_with_interval(never, always, dict.fromkeys(never, 0)) is None


def test_a_ratio_is_of_the_seeds_that_both_have() -> None:
    one, other = runs_with(1.2e-3, 12.0, 16, 1), runs_with(1.7e-3, 12.0, 16, 2)
    found = ratio_with_interval(one, {seed: own for seed, own in other.items() if seed < 12}, dict.fromkeys(one, 0))
    assert found is not None
    value, low, high = found
    assert low <= value <= high and 0.5 < value < 0.95


def test_a_sweep_is_its_values_and_what_is_none_is_one_line() -> None:
    sweep = parse_sweep("optimizer.lr=1e-3:4e-3:3")
    assert sweep is not None and sweep.values == (1e-3, 2e-3, 4e-3)
    for text in ("optimizer.lr", "optimizer.lr=1:2", "optimizer.lr=2:1:3", "optimizer.lr=0:1:3", "train.seed=1:2:2"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_sweep(text)


def test_every_arm_is_planned_at_every_value(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('model = {path = "m"}\ndata = {path = "d"}\ntrain = {run_dir = "r"}\n')
    plan = make_plan(
        Request(config, tmp_path / "out", ("grpo", "gspo"), ("off", "r2"), 2, sweep="optimizer.lr=1e-3:2e-3:2")
    )
    assert [arm.name for arm in plan.arms][:4] == ["grpo-off-0.001", "grpo-r2-0.001", "grpo-off-0.002", "grpo-r2-0.002"]
    assert {cell.config.optimizer.lr for cell in plan.cells} == {1e-3, 2e-3} and len(plan.cells) == 16
    with pytest.raises(ConfigError, match="decided by --sweep"):
        make_plan(
            Request(config, tmp_path / "o", ("grpo",), overrides=("optimizer.lr=1",), sweep="optimizer.lr=1e-3:2e-3:2")
        )


def test_the_page_of_a_sweep_says_where_half_of_the_runs_collapse(tmp_path: Path) -> None:
    seeds, rates = range(8), (1e-3, 1.5e-3, 2e-3)
    arms = [f"{loss}-off-{rate:g}" for loss in ("grpo", "gspo") for rate in rates]
    plan = plan_of(
        ["grpo-off", "gspo-off"], list(seeds), ["a", "b"], sweep={"setting": "optimizer.lr", "values": rates}
    )
    plan["arms"] = [
        {"name": f"{loss}-off-{rate:g}", "loss": loss, "replay": "off", "family": f"{loss}-off", "value": rate}
        for loss in ("grpo", "gspo")
        for rate in rates
    ]

    def falls(step: int) -> float:
        return 0.8 if step < 6 else 0.1

    digests = []
    for arm in arms:
        loss, _, rate = arm.split("-")
        for seed in seeds:
            falling = float(rate) > (1.2e-3 if loss == "grpo" else 1.7e-3)
            digest = make_digest(f"{loss}-off", seed, "ab"[seed % 2], 0.8, falls if falling else None)
            digest["cell"]["arm"] = arm
            digests.append(digest)
    out = write(tmp_path / "sweep", plan, digests)
    draw(out)
    result = json.loads((out / "comparison.json").read_text())
    grpo, gspo = result["stability"]["families"]
    assert grpo["counts"] == [[1e-3, 0, 8], [1.5e-3, 8, 8], [2e-3, 8, 8]]
    assert 1e-3 < grpo["half"]["value"] < 1.5e-3 < gspo["half"]["value"] < 2e-3
    (ratio,) = result["stability"]["ratios"]
    assert ratio["name"] == "gspo-off / grpo-off" and ratio["low"] > 1
    assert any("half of its runs collapse at" in text for text in result["shows"])
    page = (out / "report.html").read_text()
    assert "Collapse by optimizer.lr" in page and "no intervals" not in page


def test_a_half_that_lies_beyond_the_values_is_no_number() -> None:
    assert not Half(3e-3, 2e-3, 4e-3, 1e-3, 2.2e-3).is_inside
