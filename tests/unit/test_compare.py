"""The plan of a comparison: its matrix, what each cell runs, and what is the same comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_gspo.cli import _parse
from megatron_gspo.commands.compare import _clock, _request
from megatron_gspo.compare.cell import add_up
from megatron_gspo.compare.directory import open_directory
from megatron_gspo.compare.plan import Arm, Plan, Request, agree, make_plan
from megatron_gspo.compare.run import Outcome, Queue, Stop, Worker, choose_jobs
from megatron_gspo.errors import ConfigError, EngineUnavailableError

TOML = """
[model]
path = "moe"
[data]
path = "prompts.jsonl"
[algorithm]
name = "gspo"
clip_low = 1e-3
clip_high = 1.5e-3
[train]
run_dir = "anywhere"
save_hf = true
"""


@pytest.fixture
def request_of(tmp_path: Path) -> Any:
    (tmp_path / "c.toml").write_text(TOML)

    def make(**settings: Any) -> Request:
        asked = {"losses": ("grpo", "gspo"), "replay": ("off", "r2"), "seeds": 2} | settings
        return Request(config=tmp_path / "c.toml", out=tmp_path / "out", **asked)

    return make


def finish(cell: Any) -> None:
    cell.digest_file.parent.mkdir(parents=True, exist_ok=True)
    cell.digest_file.write_text("{}")


def test_cells_are_the_product_of_losses_replay_modes_and_seeds_and_come_seed_by_seed(request_of: Any) -> None:
    plan = make_plan(request_of(first_seed=3))
    arms = ["grpo-off", "grpo-r2", "gspo-off", "gspo-r2"]
    assert [arm.name for arm in plan.arms] == arms
    assert [(cell.arm.name, cell.seed) for cell in plan.cells] == [(arm, seed) for seed in (3, 4) for arm in arms]
    for cell in plan.cells:
        config = cell.config
        assert (config.algorithm.name, config.replay.mode) == (cell.arm.loss, cell.arm.replay)
        assert config.train.seed == cell.seed
        assert config.train.run_dir == str(plan.out / "cells" / cell.arm.name / f"seed_{cell.seed:03d}")
        assert (config.train.save_hf, config.train.resume, config.train.overwrite) == (False, True, False)


def test_arms_differ_in_what_they_are_named_for_and_in_nothing_else(request_of: Any) -> None:
    first, *others = make_plan(request_of(seeds=1)).cells
    for cell in others:
        own = cell.config.model_dump()
        own["train"]["run_dir"] = first.config.train.run_dir
        own["algorithm"], own["replay"] = first.config.algorithm.model_dump(), first.config.replay.model_dump()
        assert own == first.config.model_dump()


def test_a_clip_range_belongs_to_the_loss_that_the_file_names_or_the_override_is_for(request_of: Any) -> None:
    def ranges(**settings: Any) -> list[tuple[float, float]]:
        return [cell.config.algorithm.clip_range() for cell in make_plan(request_of(seeds=1, **settings)).cells[::2]]

    assert ranges() == [(0.2, 0.27), (1e-3, 1.5e-3)]
    assert ranges(overrides=("gspo:algorithm.clip_low=2e-3", "grpo:algorithm.clip_high=0.3")) == [
        (0.2, 0.3),
        (2e-3, 1.5e-3),
    ]
    plan = make_plan(request_of(overrides=("optimizer.lr=2e-3",)))
    assert {cell.config.optimizer.lr for cell in plan.cells} == {2e-3}
    assert plan.record["arms"][0]["settings"] == {
        "algorithm.name": "grpo",
        "replay.mode": "off",
        "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.27,
    }


def test_seed_i_starts_from_cold_start_i_round_and_round_in_every_arm(request_of: Any) -> None:
    plan = make_plan(request_of(seeds=5, first_seed=1, cold_starts=("a", "b", "c"), dense_twins=("x", "y")))
    moe = {(cell.seed, cell.cold_start) for cell in plan.cells if not cell.arm.dense}
    assert moe == {(1, "b"), (2, "c"), (3, "a"), (4, "b"), (5, "c")}
    dense = {(cell.seed, cell.cold_start) for cell in plan.cells if cell.arm.dense}
    assert dense == {(1, "y"), (2, "x"), (3, "y"), (4, "x"), (5, "y")}
    assert all(cell.config.model.path == cell.cold_start for cell in plan.cells)


def test_a_dense_twin_is_an_arm_a_loss_without_replay_and_without_noise_on_routers(request_of: Any) -> None:
    plan = make_plan(request_of(dense_twins=("x",), overrides=("sync.router_noise=0.02",)))
    assert [arm for arm in plan.arms if arm.dense] == [Arm("grpo", "off", dense=True), Arm("gspo", "off", dense=True)]
    for cell in plan.cells:
        assert cell.config.sync.router_noise == (0.0 if cell.arm.dense else 0.02)
    (settings,) = [arm["settings"] for arm in plan.record["arms"] if arm["name"] == "grpo-dense"]
    assert settings["sync.router_noise"] == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"losses": ("gspo", "sft")}, "--losses gspo,sft: name each of"),
        ({"losses": ("gspo", "gspo")}, "at most once"),
        ({"replay": ("off", "r4")}, "--replay off,r4: name each of off, r2, r3"),
        ({"seeds": 0}, "--seeds 0"),
        ({"overrides": ("train.seed=3",)}, "decided by --seeds"),
        ({"overrides": ("model.path=other",), "cold_starts": ("a",)}, "decided by --cold-start"),
        ({"overrides": ("gspo:replay.mode=r2",)}, "decided by --replay"),
        ({"overrides": ("ppo:optimizer.lr=1e-3",)}, "--losses grpo,gspo has no ppo"),
        ({"overrides": ("gspo:algorithm.clip_low=0.2",)}, "arm gspo-off: seed 0: .*allow_wide_clip"),
        ({"overrides": ("gspo:optimizer.lrr=1",)}, "arm gspo-off: seed 0: unknown setting optimizer.lrr"),
        ({"overrides": ("train.minibatches=3",)}, "not a multiple of train.minibatches"),
    ],
)
def test_what_no_cell_could_run_is_refused_before_anything_starts(request_of: Any, settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(request_of(**settings))


def test_the_same_comparison_goes_on_and_takes_more_seeds(request_of: Any) -> None:
    with open_directory(make_plan(request_of(seeds=2))):
        pass
    plan = make_plan(request_of(seeds=2, first_seed=5, overrides=("rollout.retries=9",)))
    path = plan.out / "compare.json"
    created = json.loads(path.read_text())["created"]
    with open_directory(plan):
        record = json.loads(path.read_text())
    assert record["seeds"] == [0, 1, 5, 6]
    assert record["created"] == created
    assert record["hardware"]["cores"] >= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overrides": ("optimizer.lr=2e-3",)}, r"optimizer.lr was 1e-06 and is 0.002\. Set them back"),
        ({"overrides": ("gspo:algorithm.clip_low=2e-3",)}, r"gspo-off: algorithm.clip_low was 0.001 and is 0.002"),
        ({"replay": ("off",)}, r"replay was \['off', 'r2'\] and is \['off'\]"),
        ({"cold_starts": ("a", "b")}, r"cold_starts was \['moe'\] and is \['a', 'b'\]"),
        ({"dense_twins": ("x",)}, r"dense_twins was \[\] and is \['x'\]"),
        ({"overrides": ("sync.router_noise=0.1",)}, r"sync.router_noise was 0.0 and is 0.1"),
    ],
)
def test_another_comparison_in_the_same_directory_is_refused_with_what_differs(
    request_of: Any, settings: Any, words: str
) -> None:
    with open_directory(make_plan(request_of())):
        pass
    before = (make_plan(request_of()).out / "compare.json").read_bytes()
    with (
        pytest.raises(ConfigError, match=f"holds another comparison.*{words}"),
        open_directory(make_plan(request_of(**settings))),
    ):
        pass
    assert (make_plan(request_of()).out / "compare.json").read_bytes() == before


def test_a_setting_that_is_younger_than_the_comparison_had_its_default(request_of: Any) -> None:
    plan = make_plan(request_of())
    older = copy.deepcopy(plan.record)
    del older["config"]["sync"]["router_noise"]
    agree(plan, older)
    noisy = make_plan(request_of(overrides=("sync.router_noise=0.1",)))
    with pytest.raises(ConfigError, match=r"sync.router_noise was 0.0 and is 0.1"):
        agree(noisy, older)


@pytest.mark.parametrize("spoiled", [{"config": 3}, {"arms": [{}]}, {"versions": "old"}, {"arms": 7}])
def test_a_plan_that_is_none_is_one_line(request_of: Any, spoiled: dict[str, Any]) -> None:
    plan = make_plan(request_of())
    with pytest.raises(ConfigError, match=r"compare\.json is no comparison's plan"):
        agree(plan, plan.record | spoiled)


def test_a_setting_that_is_gone_is_another_comparison(request_of: Any) -> None:
    plan = make_plan(request_of())
    older = copy.deepcopy(plan.record)
    older["config"]["sync"]["compress"] = "zstd"
    with pytest.raises(ConfigError, match=r"sync.compress was 'zstd' and is None"):
        agree(plan, older)


def test_other_versions_are_another_comparison(request_of: Any) -> None:
    plan = make_plan(request_of())
    agree(plan, plan.record)
    other = plan.record | {"versions": plan.record["versions"] | {"megatron-core": "0.1"}}
    with pytest.raises(ConfigError, match=r"versions\.megatron-core was '0\.1'"):
        agree(plan, other)


def test_a_comparison_that_is_kept_in_one_file_is_not_run_on(request_of: Any) -> None:
    """Its cells would be run again: what is finished is told by their own files."""
    plan = make_plan(request_of())
    with open_directory(plan):
        pass
    (plan.out / "cells.jsonl").touch()
    with pytest.raises(ConfigError, match=r"kept in cells\.jsonl.*--redraw .* draws its page"), open_directory(plan):
        pass


def test_one_process_writes_a_comparison_and_nothing_else_lies_in_its_directory(request_of: Any) -> None:
    plan = make_plan(request_of())
    with open_directory(plan), pytest.raises(ConfigError, match="written by another process"), open_directory(plan):
        pass
    (plan.out / "compare.json").rename(plan.out / "notes.txt")
    with pytest.raises(ConfigError, match="holds something else than a comparison"), open_directory(plan):
        pass


def test_settings_may_stand_behind_any_option(tmp_path: Path) -> None:
    words = "compare c.toml a.b=1 --losses grpo,gspo --cold-start x y gspo:c.d=2 --dense-twin z e.f=3 --out o g.h=4"
    request = _request(_parse(words.split()))
    assert (request.cold_starts, request.dense_twins) == (("x", "y"), ("z",))
    assert set(request.overrides) == {"a.b=1", "gspo:c.d=2", "e.f=3", "g.h=4"}


def test_a_worker_takes_cells_that_its_server_fits_first(request_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gspo.compare.run.server_key", lambda plan, cell: "dense" if cell.arm.dense else "moe")
    queue = Queue(make_plan(request_of(dense_twins=("x",), replay=("off",))))
    keys: Any = (None, "dense", "dense", "moe")
    names = [queue.take(key).name for key in keys]  # type: ignore[union-attr]
    assert names == ["grpo-off, seed 0", "grpo-dense, seed 0", "gspo-dense, seed 0", "gspo-off, seed 0"]
    assert len([queue.take(None) for _ in range(4)]) == 4
    assert queue.take(None) is None


class Processes:
    """Stands in for processes: a cell's end is what ``ends`` says of it, at once."""

    def __init__(self, ends: Any) -> None:
        self.ends, self.started = ends, list[str]()

    def start(self, cell: Any, urls: tuple[str, ...], key: str | None, placement: Any) -> Any:
        self.started.append(cell.name)
        status = self.ends(cell)
        if status == 0:
            finish(cell)
        else:
            cell.log_file.parent.mkdir(parents=True, exist_ok=True)
            cell.log_file.write_text("starts\nerror: the reward failed\n")
        return SimpleNamespace(join=lambda: None, exitcode=status)


def work(plan: Plan, processes: Processes, stop: Stop) -> list[Outcome]:
    outcomes: list[Outcome] = []
    worker = Worker(plan, Queue(plan), processes, stop, outcomes.append, device="cpu", urls=("http://a",))  # type: ignore[arg-type]
    worker.start()
    worker.join(timeout=60)
    assert worker.failure is None
    return outcomes


def test_a_failed_cell_is_named_with_its_error_and_the_others_go_on(request_of: Any) -> None:
    plan = make_plan(request_of())
    outcomes = work(plan, Processes(lambda cell: int(cell.name == "grpo-r2, seed 0")), Stop())
    assert [outcome.cell for outcome in outcomes] == list(plan.cells)
    errors = {outcome.cell.name: outcome.error for outcome in outcomes if outcome.error}
    assert list(errors) == ["grpo-r2, seed 0"]
    assert errors["grpo-r2, seed 0"].startswith("the reward failed (exit status 1; ")


def test_a_finished_cell_is_not_run_again_and_a_stop_leaves_the_rest(request_of: Any) -> None:
    plan, stop = make_plan(request_of()), Stop()
    finish(plan.cells[1])
    processes = Processes(lambda cell: stop.ask() or 0 if cell.seed == 1 else 0)
    work(plan, processes, stop)
    assert processes.started == ["grpo-off, seed 0", "gspo-off, seed 0", "gspo-r2, seed 0", "grpo-off, seed 1"]
    again = Processes(lambda cell: 0)
    work(plan, again, Stop())
    assert again.started == ["grpo-r2, seed 1", "gspo-off, seed 1", "gspo-r2, seed 1"]


class Servers:
    """Stands in for local servers, which take 20 s to start."""

    started: list[str] = []  # noqa: RUF012

    def __init__(self, config: Any, model: str, logs: Path, *, device: str, dtype: str, routes: bool, **_: Any) -> None:
        self.started.append(f"{model} {dtype}" + " with routes" * routes)
        self.urls, self.dead, self.running = ("http://a",), False, False

    def __enter__(self) -> None:
        self.running = True

    def check(self) -> None:
        if self.dead:
            raise EngineUnavailableError("gone")

    def stop(self) -> None:
        self.running = False


def test_a_server_serves_cells_of_one_architecture_until_it_dies(
    request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Servers, "started", [])
    monkeypatch.setattr("megatron_gspo.compare.run.local_servers", lambda config: Servers)
    monkeypatch.setattr(
        "megatron_gspo.compare.run._shape", lambda model: SimpleNamespace(num_experts="dm".index(model[0]))
    )
    starts = {"cold_starts": ("m0", "m1"), "dense_twins": ("d0",)}
    plan = make_plan(request_of(**starts, overrides=("rollout.engine_dtype=bfloat16", "replay.engine_routes_every=2")))
    said: list[str] = []
    worker = Worker(plan, Queue(plan), None, Stop(), print, device="cpu", say=said.append)  # type: ignore[arg-type]
    cells = {cell.name: cell for cell in plan.cells}
    for name in ("grpo-off, seed 0", "gspo-r2, seed 1", "grpo-dense, seed 0", "gspo-dense, seed 1"):
        assert worker._serve(cells[name]) == ("http://a",)
    assert Servers.started == ["m0 bfloat16 with routes", "d0 bfloat16"]
    worker._servers.dead = True
    first = worker._servers
    worker._serve(cells["gspo-dense, seed 1"])
    assert Servers.started[2:] == ["d0 bfloat16"]
    assert worker._servers.running and not first.running
    assert said == ["starting 1 SGLang server (about a minute on a CPU) ...", "ready after 0 s"] * 3


def test_jobs_are_as_many_as_cores_hold_ranks_and_never_more_than_servers(
    request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))

    def jobs(*overrides: str, asked: int | None = None, device: str = "cpu") -> int:
        return choose_jobs(asked, make_plan(request_of(overrides=overrides)), device)

    assert jobs() == 8
    assert jobs("parallel.tensor=2", "parallel.pipeline=2") == 2
    assert jobs('rollout.servers=["http://a", "http://b"]') == 2
    assert jobs(device="cuda") == 1
    assert jobs(asked=3) == 3
    for asked, device, servers in ((0, "cpu", ()), (2, "cuda", ()), (2, "cpu", ('rollout.servers=["http://a"]',))):
        with pytest.raises(ConfigError, match=f"--jobs {asked}"):
            jobs(*servers, asked=asked, device=device)


def test_a_cells_cost_adds_up_over_its_starts(tmp_path: Path) -> None:
    assert add_up(tmp_path / "spent.json", 3.0, 500.0) == {"wall_s": 3.0, "peak_memory_mb": 500.0}
    assert add_up(tmp_path / "spent.json", 2.0, 400.0) == {"wall_s": 5.0, "peak_memory_mb": 500.0}
    (tmp_path / "spent.json").unlink()  # a start from nothing replaces the directory
    assert add_up(tmp_path / "spent.json", 2.0, 400.0) == {"wall_s": 2.0, "peak_memory_mb": 400.0}


def test_time_left_is_said_in_words() -> None:
    assert [_clock(seconds) for seconds in (7.4, 67.6, 3725)] == ["7 s", "1 min 08 s", "1 h 02 min"]


def test_a_second_request_to_stop_kills() -> None:
    calls: list[bool] = []
    stop = Stop(workers=[SimpleNamespace(stop=lambda *, kill: calls.append(kill))])  # type: ignore[list-item]
    stop.ask()
    stop.ask()
    assert calls == [False, True]


def test_an_arm_keeps_the_defaults_of_its_own_loss_and_takes_what_the_file_sets(request_of: Any) -> None:
    losses = ("gspo", "dr-grpo", "cispo")
    by_loss = {cell.arm.loss: cell.config.algorithm for cell in make_plan(request_of(losses=losses, seeds=1)).cells}
    assert (by_loss["dr-grpo"].credit, by_loss["dr-grpo"].aggregation) == ("centred", "token-sum")
    assert by_loss["cispo"].aggregation == "group-token-mean"
    asked = request_of(losses=("dr-grpo",), seeds=1, overrides=('algorithm.credit="group"',))
    assert {cell.config.algorithm.credit for cell in make_plan(asked).cells} == {"group"}
