"""What an environment has: its packages, torch's CUDA, what its SGLang asks for.

This file runs by itself too, in the Python of another environment, and imports neither torch nor anything of ours.
"""

import json
import re
import sys
from importlib import metadata, util
from pathlib import Path

PACKAGES = (
    "sglang",
    "torch",
    "triton",
    "sglang-kernel",
    "flashinfer-python",
    "torch-memory-saver",
    "sgl-deep-gemm",
)
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
CUDA = re.compile(r"^cuda\b.*= *'([\d.]+)'", re.MULTILINE)


def look() -> dict[str, object]:
    """``versions`` of the packages that are there, ``nccl`` and ``cuda`` of torch ("" unknown, or none), ``wants``."""
    return {
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "nccl": next(filter(None, map(_version, NCCL)), ""),
        "cuda": _cuda_of_torch(),
        "wants": metadata.requires("sglang") or [] if _version("sglang") else [],
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _cuda_of_torch() -> str:
    """From the file that torch's build wrote: importing torch takes seconds."""
    spec = util.find_spec("torch")
    for place in (spec.submodule_search_locations if spec else None) or ():
        file = Path(place) / "version.py"
        if file.is_file() and (found := CUDA.search(file.read_text(encoding="utf-8"))):
            return found[1]
    return ""


if __name__ == "__main__":
    json.dump(look(), sys.stdout)
