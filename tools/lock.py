"""Writes requirements/cuda/ anew from what pip resolves for this Python: ``make lock`` (Python 3.12, some minutes).

pip resolves the GPU server, installing nothing. torch, and what it brings of NVIDIA's, go into torch.txt, which the
trainer takes too: both sides of an NCCL communicator need one NCCL. Then the trainer's kernels are resolved beside
that torch and the trainer's own pins. Wheels only differ by platform: these are Linux's on x86_64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "requirements" / "cuda"
TRAINER = ROOT / "requirements" / "trainer.txt"
Pins = dict[str, str]
"""Package -> version."""

TORCH_HEAD = """\
# torch for GPUs, and what it brings of NVIDIA's: the same for trainer and rollout servers. Written by `make lock`.
# A process group over both needs one NCCL; kernels are compiled against one torch; tensors are pickled between them.
"""
SERVER_HEAD = """\
# The rollout servers' environment on a GPU, all of it, on Python 3.12: what `make install DEVICE=cuda` puts into
# .venv-sglang. Written by `make lock`.
-r torch.txt
"""
KERNELS_HEAD = """\
# What Transformer Engine and apex need beside torch.txt and the trainer's packages. Written by `make lock`.
# The two that nvcc compiles are in kernels-nodeps.txt; `make kernels` installs both files into .venv.
"""


def main() -> None:
    """Resolves and writes."""
    argparse.ArgumentParser(description="Writes requirements/cuda/ anew from what pip resolves.").parse_args()
    (sglang,) = (pin for pin in lines(ROOT / "requirements" / "sglang-nodeps.txt") if pin.startswith("sglang=="))
    server = resolve([sglang])
    common = {name for name in needed_by("torch", server) if is_cuda(name)}
    pins = versions(server)
    write(CUDA / "torch.txt", TORCH_HEAD, {name: pins[name] for name in common})
    write(CUDA / "server.txt", SERVER_HEAD, {name: pins[name] for name in pins.keys() - common})

    engine = next(pin for pin in lines(CUDA / "kernels-nodeps.txt") if pin.startswith("transformer-engine-torch=="))
    version = engine.partition("==")[2]
    core = [f"transformer-engine=={version}", f"transformer-engine-cu13=={version}"]
    asked = [*core, "einops", "ninja", "nvdlfw-inspect", "nvidia-cudnn-frontend>=1.25", "onnx", "onnxscript", "wheel"]
    kernels = versions(resolve(asked, constraints=[CUDA / "torch.txt", TRAINER]))
    own = {canonicalize_name(Requirement(line).name) for file in (CUDA / "torch.txt", TRAINER) for line in lines(file)}
    write(CUDA / "kernels.txt", KERNELS_HEAD, {name: kernels[name] for name in kernels.keys() - own})


def resolve(requirements: Iterable[str], constraints: Iterable[Path] = ()) -> list[dict[str, Any]]:
    """The metadata of every package that pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        limits = [word for file in constraints for word in ("-c", str(file))]
        subprocess.run([*command, "--report", str(report), *limits, *requirements], check=True)
        return [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]


def versions(packages: Iterable[dict[str, Any]]) -> Pins:
    """Canonical name -> version."""
    return {canonicalize_name(package["name"]): package["version"] for package in packages}


def needed_by(name: str, packages: Iterable[dict[str, Any]]) -> set[str]:
    """A package and all that it needs, directly or not: what its extras need where they are asked for."""
    wants = {canonicalize_name(p["name"]): list(map(Requirement, p.get("requires_dist", []))) for p in packages}
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(name), "")]
    while waiting:
        package, extra = here = waiting.pop()
        if here not in seen and package in wants:
            seen.add(here)
            for need in wants[package]:
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    waiting += [(canonicalize_name(need.name), asked) for asked in ("", *need.extras)]
    return {package for package, _ in seen}


def is_cuda(name: str) -> bool:
    """torch, its compiler, and NVIDIA's libraries: not what torch shares with every program (sympy, jinja2, ...)."""
    return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))


def lines(file: Path) -> list[str]:
    """The requirements of a file, without comments, options and empty lines."""
    text = file.read_text(encoding="utf-8").splitlines()
    return [line for part in text if (line := part.partition(" #")[0].strip()) and line[0] not in "#-"]


def write(file: Path, head: str, pins: Pins) -> None:
    """One ``name==version`` a line, by name."""
    body = "".join(f"{name}=={pins[name]}\n" for name in sorted(pins))
    file.write_text(head + "\n" + body, encoding="utf-8")


if __name__ == "__main__":
    main()
