"""The pins fit together: with what SGLang asks for, trainer with server, the image with both."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_gspo.rollout.sglang.launcher import find_server_python
from megatron_gspo.versions import TESTED, untested
from tools.lock import is_cuda, lines, needed_by, versions

ROOT = Path(__file__).parents[2]
PINS = ROOT / "requirements"
GPU = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
PYTHON = {version: {"python_version": version, "python_full_version": f"{version}.1"} for version in ("3.11", "3.12")}

BESIDE_SGLANG = {
    "torch": "a build for a CPU",
    "sentencepiece": "0.2.1 is asked for; token ids go in and come out of a server, so it tokenizes nothing",
}
"""What a CPU server pins outside SGLang's range, and why it may."""

TORCH_ASKS = ("cuda-toolkit==13.0.3", "nvidia-cudnn-cu13==9.24.0.43", "nvidia-nccl-cu13==2.30.7", "triton~=3.8.0")
"""Of the metadata of torch 2.14.1 for CUDA, which no environment of a test need hold."""


def pins(*files: str, python: str = "3.12") -> dict[str, str]:
    """Canonical name -> version, of files under requirements/."""
    found = [Requirement(line) for file in files for line in lines(PINS / file)]
    here = [pin for pin in found if pin.marker is None or pin.marker.evaluate(PYTHON[python] | GPU)]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in here if pin.specifier}


@pytest.fixture(scope="module")
def wanted() -> list[Requirement]:
    """What the installed SGLang says that it needs on a GPU machine."""
    places = list(find_server_python().parents[1].glob("lib/python*/site-packages/sglang-*.dist-info/METADATA"))
    assert len(places) == 1, f"`make install` puts one SGLang into .venv-sglang: {places}"
    fields = HeaderParser().parsestr(places[0].read_text(encoding="utf-8"))
    assert fields["Version"] == pins("sglang-nodeps.txt")["sglang"]
    found = [Requirement(text) for text in fields.get_all("Requires-Dist", [])]
    return [need for need in found if not need.marker or need.marker.evaluate({"extra": ""} | PYTHON["3.12"] | GPU)]


def outside(wanted: list[Requirement], have: dict[str, str]) -> set[str]:
    """Pins that SGLang's own range does not hold."""
    ranges = {canonicalize_name(need.name): need.specifier for need in wanted}
    return {name for name in ranges.keys() & have if not ranges[name].contains(have[name], prereleases=True)}


def test_a_gpu_server_pins_all_that_sglang_asks_for_within_its_ranges(wanted: list[Requirement]) -> None:
    have = pins("cuda/torch.txt", "cuda/server.txt")
    assert {canonicalize_name(need.name) for need in wanted} <= have.keys()
    assert outside(wanted, have) == set()
    assert outside(wanted, have | {"sglang-kernel": "0.4.9"}) == {"sglang-kernel"}


def test_a_cpu_server_leaves_sglangs_ranges_only_where_a_reason_is_given(wanted: list[Requirement]) -> None:
    assert outside(wanted, pins("torch.txt", "sglang.txt", "sglang-nodeps.txt", python="3.11")) == set(BESIDE_SGLANG)


def test_trainer_and_gpu_server_have_one_torch_one_nccl_and_one_triton() -> None:
    common, server, trainer = pins("cuda/torch.txt"), pins("cuda/server.txt"), pins("trainer.txt", "cuda/kernels.txt")
    assert {"torch", "triton", "nvidia-nccl-cu13", "nvidia-cuda-runtime", "nvidia-cudnn-cu13"} <= common.keys()
    assert not common.keys() & (server.keys() | trainer.keys()), "pinned in torch.txt, which both take"
    assert common["torch"] == "2.14.1" and outside([Requirement(text) for text in TORCH_ASKS], common) == set()
    assert "-r torch.txt" in (PINS / "cuda/server.txt").read_text().splitlines()
    assert [server[name] for name in ("transformers", "safetensors")] == [
        trainer[name] for name in ("transformers", "safetensors")
    ]


def test_pins_are_within_the_ranges_of_the_project_and_of_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for python, torch in (("3.11", "torch.txt"), ("3.12", "torch.txt"), ("3.12", "cuda/torch.txt")):
        have = pins(torch, "trainer.txt", python=python)
        needs = [Requirement(text) for text in project["dependencies"]]
        needs = [need for need in needs if not need.marker or need.marker.evaluate(PYTHON[python])]
        assert [str(need) for need in needs if have[canonicalize_name(need.name)] not in need.specifier] == []
        assert [untested(name, have[name]) for name in TESTED.keys() & have.keys() if untested(name, have[name])] == []
    assert untested("sglang", pins("cuda/server.txt")["sglang"]) is None


def commands(*arguments: str, python: str = sys.executable) -> str:
    """What ``make`` would run in a checkout that has no environments yet."""
    if not shutil.which("make"):
        pytest.skip("no make")
    clean = {name: value for name, value in os.environ.items() if name not in ("DEVICE", "MAKEFLAGS", "MAKELEVEL")}
    names = [f"PYTHON={python}", f"PYTHON_LATEST={python}"]
    done = subprocess.run(
        ["make", "-n", "-B", *arguments, *names], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def installs(said: str, environment: str) -> list[str]:
    """The words after ``pip install`` of one environment, a line each."""
    marker = f"{environment}/bin/python -m pip install --quiet --disable-pip-version-check "
    return [line.strip().removeprefix("@").removeprefix(marker) for line in said.splitlines() if marker in line]


def test_make_installs_for_the_device_that_it_is_asked_for() -> None:
    for_cpu, for_gpu = commands("install", "DEVICE=cpu"), commands("install", "DEVICE=cuda")
    torch, trainer = "-r requirements/torch.txt", "-r requirements/trainer.txt"
    assert installs(for_cpu, ".venv")[:2] == [torch, f"{torch} {trainer}"]
    nodeps = "--no-deps -r requirements/sglang-nodeps.txt"
    assert installs(for_cpu, ".venv-sglang") == [torch, f"{torch} -r requirements/sglang.txt", nodeps]
    assert "requirements/cuda" not in for_cpu
    assert installs(for_gpu, ".venv")[1] == f"-r requirements/cuda/torch.txt {trainer}"
    assert installs(for_gpu, ".venv-sglang") == ["-r requirements/cuda/server.txt"]
    assert '"3.12".split()' in for_gpu and '"3.11 or 3.12".split()' in for_cpu
    assert "DEVICE = tpu: it is cpu or cuda" in commands("install", "DEVICE=tpu")


def test_the_newest_environment_and_the_kernels_take_the_servers_torch() -> None:
    latest = installs(commands("test-latest", "DEVICE=cpu"), ".venv-latest")
    assert latest[:2] == [
        "-r requirements/cuda/torch.txt",
        "-r requirements/cuda/torch.txt -r requirements/trainer.txt",
    ]
    kernels = installs(commands("kernels", "DEVICE=cuda"), ".venv")
    assert "-r requirements/cuda/torch.txt -r requirements/trainer.txt -r requirements/cuda/kernels.txt" in kernels
    assert kernels[-1] == "--no-build-isolation --no-deps -r requirements/cuda/kernels-nodeps.txt"


def test_what_is_compiled_is_pinned_and_finds_its_other_half() -> None:
    engine, apex = (Requirement(line) for line in lines(PINS / "cuda/kernels-nodeps.txt"))
    have = pins("cuda/kernels.txt")
    (version,) = (part.version for part in engine.specifier)
    assert (have["transformer-engine"], have["transformer-engine-cu13"]) == (version, version)
    assert apex.url is not None and re.fullmatch(r"git\+https://\S+@[0-9a-f]{40}", apex.url)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.sglang"])
def test_an_images_nvcc_is_of_torchs_cuda(name: str) -> None:
    """apex refuses to be compiled by another one, and SGLang compiles against torch."""
    text = (ROOT / "docker" / name).read_text()
    bases = re.findall(r"^ARG (\w+)=nvidia/cuda:([\d.]+)-(?:cudnn-)?devel-ubuntu24.04$", text, re.MULTILINE)
    assert [stage for stage, _ in bases] == ["BASE", "RUNTIME"]
    assert {Version(version).release[:2] for _, version in bases} == {
        Version(pins("cuda/torch.txt")["cuda-toolkit"]).release[:2]
    }


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("Dockerfile", ["make packages DEVICE=cuda", "make kernels DEVICE=cuda", "make install DEVICE=cuda"]),
        ("Dockerfile.sglang", ["make servers DEVICE=cuda"]),
        ("Dockerfile.cpu", ["make packages DEVICE=cpu", "make install DEVICE=cpu"]),
    ],
)
def test_what_an_image_holds_is_said_in_requirements_alone(name: str, steps: list[str]) -> None:
    text = (ROOT / "docker" / name).read_text()
    assert re.findall(r"^RUN (?:--mount=\S+ )?(make .*)$", text, re.MULTILINE) == steps
    assert "pip install" not in text
    said = [commands(*step.split()[1:]) for step in steps]
    device = steps[0].rpartition("=")[2]
    assert all(("requirements/cuda" in text) == (device == "cuda") for text in said)


def test_a_packages_needs_are_followed_through_the_extras_that_are_asked_for() -> None:
    said = {
        "torch": ["Jinja2", "toolkit[blas]==13", 'other; sys_platform == "win32"'],
        "jinja2": ["markupsafe"],
        "toolkit": ['nvidia-blas; extra == "blas"', 'nvidia-compiler; extra == "compiler"'],
        "nvidia-blas": [],
        "nvidia-compiler": [],
        "markupsafe": [],
        "other": [],
    }
    packages = [{"name": name, "version": "1", "requires_dist": needs} for name, needs in said.items()]
    found = needed_by("Torch", packages)
    assert found == {"torch", "jinja2", "markupsafe", "toolkit", "nvidia-blas"}
    assert {name for name in found if is_cuda(name)} == {"torch", "nvidia-blas"}
    assert versions([{"name": "Flash_Attn.4", "version": "4.0"}]) == {"flash-attn-4": "4.0"}
