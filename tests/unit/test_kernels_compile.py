"""Triton compiles every kernel for CUDA without a GPU: what the compiler refuses, or would make slow, shows here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.interpreter import needs_triton

pytestmark = needs_triton

SHARED_BYTES = 99 * 1024
"""What every card from compute capability 8.0 on lets a program have."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
HEAD = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 64, "WIDEN": False}
OF_HEAD = {"h": "*bf16", "weight": "*bf16", "labels": "*i64", "first": "i32", "temperature": "fp32"}
SIZES = dict.fromkeys(("tokens", "columns", "hidden", "rows", "width"), "i32")
SUMS = dict.fromkeys(("maximum", "exp", "weighted", "label"), "*fp32")
ROWS = dict.fromkeys(("x", "y", "dx", "dy", "weight"), "*bf16") | {"probs": "*fp32", "dprobs": "*fp32"}
ROWS |= {"partial": "*fp32", "eps": "fp32"}
TURNED = ROWS | {"cos": "*fp32", "sin": "*fp32"}
TURNED |= dict.fromkeys(("rows", "heads", "half", "rest", "token_stride", "head_stride"), "i32")
OF_TURN = {"FROM_NEIGHBOURS": False, "TO_NEIGHBOURS": False, "ROWS": 32, "BLOCK": 64, "REST": 0}
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "_sums": ("triton_head", OF_HEAD | SIZES | SUMS, {**HEAD, "SPLIT": 4096, "LOWEST": -3.4028234663852886e38}),
    "_gradients": ("triton_head", OF_HEAD | SIZES | {"lse": "*fp32", "grad": "*fp32", "dz": "*bf16"}, HEAD),
    "norm forward": ("triton_norm", ROWS | SIZES, {"ROWS": 2, "BLOCK": 2048}),
    "norm backward": ("triton_norm", ROWS | SIZES, {"ROWS": 2, "BLOCK": 2048}),
    "rotary turn": ("triton_rotary", TURNED, OF_TURN | {"BACK": False}),
    "rotary back turn": ("triton_rotary", TURNED, OF_TURN | {"BACK": True, "TO_NEIGHBOURS": True, "REST": 64}),
    "swiglu forward": ("triton_swiglu", ROWS | SIZES, {"HAS_PROBS": True, "ROWS": 2, "BLOCK": 1024}),
    "swiglu backward": ("triton_swiglu", ROWS | SIZES, {"HAS_PROBS": True, "ROWS": 2, "BLOCK": 1024}),
}
"""Kernel -> its file, the types of its arguments (of Qwen3-30B-A3B in bfloat16) and its constants."""


def compiled(case: str, capability: int) -> Any:
    """A kernel as it would be built for a launch whose pointers and sizes are multiples of 16."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file, types, constants = CASES[case]
    module = importlib.import_module(f"megatron_gspo.kernels.{file}")
    kernel = getattr(module, "_" + case.split()[-1].lstrip("_"))
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [name.startswith(("*", "i32")) for name in signature.values()]
    attributes = {(place,): [["tt.divisibility", 16]] for place, it in enumerate(aligned) if it}
    options = {"num_warps": module.WARPS, "num_stages": module.STAGES} if file == "triton_head" else {}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("case", "capability"), [*((case, 90) for case in CASES), ("_sums", 80)])
def test_a_kernel_compiles_within_a_cards_shared_memory_and_without_atomics(
    case: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled(case, capability)
    ptx = kernel.asm["ptx"]
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES
    assert not re.search(r"\b(atom|red)\.", ptx), "a sum in an order by chance"
    if case in ("_sums", "_gradients"):
        assert TENSOR_CORES[capability] in ptx, "products that do not run on tensor cores"
        assert "cp.async" in ptx, "loads that do not run ahead of the products"
