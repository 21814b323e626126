"""Which form of an operation is taken, and products that keep float32."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_gspo.errors import ConfigError
from megatron_gspo.kernels import products
from megatron_gspo.kernels.choice import Machine, choose_kernels
from megatron_gspo.kernels.head import head_shard
from megatron_gspo.kernels.swiglu import swiglu
from megatron_gspo.kernels.tiles import Tiles

H100 = Machine(capability=9, triton=True)


def test_a_half_type_on_cuda_takes_the_kernel() -> None:
    assert choose_kernels("auto", "bfloat16", H100)["head"] == "triton"


@pytest.mark.parametrize(
    ("setting", "dtype", "machine", "reason"),
    [
        ("reference", "bfloat16", H100, 'model.kernels = "reference"'),
        ("auto", "float32", H100, "float32"),
        ("auto", "float64", H100, "float64"),
        ("auto", "bfloat16", Machine(0, True), "no CUDA device"),
        ("auto", "bfloat16", Machine(7, True), "7.x"),
        ("auto", "bfloat16", Machine(9, False), "triton is not installed"),
    ],
)
def test_all_else_takes_the_tiles_and_says_why(setting: str, dtype: str, machine: Machine, reason: str) -> None:
    kernels = choose_kernels(setting, dtype, machine)
    assert kernels["head"] == "tiles"
    assert reason in kernels.record()["head"]["reason"] and reason in str(kernels)


def test_experts_are_grouped_unless_the_reference_is_asked_for() -> None:
    assert [choose_kernels(setting, "float32")["experts"] for setting in ("auto", "reference")] == [
        "grouped",
        "sequential",
    ]


@pytest.mark.parametrize("operation", ["norm", "swiglu"])
def test_pointwise_kernels_are_tritons_for_half_types_on_cuda(operation: str) -> None:
    assert choose_kernels("auto", "bfloat16", H100)[operation] == "triton"
    assert choose_kernels("auto", "float32", H100)[operation] == "torch"
    assert choose_kernels("reference", "bfloat16", H100)[operation] == "torch"


@pytest.mark.parametrize(
    ("setting", "machine", "form"),
    [
        ("auto", Machine(9, True, apex=True), "fused"),
        ("auto", Machine(9, True, apex=False), "added"),
        ("auto", Machine(0, True, apex=True), "added"),
        ("reference", Machine(9, True, apex=True), "added"),
    ],
)
def test_gradients_are_fused_where_apex_is(setting: str, machine: Machine, form: str) -> None:
    assert choose_kernels(setting, "bfloat16", machine)["gradients"] == form


@pytest.mark.parametrize("cuda", [True, False])
def test_the_machine_is_asked_for_a_device(cuda: bool) -> None:
    with (
        mock.patch("torch.cuda.is_available", return_value=cuda),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        assert Machine.here().capability == (9 if cuda else 0)


def test_a_form_that_does_not_exist_is_refused() -> None:
    weight = torch.zeros(4, 2, dtype=torch.float64)
    for kernel in ("cuda", "triton"):
        with pytest.raises(ConfigError, match=f'no kernel "{kernel}"'):
            head_shard(kernel, weight, 0, 1.0, 4)
        with pytest.raises(ConfigError, match=f'no kernel "{kernel}"'):
            swiglu(weight, None, kernel)


# ------------------------------------------------------------------------------------------------------------- products


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 33, generator=generator), torch.randn(5, 33, generator=generator))
    return (4 * a).bfloat16(), b.bfloat16()


def test_a_product_of_bfloat16_is_not_rounded_to_it() -> None:
    a, b = halves()
    expected = a.double() @ b.double().t()
    found = products.wide_product(a, b.t())
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 < 1e-2 < (a @ b.t() - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_of_wide_types_is_bit_for_bit_torchs(dtype: torch.dtype) -> None:
    a, b = (tensor.to(dtype) for tensor in halves())
    assert torch.equal(products.wide_product(a, b.t()), a @ b.t())
    total = torch.ones(9, 5, dtype=dtype)
    expected = total.addmm(a, b.t())
    products.add_product(total, a, b.t())
    assert torch.equal(total, expected)


@pytest.mark.parametrize("with_out", [True, False])
def test_the_product_on_cuda_is_one_that_torch_has(with_out: bool) -> None:
    """On fake tensors, which torch checks as it does real ones: names, shapes, dtypes, and no second call."""
    a, b = (tensor.to("meta") for tensor in halves())
    out = torch.empty(9, 5, device="meta") if with_out else None
    with (
        mock.patch.object(products, "_writes_float32", return_value=True),
        mock.patch.object(torch, "mm", wraps=torch.mm) as mm,
    ):
        found = products.wide_product(a, b.t(), out=out)
    assert found.dtype == torch.float32 and found.shape == (9, 5)
    (call,) = mm.call_args_list
    assert call.args[0].dtype == call.args[1].dtype == torch.bfloat16, "inputs were widened"
    assert call.kwargs["out_dtype"] == torch.float32


def test_the_device_decides_which_product() -> None:
    assert not products._writes_float32(torch.empty(1))
    assert products._writes_float32(mock.Mock(is_cuda=True))


def test_sums_of_products_of_halves_are_float32() -> None:
    a, b = halves()
    total = torch.full((9, 5), 1000.0)
    products.add_product(total, a, b.t())
    assert (total - (1000 + a.double() @ b.double().t())).abs().max() < 1e-4


def test_logits_of_a_bfloat16_head_are_float32() -> None:
    """One product, and no rounding to bfloat16 on the way to the sums: a logprob near -20 would be off by 0.06."""
    h, weight = halves()
    labels = torch.arange(9) % 5
    sums = Tiles(weight, 0, 1.0, 9).sums(h, labels)
    z = h.double() @ weight.double().t()
    assert (sums.label - z[torch.arange(9), labels]).abs().max() < 1e-5
    assert (sums.maximum + sums.exp.log() - z.logsumexp(1)).abs().max() < 1e-5
