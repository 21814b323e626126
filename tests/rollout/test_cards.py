"""Local servers on GPUs, without one: the cards they take, what does not fit, and command lines that SGLang takes."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from megatron_gspo.config import Placement, PlacementConfig, RolloutConfig
from megatron_gspo.config.servers import server_sizes
from megatron_gspo.errors import ConfigError
from megatron_gspo.rollout.sglang import launcher
from megatron_gspo.rollout.sglang.arguments import server_arguments, server_environment
from megatron_gspo.rollout.sglang.cards import (
    GIB,
    check_cards,
    check_divides,
    check_fits,
    weight_bytes,
)
from megatron_gspo.rollout.sglang.launcher import SERVER_SCRIPT, LocalServers, find_server_python
from tests.rollout.conftest import require_sglang
from tests.rollout.test_launcher import HEALTHY, fake_python, processes_of

QWEN3_30B = {
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "moe_intermediate_size": 768,
}
CARD = 80 * GIB


def placed(args: Sequence[str] = (), servers: int | None = None, cards: int = 8, **settings: Any) -> Placement:
    rollout = RolloutConfig(server_args=tuple(args), local_servers=servers)
    return PlacementConfig(**settings).resolved(rollout, ranks=settings.pop("ranks", 0), cards=cards)


def test_servers_of_two_cards_lie_behind_each_other() -> None:
    assert placed(["--tp-size", "2"], 2, 4).first_cards == (0, 2)
    assert placed(["--tp=2", "--pp-size=2"], 2, 8).first_cards == (0, 4)
    assert placed(["--dp-size", "2"], 3, 6).first_cards == (0, 2, 4)
    assert placed(["--tp-size", "4", "--attn-dp-size", "4"], 1, 4).first_cards == (0,)
    assert placed(["--tp-size", "2", "--base-gpu-id", "6"], 1).first_cards == (6,)
    assert placed(["--tp-size", "2", "--gpu-id-step", "2"], 2, 6).first_cards == (0, 3)


@pytest.mark.parametrize(
    ("args", "servers", "cards", "said"),
    [
        (["--tp-size", "2"], 3, 4, r"3 local server\(s\) of 2 card\(s\) each need 6 cards, and this machine shows 4"),
        (["--base-gpu-id", "3", "--tp", "2"], 1, 4, "from card 3 on need 5 cards, and this machine shows 4"),
        (["--base-gpu-id", "0"], 2, 4, "--base-gpu-id 0 puts all 2 local servers on the same cards"),
    ],
)
def test_cards_that_are_not_there_are_one_error(args: list[str], servers: int, cards: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        placed(args, servers, cards)


def test_weights_that_do_not_fit_into_a_servers_share_are_refused_with_the_sums() -> None:
    weights = 57 * GIB
    with pytest.raises(ConfigError, match=r"57\.0 GiB of weights over 1 card\(s\).*0\.5 of 80\.0 GiB = 40\.0 GiB"):
        check_fits(placed(mode="colocated"), weights, CARD)
    check_fits(placed(["--tp-size", "2"], mode="colocated"), weights, CARD)
    check_fits(placed(["--mem-fraction-static=0.85"], mode="colocated"), weights, CARD)
    check_fits(placed(), weights, CARD)
    with pytest.raises(ConfigError, match=r"28\.5 GiB each, and a local server has 0\.5 of 40\.0 GiB"):
        check_fits(placed(tensor=2, mode="colocated"), weights, CARD // 2)


def test_weights_are_counted_in_the_engines_dtype_from_the_files_headers(tmp_path: Path) -> None:
    assert weight_bytes(tmp_path, "bfloat16") is None
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    assert (weight_bytes(tmp_path, "bfloat16"), weight_bytes(tmp_path, "float32")) == (48, 96)
    save_file({"d": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "three.safetensors")
    assert weight_bytes(tmp_path, "bfloat16") is None
    (tmp_path / "three.safetensors").write_bytes(b"no header")
    assert weight_bytes(tmp_path, "bfloat16") is None


@pytest.mark.parametrize(
    "args",
    [[], ["--tp-size", "8"], ["--tp-size", "8", "--ep-size", "8"], ["--tp-size", "32", "--attn-dp-size", "32"]],
)
def test_sizes_that_divide_the_model_are_taken(args: list[str]) -> None:
    check_divides(server_sizes(args), QWEN3_30B)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tp-size", "3"], "3 tensor ranks do not divide 32 attention heads"),
        (["--tp-size", "6", "--attn-dp-size", "2"], "3 tensor ranks do not divide 32 attention heads"),
        (["--tp-size", "4", "--attn-dp-size", "3"], "--attn-dp-size 3 does not divide --tp-size 4"),
        (["--tp-size", "4", "--ep-size", "3"], "--ep-size 3 does not divide --tp-size 4"),
        (["--tp-size", "0"], "--tp-size 0 is no number of ranks"),
        (["--tp-size", "two"], "invalid int value: 'two'"),
        (["--enable-dp-attention", "--dp-size", "2"], "deprecated --enable-dp-attention"),
    ],
)
def test_sizes_that_do_not_divide_the_model_are_refused(args: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_divides(server_sizes(args), QWEN3_30B)


def test_key_value_heads_and_experts_and_widths_divide_too() -> None:
    for changed, said in (
        ({"num_key_value_heads": 6}, "4 tensor ranks neither divide nor are a multiple of 6 key-value heads"),
        ({"num_experts": 6}, "--ep-size 4 does not divide 6 experts"),
        ({"num_experts": 0, "intermediate_size": 102, "moe_intermediate_size": 0}, "feed-forward width 102"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_divides(server_sizes(["--tp-size", "4", "--ep-size", "4"]), QWEN3_30B | changed)


@pytest.mark.parametrize(("capability", "taken"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_cards_that_do_not_multiply_eight_bits_are_refused_for_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], taken: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), capability].__getitem__)
    check_cards("bfloat16")
    if taken:
        return check_cards("fp8")
    with pytest.raises(
        ConfigError, match=f"compute capability 8.9 .*, and one here has {capability[0]}.{capability[1]}"
    ):
        check_cards("fp8")
    return None


def test_the_launcher_starts_servers_for_cuda_each_on_cards_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "cards_here", lambda: [CARD] * 4)
    monkeypatch.setitem(launcher.GRACE_S, "cuda", 1.0)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    config = RolloutConfig(
        server_python=fake_python(tmp_path, HEALTHY), local_servers=2, server_args=("--tp-size", "2")
    )
    with LocalServers(config, tmp_path, tmp_path / "logs", device="cuda", dtype="bfloat16") as servers:
        lines = [psutil.Process(server._process.pid).cmdline() for server in servers._servers]
        assert [line[line.index("--base-gpu-id") + 1] for line in lines] == ["0", "2"]
        assert all(processes_of(server._process.pid) for server in servers._servers)
    with pytest.raises(ConfigError, match="need 6 cards, and this machine shows 4"):
        LocalServers(
            config.model_copy(update={"local_servers": 3}),
            tmp_path,
            tmp_path / "logs",
            device="cuda",
            dtype="bfloat16",
        ).__enter__()


PARALLEL: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((), {}),
    (("--tp-size", "2"), {"mode": "colocated"}),
    ((), {"tensor": 4, "expert": 4}),
    ((), {"tensor": 4, "attention_data": 2, "mode": "colocated"}),
    (("--mem-fraction-static", "0.7"), {"tensor": 2}),
    (("--load-format", "dummy"), {"memory": 0.45}),
)
LINES = [
    (device, args, settings, routes, seeded)
    for device, (args, settings), routes, seeded in itertools.product(
        ("cuda", "cpu"), PARALLEL, (False, True), (False, True)
    )
    if device == "cuda" or not (args or settings)
]
PARSE = """
import json, logging, sys
sys.path.insert(0, {directory!r})
import server
server.install_cpu_stand_ins()
from sglang.srt.server_args import prepare_server_args
said = []
logging.Logger.warning = lambda self, text, *args, **settings: said.append(str(text))  # at whatever level, to whomever
for line in json.load(sys.stdin):
    said.clear()
    settings = prepare_server_args(line)
    names = ("tp_size", "ep_size", "attn_dp_size", "dp_size", "mem_fraction_static", "base_gpu_id", "device",
             "enable_fp32_lm_head", "enable_return_routed_experts", "enable_deterministic_inference",
             "enable_memory_saver", "dtype", "fp8_gemm_runner_backend", "moe_runner_backend")
    print(json.dumps({{"said": said, **{{name: getattr(settings, name) for name in names}}}}))
"""


def on(device: str, args: tuple[str, ...], settings: dict[str, Any]) -> Placement:
    cards = 8 if device == "cuda" else 0
    return PlacementConfig(**settings).resolved(RolloutConfig(server_args=args), ranks=4, cards=cards)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What SGLang makes of each of ``LINES``; importing it takes most of the time."""
    require_sglang()
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"], **QWEN3_30B}))
    lines = []
    for device, args, settings, routes, seeded in LINES:
        config = RolloutConfig(server_args=args, seeded=seeded)
        placement = on(device, args, settings)
        check_divides(placement.sizes, QWEN3_30B)
        told = {"device": device, "dtype": "bfloat16", "gpu": 1, "routes": routes, "placed": placement.server_args}
        lines.append(server_arguments(config, model, 30000, **told))
    lines.append(["--model-path", str(model), "--disable-cuda-graph"])
    lines += [server_arguments(RolloutConfig(), model, 30000, device=device, dtype="fp8") for device in ("cuda", "cpu")]
    done = subprocess.run(
        [str(find_server_python()), "-P", "-c", PARSE.format(directory=str(SERVER_SCRIPT.parent))],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_deprecation_is_seen_where_there_is_one(parsed: list[dict[str, Any]]) -> None:
    assert any("--disable-cuda-graph" in text and "deprecated" in text for text in parsed[len(LINES)]["said"])


def environment() -> Mapping[str, str]:
    return server_environment({"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}, "cpu")


@pytest.mark.parametrize("index", range(len(LINES)), ids=[" ".join(map(str, line)) for line in LINES])
def test_sglang_takes_the_command_line_without_a_deprecation(index: int, parsed: list[dict[str, Any]]) -> None:
    device, args, settings, routes, seeded = LINES[index]
    seen, placement = parsed[index], on(device, args, settings)
    sizes = placement.sizes
    assert not [text for text in seen["said"] if "deprecated" in text.lower()]
    assert (seen["tp_size"], seen["ep_size"], seen["attn_dp_size"]) == (
        sizes.tensor,
        sizes.expert,
        sizes.attention_data,
    )
    assert seen["dp_size"] == 1 and seen["device"] == device and seen["enable_fp32_lm_head"]
    assert (seen["enable_return_routed_experts"], seen["enable_deterministic_inference"]) == (routes, seeded)
    if device == "cuda":
        assert (seen["base_gpu_id"], seen["mem_fraction_static"]) == (1, placement.share)
    assert seen["enable_memory_saver"] == (device == "cuda" and placement.colocated)


def test_servers_of_eight_bits_compute_in_bfloat16_by_kernels_that_take_weights_as_they_come(
    parsed: list[dict[str, Any]],
) -> None:
    cuda, cpu = parsed[-2:]
    assert cuda["dtype"] == cpu["dtype"] == "bfloat16"
    assert cuda["fp8_gemm_runner_backend"] == cuda["moe_runner_backend"] == "triton"
    assert "triton" not in (cpu["fp8_gemm_runner_backend"], cpu["moe_runner_backend"])
    assert not [text for text in cuda["said"] + cpu["said"] if "deprecated" in text.lower()]
