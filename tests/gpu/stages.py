"""What a GPU has to show, in stages by name, each in a process of its own and with its results in a file.

    python -m tests.gpu.stages layers --out results/layers.json
    python -m tests.gpu.stages layers --out results/layers.json --rehearse     # the same code, small, on a CPU

``lease.sh`` runs several in turn. A stage returns numbers; what they should be is in ``README.md``, and what they were
on which card in docs/gpu.md and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

Result = dict[str, Any]
WORLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""bfloat16 operations a second of dense matrix products, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Sizes:
    """How large the stages' models are."""

    tokens: int
    layers: int
    hidden: int
    heads: int
    experts: int
    vocab: int
    repetitions: int


FULL = Sizes(tokens=8192, layers=4, hidden=2048, heads=32, experts=128, vocab=151_936, repetitions=5)
"""Four layers of Qwen3-30B-A3B."""
SMALL = Sizes(tokens=256, layers=2, hidden=64, heads=4, experts=16, vocab=999, repetitions=1)


# -------------------------------------------------------------------------------------------------------------- stages


def imports(sizes: Sizes) -> Result:
    """Versions, what each operation runs as, and one step of a small policy in bfloat16."""
    import megatron.core

    policy, batch = policy_of(replace(SMALL, repetitions=1))
    norm, _ = step(policy, batch)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "megatron-core": megatron.core.__version__,
        "device": card(),
        "runs as": chosen(policy),
        "gradient norm of a first step": norm,
    }


def kernels(sizes: Sizes) -> Result:
    """The largest error of each kernel against float64, as a part of the largest entry."""
    return {"grouped": grouped_errors(sizes), "sums": sum_errors(sizes), "tests": pytest_of("test_kernels.py")}


def noise(sizes: Sizes) -> Result:
    """pi_old's pass against the forward of training, by default and under ``train.deterministic``."""
    found: Result = {}
    for name, deterministic in (("default", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(deterministic)
        policy, batch = policy_of(sizes, deterministic=deterministic)
        found[name] = differences(policy, batch)
        let_go(policy)
        del policy
    torch.use_deterministic_algorithms(False)
    return found


def step_of_a_cpu(sizes: Sizes) -> Result:
    """A policy's whole step against the same step on the CPU, AdamW's formula, repetition bit by bit."""
    return {"tests": pytest_of("test_policy.py")}


def resume(sizes: Sizes) -> Result:
    """A checkpoint, and the next step from it and without it: the largest difference of a weight, which is to be 0."""
    from megatron_gspo.megatron.checkpoint import load_checkpoint, save_checkpoint

    small = replace(SMALL, layers=2)
    policy, batch = policy_of(small, deterministic=True)
    torch.use_deterministic_algorithms(True)
    step(policy, batch)
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint({"policy": policy}, Path(directory) / "checkpoint", {})
        step(policy, batch)
        went_on = weights(policy)
        again, _ = policy_of(small, deterministic=True)
        load_checkpoint({"policy": again}, Path(directory) / "checkpoint")
    step(again, batch)
    torch.use_deterministic_algorithms(False)
    return {"largest difference": max(float(np.abs(went_on[name] - w).max()) for name, w in weights(again).items())}


def layers(sizes: Sizes) -> Result:
    """Seconds, share of peak and peak memory of a pi_old pass and of gradients over a micro-batch, and a profile."""
    found: Result = {"device": card(), "tokens": sizes.tokens, "layers": sizes.layers}
    for recompute in ("off", "full"):
        policy, batch = policy_of(sizes, recompute=recompute)
        found["runs as"] = chosen(policy)
        found[f"recompute {recompute}"] = timed(policy, batch, sizes, recompute)
        if recompute == "off":
            found["profile"] = profile(policy, batch)
        let_go(policy)
        del policy
    return found


def bench(sizes: Sizes) -> Result:
    """``megatron-gspo bench`` of experts and logprobs."""
    small = ["--widths", "64", "--repetitions", "2"] if sizes is SMALL else ["--widths", "256", "1024", "2048"]
    dtype = ["--dtype", "float32" if sizes is SMALL else "bfloat16"]
    experts = command("bench", "experts", *small, *dtype, "--rows", "8" if sizes is SMALL else "512", "--json")
    return {"experts": experts, "logprobs": command("bench", "logprobs", "--quick", "--json")}


STAGES: dict[str, Callable[[Sizes], Result]] = {
    "imports": imports,
    "kernels": kernels,
    "noise": noise,
    "step": step_of_a_cpu,
    "resume": resume,
    "layers": layers,
    "bench": bench,
}
"""In the order in which they are worth their time."""
DETERMINISTIC = ("noise", "resume")
"""Those that turn torch's deterministic algorithms on. On a GPU these refuse the first matrix product unless cuBLAS was
told of it before the first of all, whichever algorithms were asked for then."""


# ------------------------------------------------------------------------------------------------- models and passes


def policy_of(sizes: Sizes, *, recompute: str = "off", deterministic: bool = False) -> tuple[Any, Any]:
    """(a policy of random weights on this device, a micro-batch for it); no file of weights is written or read."""
    from megatron_gspo import config
    from megatron_gspo.megatron import network
    from megatron_gspo.megatron.groups import device, make_groups
    from megatron_gspo.megatron.policy import Policy

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config_json(sizes)), encoding="utf-8")
        tree = {
            "model": {"path": directory, "dtype": "bfloat16", "recompute": recompute},
            "data": {"path": "unused"},
            "train": {"run_dir": "nowhere", "deterministic": deterministic},
            "rollout": {"temperature": 1.0},
        }
        settings = config.parse(tree)
        groups = make_groups(settings.parallel)
        with mock.patch.object(network.Network, "_load", lambda self, path: draw_weights(self)):
            policy = Policy(settings, groups)
    return policy, microbatch(sizes).to(device())


def config_json(sizes: Sizes) -> Result:
    """Qwen3-30B-A3B's, of these sizes."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "vocab_size": sizes.vocab,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": max(1, sizes.heads // 8),
        "head_dim": 128 if sizes is FULL else 16,
        "intermediate_size": 3 * sizes.hidden,
        "moe_intermediate_size": 768 if sizes is FULL else 32,
        "num_experts": sizes.experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.0,
    }


@torch.no_grad()
def draw_weights(policy: Any) -> None:
    """Matrices that keep a row's size, norms of 1; the same on every call. Logits vary by about 4."""
    generator = torch.Generator(policy_device()).manual_seed(0)
    for chunk in policy.chunks:
        for name, weight in chunk.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            scale = 4.0 if name.startswith("output_layer") else 1.0
            weight.normal_(0.0, scale / weight.shape[-1] ** 0.5, generator=generator)


def policy_device() -> torch.device:
    from megatron_gspo.megatron.groups import device

    return device()


def microbatch(sizes: Sizes) -> Any:
    """Responses of about 1,000 tokens, in one pack of ``sizes.tokens``."""
    from megatron_gspo.batching.packing import pack
    from megatron_gspo.types import PlacedSample

    generator, length = np.random.default_rng(0), min(1024, sizes.tokens // 4)
    samples = []
    for number in range(sizes.tokens // length):
        ids = generator.integers(0, sizes.vocab, length).astype(np.int32)
        zeros = np.zeros(length - 16)
        rest = {"rollout_logprobs": zeros, "advantage": 1.0, "token_advantages": zeros + 1.0, "weight": 1.0}
        samples.append(PlacedSample.of_response(ids[:16], ids[16:], group=0, sample=number, **rest))
    return pack(samples, loss_dtype=torch.float32, tensor=1, context=1)


def mean_logprob(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
    return logprobs_T.nan_to_num().mean()


def step(policy: Any, batch: Any) -> tuple[float, float]:
    """One step of the mean logprob: (gradient norm, learning rate)."""
    policy.gradients([batch], mean_logprob)
    norm: tuple[float, float] = policy.step(0, 1)
    return norm


def weights(policy: Any) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in policy.weights()}


def differences(policy: Any, batch: Any) -> Result:
    """Of a pi_old pass from the next one, and from the forward of training; and the noise of log s_i."""
    (old_T, _), (again_T, _) = policy.logprobs([batch])[0], policy.logprobs([batch])[0]
    kept: list[torch.Tensor] = []

    def keep(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        kept.append(logprobs_T.detach().clone())
        return mean_logprob(index, logprobs_T, entropy_T)

    policy.gradients([batch], keep)
    change_T = (kept[0] - old_T).double()
    ends = batch.cu_seqlens.tolist()
    log_ratios = [float(change_T[start : end - 1].mean()) for start, end in itertools.pairwise(ends)]
    return {
        "largest difference of a logprob, pass to pass": float((again_T - old_T).abs().max()),
        "largest difference of a logprob, pass to training": float(change_T.abs().max()),
        "root mean square of log s_i": float(np.sqrt(np.mean(np.square(log_ratios)))),
    }


def timed(policy: Any, batch: Any, sizes: Sizes, recompute: str) -> Result:
    """Median seconds of both passes, their share of the card's peak, and the most memory that gradients take."""
    old = seconds(lambda: policy.logprobs([batch]), sizes.repetitions)
    held = reset_peak()
    train = seconds(lambda: policy.gradients([batch], mean_logprob), sizes.repetitions)
    forward = operations(sizes)
    times = 4 if recompute == "full" else 3
    peak = next((rate for name, rate in PEAK.items() if name in card()), None)
    found: Result = {"pi_old s": old, "gradients s": train, "tokens a second, gradients": sizes.tokens / train}
    if peak:
        # A recomputed forward is work of the card, and none of the model's.
        found["share of peak, pi_old"] = forward / old / peak
        found["share of peak, gradients"] = 3 * forward / train / peak
        found["share of peak, with recompute"] = times * forward / train / peak
    if torch.cuda.is_available():
        found["GiB held"] = held / 2**30
        found["GiB at the peak above that"] = (torch.cuda.max_memory_allocated() - held) / 2**30
    found["step s"] = seconds(lambda: policy.step(0, 1), 1)
    return found


def operations(sizes: Sizes) -> float:
    """Floating-point operations of a forward pass: two for each weight that a token meets, and attention's scores."""
    shape = config_json(sizes)
    query = sizes.heads * shape["head_dim"]
    attention = sizes.hidden * (2 * query + 2 * shape["num_key_value_heads"] * shape["head_dim"])
    experts = 8 * 3 * sizes.hidden * shape["moe_intermediate_size"] + sizes.hidden * sizes.experts
    length = min(1024, sizes.tokens // 4)
    scores = 2 * query * length / 2  # causal: half of the square
    a_token = sizes.layers * (2 * (attention + experts) + 2 * scores) + 2 * sizes.hidden * sizes.vocab
    return float(a_token * sizes.tokens)


def profile(policy: Any, batch: Any) -> list[Result]:
    """The twelve operations that take most of the device's time in a gradient pass."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profiler(activities=activities) as traced:
        policy.gradients([batch], mean_logprob)
        synchronize()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(traced.key_averages(), key=lambda row: -getattr(row, own))[:12]
    return [{"name": row.key[:80], "ms": getattr(row, own) / 1e3, "calls": row.count} for row in rows]


# ---------------------------------------------------------------------------------------------------------- kernels


def grouped_errors(sizes: Sizes) -> Result:
    """Of the grouped product, forward and both gradients, against a loop in float64; some experts have no rows."""
    from megatron_gspo.parallel.grouped import Runs, grouped_linear, product_form

    where, found = policy_device(), {}
    generator = torch.Generator().manual_seed(0)
    width, most = sizes.hidden, 37
    counts = torch.randint(0, 2 * most, (16,), generator=generator)
    counts[3] = counts[15] = 0
    drawn = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) / width**0.5
        for shape in ((int(counts.sum()), width), (16, width // 2, width), (int(counts.sum()), width // 2))
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, grad = (tensor.to(where, dtype) for tensor in drawn)
        form = product_form(width // 2, width, dtype, "cuda")
        outputs = []
        for kind, run in ((dtype, form), (torch.float64, "loop")):
            # Detached: of the same dtype ``to`` gives the tensor itself, whose next copy would be no leaf.
            rows_NI, weight_EOI = (tensor.detach().to(kind).requires_grad_() for tensor in (x, weight))
            y = grouped_linear(rows_NI, weight_EOI, Runs(counts.to(where)), run)
            y.backward(grad.to(kind))
            outputs.append([y.detach(), rows_NI.grad, weight_EOI.grad])
        names = ("y", "dx", "dW")
        found[f"{form} {dtype}"] = {
            name: float((a.double() - b).abs().max() / b.abs().max())
            for name, a, b in zip(names, *outputs, strict=True)
        }
    return found


def sum_errors(sizes: Sizes) -> Result:
    """A token's rows, added in bfloat16 by the device's bag of embeddings, against one rounding of the exact sum."""
    from megatron_gspo.parallel.dispatch import ordered_sum

    where, generator = policy_device(), torch.Generator().manual_seed(0)
    rows = torch.randn(8 * 512, sizes.hidden, generator=generator).to(where, torch.bfloat16)
    order = torch.randperm(8 * 512, generator=generator).view(512, 8).to(where)
    found, exact = ordered_sum(rows, order), rows.double()[order].sum(1)
    again = all(torch.equal(found, ordered_sum(rows, order)) for _ in range(5))
    half_ulp = exact.abs() * 2.0**-8
    return {"repeats bit by bit": again, "within a rounding": bool(((found.double() - exact).abs() <= half_ulp).all())}


def chosen(policy: Any) -> Result:
    """What runs as what, as the code chooses it."""
    from megatron_gspo.megatron.attention import attention_kernel
    from megatron_gspo.parallel.grouped import product_form

    config = policy.chunks[0].config
    where = policy_device().type
    form = product_form(2 * config.moe_ffn_hidden_size, config.hidden_size, config.params_dtype, where)
    return {"attention": attention_kernel(config), "experts": form}


# -------------------------------------------------------------------------------------------------------- the machine


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repetitions: int) -> float:
    """Median, after one that warms up."""
    taken = []
    for turn in range(repetitions + 1):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        if turn or repetitions == 0:
            taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def reset_peak() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def let_go(policy: Any) -> None:
    """Gives a policy's device memory back. The hooks that Megatron puts on gradients hold its buffers in circles that
    go through torch's own objects, and that Python does not find. Weights of the last step may still be on their way
    into them."""
    from megatron_gspo.megatron.optimizer import finish_gathers

    finish_gathers(policy.modules)
    for module in policy.modules:
        for buffer in (*module.buffers, *module.expert_parallel_buffers):
            for data in (buffer.param_data, buffer.grad_data):
                if data is not None:
                    data.untyped_storage().resize_(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_of(file: str) -> Result:
    """Passed, failed and skipped tests of a file beside this one, with the last line of each failure; the log has all
    that pytest says, as it says it."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--no-header", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name not in WORLD}
    lines = [""]
    with subprocess.Popen(
        [*command, f"tests/gpu/{file}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            lines += [line.strip()] if line.strip() else []
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if running.returncode:
        failures = failures or [f"pytest ended with status {running.returncode}"]
    return {"last line": lines[-1], "failures": failures}


def command(*words: str) -> Any:
    """A command's JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_gspo.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in WORLD},
    )
    return json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-1000:]}


@contextmanager
def a_world_of_one() -> Iterator[None]:
    from megatron_gspo.megatron.groups import start_distributed

    with mock.patch.dict(os.environ, WORLD):
        start_distributed(timeout_s=120)
        yield
        torch.distributed.destroy_process_group()


def prepare(stage: str) -> None:
    """What a process needs before its first matrix product."""
    if stage in DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def main() -> int:
    """Runs one stage; its status is 1 when it raised, or a test or command of it failed, and the file says what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on a CPU")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare(options.stage)
    from megatron_gspo.quiet import mute

    mute()
    started, result, status = time.perf_counter(), {}, 0
    try:
        with a_world_of_one():
            result = STAGES[options.stage](SMALL if options.rehearse else FULL)
        parts = [part for part in result.values() if isinstance(part, dict)]
        status = int(any(part.get("failures") or part.get("failed") for part in parts))
    except Exception as error:
        import traceback

        result, status = {"raised": f"{type(error).__name__}: {error}", "at": traceback.format_exc()[-6000:]}, 1
    result["seconds"] = round(time.perf_counter() - started, 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
