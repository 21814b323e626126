"""On a CUDA device, log-probabilities, attention and norm are those of a naive float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.attention import (
    GROUPS,
    HEADS,
    LENGTHS,
    WIDTH,
    Arrays,
    attention_inputs,
    attention_of_ranks,
    naive_attention,
    padded,
    results,
)
from tests.distributed.test_logprobs import Problem, reference
from tests.gpu.one_rank import needs_cuda

pytestmark = needs_cuda


@pytest.fixture(scope="module")
def world() -> Iterator[dist.ProcessGroup]:
    """A world of this process alone."""
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield dist.distributed_c10d._get_default_group()
    dist.destroy_process_group()


def norm_error(actual: Arrays, expected: Arrays) -> float:
    """The largest |a - b| / |b| over tensors, in Frobenius norm."""
    assert actual.keys() == expected.keys()
    return max(float(np.linalg.norm(actual[name] - expected[name]) / np.linalg.norm(expected[name])) for name in actual)


# ------------------------------------------------------------------------------------------------------------- logprobs


def logprobs_on_cuda(problem: Problem, world: dist.ProcessGroup, kernel: str = "tiles") -> Arrays:
    from megatron_gspo.parallel.logprobs import vocab_parallel_logprobs

    hidden, weight, labels, grad = (tensor.cuda() for tensor in problem.tensors())
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        weight,
        labels,
        group=world,
        vocab_size=problem.vocab,
        temperature=problem.temperature,
        chunk=problem.chunk,
        kernel=kernel,
    )
    logprobs.backward(grad)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert hidden.grad is not None and weight.grad is not None
    tensors = {"logprobs": logprobs.detach(), "entropy": entropy, "d hidden": hidden.grad, "d weight": weight.grad}
    return {name: value.double().cpu().numpy() for name, value in tensors.items()}


def head(dtype: torch.dtype) -> Problem:
    """An output layer of a real vocabulary's order of size; logits vary by about 2."""
    return Problem(dtype=dtype, vocab=9999, padded=10000, hidden=64, tokens=256, chunk=48, scale=0.3)


def test_float32_logprobs_are_those_of_float64_within_rounding(world: dist.ProcessGroup) -> None:
    assert norm_error(logprobs_on_cuda(head(torch.float32), world), reference(head(torch.float32))) < 1e-5


@pytest.mark.parametrize("kernel", ["tiles", "triton"])
def test_bfloat16_rounds_nothing_on_the_way_to_a_logprob(world: dist.ProcessGroup, kernel: str) -> None:
    actual, expected = logprobs_on_cuda(head(torch.bfloat16), world, kernel), reference(head(torch.bfloat16))
    # A logit of up to 16 would be rounded by up to 2^-5. Gradients are rounded: of logits, and at the end.
    assert np.abs(actual["logprobs"] - expected["logprobs"]).max() < 1e-4
    assert np.abs(actual["entropy"] - expected["entropy"]).max() < 1e-4
    assert norm_error(actual, expected) < 0.02


def test_the_triton_head_gives_the_same_bits_every_time(world: dist.ProcessGroup) -> None:
    first, second = (logprobs_on_cuda(head(torch.bfloat16), world, "triton") for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [0.0, 1e30, float("nan")])
def test_padding_rows_of_the_vocabulary_may_hold_anything(world: dist.ProcessGroup, value: float) -> None:
    problem = Problem(dtype=torch.float32, padding_value=value)
    assert norm_error(logprobs_on_cuda(problem, world), reference(problem)) < 1e-5


# -------------------------------------------------------------------------------------------- row kernels, both forms


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_triton_kernels_of_rows_are_their_torch_forms_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    from megatron_gspo.kernels.norm import rms_norm
    from megatron_gspo.kernels.swiglu import swiglu

    def both(device: str, kernel: str, dtype: torch.dtype) -> Arrays:
        generator = torch.Generator().manual_seed(0)
        shapes = ((257, 1536), (257,), (257, 768), (768,))
        drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
        x, probs, grad, weight = (tensor.to(inputs).to(dtype).to(device).requires_grad_() for tensor in drawn)
        rms_norm(swiglu(x, probs, kernel), weight, 1e-6, kernel).backward(grad.detach())
        gradients = {"x": x.grad, "probs": probs.grad, "weight": weight.grad}
        return {name: tensor.double().cpu().numpy() for name, tensor in gradients.items() if tensor is not None}

    inputs = dtype  # float64 sees what was rounded to it
    assert norm_error(both("cuda", "triton", dtype), both("cpu", "torch", torch.float64)) < tolerance


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
def test_the_triton_rotation_is_its_torch_form_in_float64(
    dtype: torch.dtype, tolerance: float, neighbours: bool
) -> None:
    from megatron_gspo.kernels.rotary import rotate

    def both(device: str, kernel: str, dtype: torch.dtype) -> Arrays:
        generator = torch.Generator().manual_seed(0)
        x, grad = torch.randn(2, 257, 5, 128, generator=generator, dtype=torch.float64).to(inputs).to(dtype).to(device)
        angles = 3 * torch.randn(257, 48, generator=generator, dtype=torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = (table.float().to(wide).to(device) for table in (angles.cos(), angles.sin()))
        query = x.clone().requires_grad_()
        y = rotate(query, cos, sin, neighbours=neighbours, kernel=kernel)
        y.backward(grad)
        assert query.grad is not None
        return {name: each.detach().double().cpu().numpy() for name, each in {"y": y, "d x": query.grad}.items()}

    inputs = dtype  # float64 sees what was rounded to it
    assert norm_error(both("cuda", "triton", dtype), both("cpu", "torch", torch.float64)) < tolerance


# --------------------------------------------------------------------------------------------------- attention and norm


def megatron_config(dtype: torch.dtype):  # type: ignore[no-untyped-def]  # Megatron's class, imported late
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=GROUPS, params_dtype=dtype
    )


TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])


@pytest.mark.parametrize("context", [1, 2])
@TOLERANCES
def test_sdpa_of_all_ranks_is_the_attention_of_each_sequence_alone(
    dtype: torch.dtype, tolerance: float, context: int
) -> None:
    from megatron_gspo.megatron.attention import Sdpa

    actual = attention_of_ranks(Sdpa, dtype, context, "cuda")
    assert norm_error(actual, naive_attention(dtype, padded(context))) < tolerance


@pytest.mark.parametrize("context", [1, 2])
def test_torchs_variable_length_kernel_agrees_with_sdpa(context: int) -> None:
    from megatron_gspo.megatron.attention import Sdpa, Varlen

    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    actual, other = (attention_of_ranks(kernel, torch.bfloat16, context, "cuda") for kernel in (Varlen, Sdpa))
    assert norm_error(actual, other) < 0.01
    assert norm_error(actual, naive_attention(torch.bfloat16, padded(context))) < 0.01


def transformer_engine_attention(world: dist.ProcessGroup) -> Arrays:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_gspo.megatron.attention import core_attention

    config = megatron_config(torch.bfloat16)
    attention = core_attention(config)(
        config, 1, AttnMaskType.causal, "self", pg_collection=ProcessGroupCollection(tp=world, cp=world)
    )
    query, key, value, grad = (tensor.cuda() for tensor in attention_inputs(torch.bfloat16))
    inputs = {"query": query.requires_grad_(), "key": key.requires_grad_(), "value": value.requires_grad_()}
    ends = torch.tensor([0, *np.cumsum(LENGTHS).tolist()], dtype=torch.int32).cuda()
    longest = max(LENGTHS)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    output = attention(*inputs.values(), None, AttnMaskType.causal, packed_seq_params=packed)
    return results(output.reshape(len(grad), -1), grad, inputs)


def test_transformer_engines_attention_agrees_with_sdpa(world: dist.ProcessGroup) -> None:
    from megatron_gspo.megatron.attention import Sdpa, attention_kernel

    if attention_kernel(megatron_config(torch.bfloat16)) != "transformer_engine":
        pytest.skip("Transformer Engine is not installed")
    actual = transformer_engine_attention(world)
    assert norm_error(actual, attention_of_ranks(Sdpa, torch.bfloat16, 1, "cuda")) < 0.01
    assert norm_error(actual, naive_attention(torch.bfloat16)) < 0.01


def norm_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """x [T, H] of rows from 1e-3 to 1e3, weight [H] around 1, and the gradient [T, H] that arrives."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(64, 128, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = 1.0 + 0.5 * torch.rand(128, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (x * torch.logspace(-3, 3, 64, dtype=torch.float64)[:, None], weight, grad)]


def naive_norm(dtype: torch.dtype) -> Arrays:
    x, weight, grad = (tensor.double() for tensor in norm_inputs(dtype))
    inputs = {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
    return results(weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6), grad, inputs)


def norm_on_cuda(dtype: torch.dtype) -> Arrays:
    from megatron_gspo.megatron.spec import RMSNorm

    x, weight, grad = (tensor.cuda() for tensor in norm_inputs(dtype))
    norm = RMSNorm(megatron_config(dtype), hidden_size=x.shape[1], eps=1e-6)
    norm.weight.data.copy_(weight)
    assert norm.weight.device == x.device
    return results(norm(x.requires_grad_()), grad, {"x": x, "weight": norm.weight})


@TOLERANCES
def test_the_norm_is_that_of_float64(dtype: torch.dtype, tolerance: float) -> None:
    assert norm_error(norm_on_cuda(dtype), naive_norm(dtype)) < tolerance
