"""Runs one SGLang server; on a machine without CUDA it first answers what SGLang asks of an accelerator.

Executed by path with the Python of the environment that holds sglang, where megatron_gspo is not installed:

    .venv-sglang/bin/python megatron_gspo/rollout/sglang/server.py --model-path DIR --port 30000 ...

The arguments are SGLang's own (``rollout.sglang.arguments.server_arguments`` writes them). Its scheduler and
detokenizer are spawned processes that import this file again, so the stand-ins are installed at import, not under
``__main__``.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",  # selects SGLang's CPU platform
    "OMP_NUM_THREADS": "1",  # threads of three processes spinning on few cores: 10 to 30 times slower when unset
    "TORCHDYNAMO_DISABLE": "1",  # the sampler is torch.compiled, and compiling it takes longer than running it
}
PARENT = "MEGATRON_GSPO_PARENT_PID"
KEY = "MEGATRON_GSPO_SERVER_KEY"
FILES = "MEGATRON_GSPO_SERVER_FILES"
"""Environment variable: a server's own directory of temporary files, which goes with it."""
SHARED = "/dev/shm/"


def serve(arguments: list[str]) -> None:
    """Serves until it is told to stop."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    if key := os.environ.pop(KEY, ""):
        keep_from_log(key)
        arguments = [*arguments, f"--api-key={key}"]  # of this call, not of the process: those everybody can read
    server_args = prepare_server_args(arguments)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def keep_from_log(key: str) -> None:
    """Has the server's log, which shows every setting, show another key than its own."""
    from sglang.srt.entrypoints import engine

    shown = engine._server_args_for_logging
    engine._server_args_for_logging = lambda server_args: {
        name: "..." if value == key else value for name, value in shown(server_args).items()
    }


def die_with(parent: int) -> None:
    """Kills this server's process group within a second of ``parent`` going away, however it went, and removes what
    only an orderly end would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    group = os.getpgrp()
    left = shared_memory(group)
    for member in members(group):
        if member != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
    remove(left, os.environ.get(FILES))
    os.killpg(group, signal.SIGKILL)


def members(group: int) -> list[int]:
    """Processes of a process group; zombies among them."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(int(name)) == group:
                found.append(int(name))
    return found


def shared_memory(group: int) -> set[str]:
    """Files of /dev/shm that processes of a group have mapped or open: segments and semaphores, which nobody removes
    when they are killed. (Not what lies in directories there: weights on their way are not the server's.)

    Told by their inodes: a semaphore is made under another name than it gets.
    """
    inodes = set()
    for member in members(group):
        with contextlib.suppress(OSError):  # it has ended
            with open(f"/proc/{member}/maps", errors="replace") as maps:
                inodes |= {int(line.split()[4]) for line in maps if SHARED in line}
            for name in os.listdir(f"/proc/{member}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{member}/fd/{name}").startswith(SHARED):
                        inodes.add(os.stat(f"/proc/{member}/fd/{name}").st_ino)
    try:
        return {entry.path for entry in os.scandir(SHARED) if entry.inode() in inodes and not entry.is_dir()}
    except OSError:  # there is none on this machine
        return set()


def remove(left: Iterable[str], directory: str | None) -> None:
    """Removes shared memory, and the directory of temporary files."""
    for path in left:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if directory:
        shutil.rmtree(directory, ignore_errors=True)


def listen_on_loopback() -> None:
    """Has torch's store listen where its address says, if that is loopback: by itself it listens on every interface."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    plain = rendezvous.TCPStore

    def store(*, host_name: str, port: int, is_master: bool, **settings: Any) -> Any:
        if not (is_master and host_name.startswith("127.")):
            return plain(host_name=host_name, port=port, is_master=is_master, **settings)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host_name, port))
            listener.listen(128)
            settings |= {"master_listen_fd": listener.fileno(), "multi_tenant": False}
            made = plain(host_name=host_name, port=port, is_master=True, **settings)
            listener.detach()  # the store closes it
        return made

    rendezvous.TCPStore = store


SCORING = ("sglang.srt.models.qwen2_classification", "sglang.srt.models.qwen3_classification")
"""Models of SGLang 0.5.23 that score a sequence by a head with a bias. transformers' has none, so no file fills it, and
every score is off by the random number that it starts from."""


class HeadsWithoutBias(importlib.abc.MetaPathFinder):
    """Has the biases of ``SCORING`` start from 0 instead: then a score is transformers'. A file that has one fills it.

    They are imported by SGLang when it wants them, and are changed then.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in SCORING else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: types.ModuleType) -> None:
            execute(module)
            for found in vars(module).values():
                if isinstance(found, type) and found.__name__.endswith("ForSequenceClassification"):
                    _start_bias_from_zero(found)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _start_bias_from_zero(model: Any) -> None:
    made = model.__init__

    def make(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        if getattr(self.score, "bias", None) is not None:
            self.score.bias.data.zero_()

    model.__init__ = make


def install_cpu_stand_ins() -> None:
    """Installs every entry of ``STAND_INS``."""
    for install in STAND_INS:
        install()


def _torchvision_operators() -> None:
    """torchvision's wheel is a CUDA build: its import registers fake kernels for operators that it then lacks."""
    import torch

    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _sgl_kernel() -> None:
    """sgl_kernel has no CPU wheel. Its names are imported unconditionally and never called: they raise if they are."""
    module = types.ModuleType("sgl_kernel")
    module.__path__ = []  # a package, so that ``import sgl_kernel.x`` fails as for any missing submodule

    def missing(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: object, **kwargs: object) -> object:
            raise RuntimeError(f"sgl_kernel.{name} was called, and there is no sgl_kernel for this CPU")

        return call

    module.__getattr__ = missing  # type: ignore[method-assign]
    sys.modules["sgl_kernel"] = module


def _pinned_memory() -> None:
    """Capturing routed experts registers its host buffer with the CUDA runtime."""
    import torch

    success = types.SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    torch.cuda.cudart = lambda: success


def _deterministic_attention() -> None:
    """``sampling_seed`` needs deterministic inference, which does not list torch_native (one thread is repeatable)."""
    from sglang.srt.arg_groups import choices

    choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")


def _batch_invariance() -> None:
    """Deterministic inference replaces operators by Triton kernels; on a CPU they stay as they are."""
    from sglang.srt import batch_invariant_ops

    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None


def _seeded_hash() -> None:
    """The seeded sampler's hash is a Triton kernel, or an operator of sgl_kernel on a CPU: here it is torch."""
    import torch

    torch.library.define("sgl_kernel::murmur_hash32_cpu", "(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    torch.library.impl("sgl_kernel::murmur_hash32_cpu", "CPU", murmur_hash32)


def _shared_expert_gate() -> None:
    """Qwen2-MoE adds its gated shared expert by a Triton kernel."""
    import torch
    from sglang.kernels.ops.elementwise import elementwise

    def add(hidden_TH: torch.Tensor, gate_H: torch.Tensor, shared_TH: torch.Tensor, output_TH: torch.Tensor) -> None:
        output_TH.addcmul_(torch.sigmoid(hidden_TH @ gate_H).unsqueeze(1), shared_TH)

    elementwise.fused_gate_sigmoid_mul_add = add


def _matrices_of_eight_bits() -> None:
    """SGLang multiplies by them on GPUs, and on CPUs with AMX; elsewhere it does not load them."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod

    blocks = _beside("blocks")

    def linear(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = blocks.product(x, layer.weight, layer.weight_scale_inv)
        return out if bias is None else out + bias

    def experts(self: Any, layer: Any, dispatch_output: Any) -> Any:
        gate_up, down = (layer.w13_weight, layer.w13_weight_scale_inv), (layer.w2_weight, layer.w2_weight_scale_inv)
        weights_TK, chosen_TK = dispatch_output.topk_output[:2]
        return StandardCombineInput(blocks.experts(dispatch_output.hidden_states, gate_up, down, weights_TK, chosen_TK))

    Fp8LinearMethod.apply, Fp8MoEMethod.apply = linear, experts
    for method in (Fp8LinearMethod, Fp8MoEMethod):  # what would pack them for AMX: they stay as they came
        method.process_weights_after_loading = lambda self, layer: None


def _beside(name: str) -> Any:
    """A module of this directory, which no path of imports has."""
    spec: Any = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _attention_by_length() -> None:
    """SGLang's attention in torch takes one sequence at a time, which is most of what a small model costs."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    ours = _beside("attention")
    extend, decode = Backend._run_sdpa_forward_extend, Backend._run_sdpa_forward_decode
    Backend._run_sdpa_forward_extend = _where_it_applies(ours.attend_extend, extend, causal=True)
    Backend._run_sdpa_forward_decode = _where_it_applies(ours.attend_decode, decode, causal=False)


def _where_it_applies(
    grouped: Callable[..., torch.Tensor], one_by_one: Callable[..., torch.Tensor], *, causal: bool
) -> Callable[..., torch.Tensor]:
    """``grouped`` for a decoder's self-attention; ``one_by_one`` with an encoder or a sliding window."""

    def attend(self: object, *tensors: Any, **options: Any) -> torch.Tensor:
        without_encoder = tensors[-1] is None and not options["is_cross_attn"]
        if without_encoder and options["causal"] is causal and options["sliding_window_size"] is None:
            return grouped(*tensors[:-1], scale=options["scaling"], enable_gqa=options["enable_gqa"])
        return one_by_one(self, *tensors, **options)

    return attend


STAND_INS = (
    _torchvision_operators,
    _sgl_kernel,
    _pinned_memory,
    _shared_expert_gate,
    _matrices_of_eight_bits,
    _attention_by_length,
    # Seeded sampling:
    _deterministic_attention,
    _batch_invariance,
    _seeded_hash,
)


def murmur_hash32(seed_N: torch.Tensor, positions_N: torch.Tensor, columns_M: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits) of the 16 bytes (seed 64, position 32, column 32): [N, M] uint32.

    Integer products wrap modulo 2**64, which leaves the low 32 bits right.
    """
    import torch

    low = 0xFFFFFFFF
    seed_N1 = seed_N.to(torch.int64)[:, None]
    position_N1 = positions_N.to(torch.int64)[:, None]

    def rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
        return ((x << bits) | (x >> (32 - bits))) & low

    h = torch.zeros_like(seed_N1)
    for block in (seed_N1 & low, (seed_N1 >> 32) & low, position_N1 & low, columns_M.to(torch.int64) & low):
        k = rotate(block * 0xCC9E2D51 & low, 15) * 0x1B873593 & low
        h = (rotate(h ^ k, 13) * 5 + 0xE6546B64) & low
    h = h ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * factor & low
    return (h ^ (h >> 16)).to(torch.uint32)


def _without_cuda() -> bool:
    import torch

    return not torch.cuda.is_available()


if __name__ in ("__main__", "__mp_main__"):  # the server, or a process that it spawned
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to trainers, and to whatever is in their step
    listen_on_loopback()
    sys.meta_path.insert(0, HeadsWithoutBias())

if __name__ in ("__main__", "__mp_main__") and _without_cuda():
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    install_cpu_stand_ins()

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a local directory
    if PARENT in os.environ:
        threading.Thread(target=die_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    serve(sys.argv[1:])
