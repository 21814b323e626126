"""``doctor`` on a machine with GPUs: environments that do not fit, kernels that are missing, and each card's memory."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_gspo.doctor import machine, packages
from megatron_gspo.doctor.check import Check
from megatron_gspo.doctor.installed import Environment, environment_of, own_environment
from megatron_gspo.doctor.machine import Machine, gib
from megatron_gspo.kernels import choice
from megatron_gspo.kernels import modules as kernel_modules
from tests.unit.doctor_cases import Case

GIB = 2**30
SOUND = Environment(
    "python",
    {
        "sglang": "0.5.23",
        "torch": "2.14.1",
        "triton": "3.8.0",
        "sglang-kernel": "0.4.10",
        "flashinfer-python": "0.7.2",
        "torch-memory-saver": "0.0.10",
    },
    nccl="2.30.7",
    cuda="13.0",
    wants=("torch==2.14.1", 'torch==2.9; extra == "old"', "not a requirement!", "sglang-kernel==0.4.10"),
)
Have = Callable[..., None]


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> Have:
    """``have(gpus=2, trainer=..., servers=...)``: a machine and its environments, as far as the checks can see."""

    def found(
        gpus: int = 2,
        driver: str = "13.0",
        trainer: Environment = SOUND,
        servers: Environment = SOUND,
        size: int = 80,
        memory: int = 200,
    ) -> None:
        here = Machine(16, memory * GIB, ((size * GIB, size * GIB),) * gpus, driver if gpus or driver != "13.0" else "")
        monkeypatch.setattr("megatron_gspo.doctor.facts.look_at_machine", lambda: here)
        monkeypatch.setattr("megatron_gspo.doctor.facts.own_environment", lambda: trainer)
        monkeypatch.setattr("megatron_gspo.doctor.facts.environment_of", lambda python: servers)

    return found


def with_versions(**versions: str) -> Environment:
    """The sound one with other packages; "" leaves one out."""
    changed = {**SOUND.versions, **{name.replace("_", "-"): version for name, version in versions.items()}}
    return replace(SOUND, versions={name: version for name, version in changed.items() if version})


def lines(checks: list[Check]) -> list[tuple[str, str]]:
    return [(check.status, check.detail) for check in checks]


# ---------------------------------------------------------------------------------------- environments that fit


def test_environments_that_fit_are_one_line_with_both_and_the_driver(case: Case, have: Have) -> None:
    have()
    both = "torch 2.14.1, triton 3.8.0, NCCL 2.30.7, CUDA 13.0"
    said = f"the trainer's {both}; the servers' {both}; a driver for CUDA 13.0"
    assert lines(case.checks(only="trainer, servers")) == [("ok", said)]
    only = lines(case.checks('rollout.servers=["http://a"]', only="trainer, servers"))
    assert only == [("ok", f"the trainer's {both}; a driver for CUDA 13.0")]


def test_two_nccls_are_an_error_where_the_sync_needs_one(case: Case, have: Have) -> None:
    have(trainer=replace(SOUND, nccl="2.29.7"))
    said = "NCCL 2.29.7 in the trainer, 2.30.7 in the servers"
    for settings, status in (
        (['sync.method="distributed"', 'sync.backend="nccl"'], "error"),
        (['sync.method="distributed"', 'rollout.server_args=["--base-gpu-id", "1"]'], "error"),
        (['sync.method="distributed"'], "error"),  # the server has the card that the rank leaves
        (['sync.method="distributed"', 'placement.mode="colocated"'], "warning"),  # it has the trainer's: gloo
        (['rollout.server_args=["--base-gpu-id", "1"]'], "error"),
        (['placement.mode="colocated"'], "warning"),
        (['sync.method="distributed"', 'sync.backend="gloo"'], "warning"),
        ([], "error"),  # between cards of their own "auto" is nccl
    ):
        (check,) = case.checks(*settings, only="trainer, servers")
        assert check.status == status and said in check.detail and "make install DEVICE=cuda" in check.fix
    have(gpus=0, trainer=replace(SOUND, nccl="2.29.7"))
    assert case.check("trainer, servers").status == "ok"  # a CPU has gloo
    have(trainer=replace(SOUND, nccl=""))
    assert case.check("trainer, servers").status == "ok"  # a torch of another build keeps its NCCL to itself


def test_another_torch_than_sglangs_is_an_error_and_two_torches_a_warning(case: Case, have: Have) -> None:
    have(servers=with_versions(torch="2.13.0"))
    asked, differs = lines(case.checks(only="trainer, servers"))
    assert asked == ("error", "the servers' torch is 2.13.0, their SGLang asks for ==2.14.1, and so do its kernels")
    assert differs == ("warning", "torch 2.14.1 in the trainer, 2.13.0 in the servers")
    have(trainer=with_versions(torch="2.14.1+cu130", triton="3.7.1"))
    assert lines(case.checks(only="trainer, servers")) == [
        ("warning", "triton 3.7.1 in the trainer, 3.8.0 in the servers")
    ]


def test_a_driver_that_is_too_old_or_a_torch_without_cuda_says_why_no_gpu_is_found(case: Case, have: Have) -> None:
    """Such a machine has no GPUs as far as torch can see."""
    have(gpus=0, driver="12.8")
    check = case.check("trainer, servers")
    assert check.status == "error" and "torch 2.14.1 is built for CUDA 13.0, the driver runs 12.8" in check.detail
    assert "580 or later" in check.fix
    have(gpus=0, driver="13.2")
    assert case.check("trainer, servers").status == "ok"
    have(gpus=0, driver="12.9", trainer=replace(SOUND, cuda="12.6"), servers=replace(SOUND, cuda=""))
    assert lines(case.checks(only="trainer, servers")) == [
        ("warning", "the servers' torch 2.14.1 is built for a CPU, on a machine whose driver runs CUDA 12.9")
    ]


def test_the_driver_is_asked_for_its_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        result = 0

        def cuDriverGetVersion(self, place: object) -> int:
            place._obj.value = 12080  # type: ignore[attr-defined]
            return self.result

    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert machine._cuda_of_driver() == "12.8"
    driver.result = 999
    assert machine._cuda_of_driver() == ""
    monkeypatch.undo()
    assert machine._cuda_of_driver("no-such-library.so") == ""


# ------------------------------------------------------------------------------------------------ what is asked


def test_an_environment_says_the_same_of_itself_in_its_own_process_and_to_another() -> None:
    here, asked = own_environment(), environment_of(Path(sys.executable))
    assert (here.versions, here.nccl, here.cuda) == (asked.versions, asked.nccl, asked.cuda)
    assert here.versions["torch"] and SOUND.wanted("torch") == "==2.14.1" and SOUND.wanted("numpy") == ""


def test_torchs_cuda_and_nccl_are_read_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch/version.py").write_text("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\n")
    for name, version in (("torch", "2.14.1"), ("nvidia_nccl_cu13", "2.30.7"), ("sglang", "0.5.23")):
        metadata = tmp_path / f"{name}-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        asks = "Requires-Dist: torch==2.14.1\n" if name == "sglang" else ""
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asks}")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(open({packages.__file__!r}).read())"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "versions": {"sglang": "0.5.23", "torch": "2.14.1"},
        "nccl": "2.30.7",
        "cuda": "13.0",
        "wants": ["torch==2.14.1"],
    }
    (tmp_path / "torch/version.py").write_text("cuda: Optional[str] = None\n")
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cuda"] == ""


# ---------------------------------------------------------------------------------------------------- kernels


def test_each_missing_kernel_of_the_trainer_is_a_line_with_its_cost_on_a_gpu(case: Case, have: Have, monkeypatch):
    modules = {"triton"}
    monkeypatch.setattr(kernel_modules, "has_module", lambda name: name in modules)
    have()
    checks = case.checks(only="kernels")
    assert [check.detail.partition(" is missing: ")[0] for check in checks] == ["transformer-engine", "apex"]
    assert {check.status for check in checks} == {"warning"} and all("make kernels" in check.fix for check in checks)
    modules |= {"transformer_engine"}  # its core without torch's part
    core = case.checks(only="kernels")[0].detail
    assert core.startswith("transformer-engine has no transformer_engine_torch: attention runs on")
    modules |= {"transformer_engine_torch", "apex", "fused_weight_gradient_mlp_cuda"}
    assert case.check("kernels").status == "ok"
    have(gpus=0)
    modules.clear()
    assert case.check("kernels").status == "ok"  # a CPU uses none


def test_an_apex_built_without_the_product_is_missing_for_doctor_and_for_the_model(case, have: Have, monkeypatch):
    modules = {"triton", "transformer_engine", "transformer_engine_torch", "apex"}
    monkeypatch.setattr(kernel_modules, "has_module", lambda name: name in modules)
    have()
    for built in (False, True):
        modules |= {"fused_weight_gradient_mlp_cuda"} if built else set()
        assert choice.Machine.here().apex is built
        assert ("apex has no fused_weight_gradient_mlp_cuda" in case.check("kernels").detail) is not built


def test_each_missing_kernel_of_the_servers_is_a_line_and_one_of_them_an_error(case: Case, have: Have) -> None:
    have()
    said = "sglang-kernel 0.4.10, flashinfer-python 0.7.2, torch-memory-saver 0.0.10"
    assert lines(case.checks(only="server kernels")) == [("ok", said)]
    bare = with_versions(sglang_kernel="", flashinfer_python="", torch_memory_saver="")
    have(servers=bare)
    checks = case.checks(only="server kernels")
    assert [check.status for check in checks] == ["error", "warning", "warning"]
    assert checks[0].detail == "sglang-kernel is missing: no server starts on a GPU"
    assert "give its memory back" in checks[2].detail and checks[2].fix == "make install DEVICE=cuda"
    have(gpus=0, servers=bare)
    assert lines(case.checks(only="server kernels")) == [("ok", "none, and a server on a CPU uses none")]
    have()
    assert case.check("server kernels", 'algorithm.name="sft"').detail == "no server is started here"


# ----------------------------------------------------------------------------------------------------- memory

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
EIGHT = (
    "parallel.data=8",
    "parallel.expert=8",
    'model.dtype="bfloat16"',
    'model.recompute="full"',
    "train.microbatch_tokens=8192",
    "train.prompts_per_step=64",
    "rollout.max_prompt_tokens=1024",
    "rollout.max_response_tokens=7168",
)
TP4 = 'rollout.server_args=["--tp-size=4", "--mem-fraction-static", "0.3"]'


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are chosen for."""
    monkeypatch.setattr("megatron_gspo.kernels.choice.Machine.here", lambda: choice.Machine(9, triton=True))


def memory(case: Case, *settings: str) -> dict[str, Check]:
    """The lines of a 30 B model on eight cards, by their first words."""
    (case.model / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    checks = case.checks(*EIGHT, *settings, only="memory")
    return {check.detail.partition(":")[0].split(" is ")[0].partition("'s")[0]: check for check in checks}


def test_a_rank_of_a_30b_on_eight_cards_is_counted_with_what_comes_and_goes(
    case: Case, have: Have, an_h100: None
) -> None:
    have(gpus=8, memory=1500)
    rank = memory(case, 'rollout.servers=["http://a"]')["a rank"]
    assert "weights 9.62 GiB + gradients 19.2 GiB + optimizer 42.7 GiB" in rank.detail
    assert "74.7 GiB at its fullest, with 800 MiB that come and go" in rank.detail and rank.status == "warning"
    rank = memory(case, 'rollout.servers=["http://a"]', "optimizer.offload=true")["a rank"]
    assert "42.7 GiB in host memory" in rank.detail and "32.1 GiB at its fullest" in rank.detail
    assert rank.status == "ok" and "server" not in rank.detail


def test_a_servers_share_of_its_card_must_hold_weights_and_a_cache(case: Case, have: Have) -> None:
    have(gpus=8, memory=1500)
    server = memory(case)["a local server"]
    assert server.status == "error" and "placement.tensor" in server.fix
    assert "50% of 80 GiB is 40 GiB: weights 56.9 GiB, and no room for one sequence of 8192" in server.detail
    server = memory(case, TP4)["a local server"]
    assert server.status == "ok" and "weights 14.2 GiB + 9.78 GiB for keys and values: 52 sequences" in server.detail
    apart = memory(case, "placement.tensor=4", "placement.attention_data=4", "placement.memory=0.3")["a local server"]
    assert "9.78 GiB for keys and values: 52 sequences" in apart.detail, "4 times the heads, a quarter of the requests"
    have(gpus=8, size=56, memory=1500)
    assert memory(case, TP4)["a local server"].status == "warning"  # 13 sequences at once


def test_a_server_in_eight_bits_holds_matrices_of_a_byte_with_their_scales_and_two_bytes_of_the_rest(
    case: Case, have: Have, an_h100: None
) -> None:
    have(gpus=8, memory=1500)
    attention, experts = 2 * 2048 * 4096 + 2 * 2048 * 512, 128 * 3 * 2048 * 768
    narrow = 48 * (attention + experts)
    wide = 2 * 151936 * 2048 + 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    size = narrow + 4 * narrow // 128**2 + 2 * wide
    assert f"weights {gib(size)} + " in memory(case, 'rollout.engine_dtype="fp8"')["a local server"].detail
    disk = memory(case, 'rollout.engine_dtype="fp8"', 'sync.method="disk"')["host"].detail
    assert f"weights in /dev/shm {gib(size)}" in disk
    assert "weights 114 GiB," in memory(case, 'rollout.engine_dtype="float32"')["a local server"].detail


def test_a_card_that_is_shared_has_two_peaks_and_one_apart_has_one(case: Case, have: Have, an_h100: None) -> None:
    have(gpus=8, memory=1500)
    found = memory(case, TP4)
    assert "of 80 GiB free on the fullest GPU, where a server sleeps" in found["a rank"].detail
    turn = found["a card while its server"]
    assert "weights 9.62 GiB + sync.bucket_mb 977 MiB + a server's 30% 24 GiB = 34.6 GiB" in turn.detail
    assert turn.status == "ok" and "states (placement: colocated) 341 GiB" in found["host"].detail
    tight = memory(case, "placement.tensor=4", "placement.memory=0.9", "algorithm.kl_loss_coef=0.01")
    assert tight["a card while its server"].status == "error"
    assert "reference 9.62 GiB" in tight["a card while its server"].detail
    have(gpus=16, memory=1500)
    apart = memory(case, "placement.tensor=4")
    assert "80 GiB free on the fullest GPU" in apart["a rank"].detail and "server" not in apart["a rank"].detail
    assert "a card while its server" not in apart and "states" not in apart["host"].detail


def test_where_trainer_and_servers_lie_is_a_line_with_its_reason(case: Case, have: Have) -> None:
    def where(*settings: str) -> tuple[str, str]:
        (case.model / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
        [line] = lines(case.checks(*EIGHT, *settings, only="placement"))
        return line

    have(gpus=8)
    status, said = where("placement.tensor=4")
    assert status == "ok" and said.startswith("colocated: the ranks take 8 of 8 cards, and the servers need 4 at least")
    assert said.endswith("2 servers of 4 cards on 0, 1, 2, 3, 4, 5, 6, 7; ranks on 0 to 7")
    assert where("placement.tensor=3")[1].startswith("the size of a local server")
    assert where("rollout.local_servers=9")[1].endswith("or servers named in rollout.servers")
    assert where('rollout.servers=["http://a"]') == ("ok", "apart: running servers are named")
    have(gpus=8, servers=with_versions(torch_memory_saver=""))
    status, said = where("placement.tensor=4")
    assert status == "error" and "cannot sleep without torch-memory-saver" in said
    have(gpus=16, servers=with_versions(torch_memory_saver=""))
    assert where("placement.tensor=4")[0] == "ok"
    have(gpus=0)
    assert where() == ("ok", "apart: there is no GPU to share")
    assert where('algorithm.name="sft"') == ("ok", "supervised fine-tuning has no servers")


def test_the_hosts_memory_holds_what_was_sent_there(case: Case, have: Have) -> None:
    have(gpus=8, memory=1500)
    host = memory(case)["host"]
    assert host.status == "ok" and "8 ranks 3.12 GiB + 8 servers 16 GiB + states (placement: col" in host.detail
    host = memory(case, 'rollout.servers=["http://a"]')["host"]
    assert host.status == "ok" and "8 ranks 3.12 GiB = 3.12 GiB of 1,500 GiB free" in host.detail
    have(gpus=8, memory=400)
    apart = 'rollout.servers=["http://a"]'
    host = memory(case, apart, "optimizer.offload=true", "train.checkpoint_async=true", 'sync.method="disk"')["host"]
    assert host.status == "error" and host.fix == "copies (train.checkpoint_async) are most of it"
    for term in ("states (optimizer.offload) 341 GiB", "(train.checkpoint_async) 418 GiB", "in /dev/shm 56.9 GiB"):
        assert term in host.detail
