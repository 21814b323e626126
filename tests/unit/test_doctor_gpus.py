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

from megatron_gspo.doctor import kernels, machine, packages
from megatron_gspo.doctor.check import Check
from megatron_gspo.doctor.installed import Environment, environment_of, own_environment
from megatron_gspo.doctor.machine import Machine
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
        (['sync.method="distributed"'], "error"),
        (['sync.method="distributed"', 'sync.backend="gloo"'], "warning"),
        ([], "warning"),
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
    monkeypatch.setattr(kernels, "_has_module", lambda name: name in modules)
    have()
    checks = case.checks(only="kernels")
    assert [check.detail.partition(" is missing: ")[0] for check in checks] == ["transformer-engine", "apex"]
    assert {check.status for check in checks} == {"warning"} and all("make kernels" in check.fix for check in checks)
    modules |= {"transformer_engine"}  # its core without torch's part
    assert len(case.checks(only="kernels")) == 2
    modules |= {"transformer_engine_torch"}
    assert [check.detail.split()[0] for check in case.checks(only="kernels")] == ["apex"]
    monkeypatch.setattr(kernels, "_has_fused_adam", lambda: True)
    assert case.check("kernels").status == "ok"
    have(gpus=0)
    modules.clear()
    assert case.check("kernels").status == "ok"  # a CPU uses none


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
