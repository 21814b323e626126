"""Low-rank adapters on Megatron's linear layers (LoRA, arXiv 2106.09685): what is trained of a policy under ``[lora]``.

An adapter adds scale x (x A^T) B^T to what its layer gives of x. The merged weight W + scale x B A would give the same
by one product, but a gradient by it is that of a whole weight, in memory and time; so the forward has two products, and
the weights are merged where they leave the trainer (``hf.lora.merge``).

A layer of Megatron's may be several matrices of Hugging Face's (query, key and value; gate and up): each has an A and a
B of its own. Their A stand below each other in one product, and their B are the blocks of one matrix whose rows are in
the layer's order, with zeros between the blocks: joined by the rule of the layer's own weight, whatever it is.

Over ranks, with n tensor ranks that each hold T / n tokens between layers:

    rows of W here (qkv, gate and up)   h = gather of the tokens of x_own A^T, y = h B_own^T
    columns of W here (out, down)       h = sum and scatter over tokens of x A_own^T, y_own = h B^T
    all of W here (latent down)         y_own = x_own A^T B^T
    experts                             y = x A_own^T B_own^T: their partial sums meet when rows go back

So what crosses ranks is r wide. Of what each tensor rank holds whole, A or B, a rank's gradient is that of its own
tokens: ``sequence_parallel`` has Megatron add them up, as those of norms. Of an expert's, it is that of the rank's own
rows or columns, and no reduction of Megatron's is over expert-tensor ranks alone: ``sum_shared_gradients`` is.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_gspo.config import LoraConfig
from megatron_gspo.errors import WeightError
from megatron_gspo.hf.family import Family
from megatron_gspo.hf.lora import (
    INSIDE,
    PEFT_PREFIX,
    A,
    B,
    Target,
    adapted_weight,
    adapter_name,
    adapter_rules,
    lora_targets,
    merge,
)
from megatron_gspo.hf.weights import NamedRule, WeightRule, take_piece
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.context import gather_rows, scatter_sum
from megatron_gspo.parallel.gradients import sum_gradients
from megatron_gspo.parallel.grouped import Runs, grouped_linear

if TYPE_CHECKING:
    from megatron_gspo.hf.checkpoint import HfReader
    from megatron_gspo.megatron.model import Own, PolicyModel


class Adapter(torch.nn.Module):
    """What stands on one linear layer: ``q_proj_A`` [r, in] and ``q_proj_B`` [out, r] for each of its matrices that is
    a target, with a dimension of experts first where the layer has them in one weight."""

    def __init__(
        self, weight: torch.nn.Parameter, rule: WeightRule, targets: Sequence[Target], lora: LoraConfig, groups: Groups
    ) -> None:
        """``rule`` is that of the layer's ``weight``, ``targets`` those of its matrices that get an adapter."""
        super().__init__()
        self.rule, self.groups, self.scale, self.rank = rule, groups, lora.scale, lora.rank
        self.on = True
        # A weight of several experts is cut like one expert's, with the experts behind.
        pieces = rule.split(_experts_last(weight.detach()))
        self._rows = [piece.shape[0] for piece in pieces]
        self._names = [name.rsplit(".", 2)[1] for name in rule.hf]
        self.projections = [target.projection for target in targets]
        for name, piece in zip(self._names, pieces, strict=True):
            if name in self.projections:
                experts, (outputs, inputs) = weight.shape[:-2], piece.shape[:2]
                for part, shape in (("A", (lora.rank, inputs)), ("B", (outputs, lora.rank))):
                    self.register_parameter(f"{name}_{part}", torch.nn.Parameter(weight.new_empty(*experts, *shape)))

    def forward(self, x: torch.Tensor, runs: Runs | None = None) -> torch.Tensor:
        """What is added to the layer's output of ``x``; ``runs`` for a weight of several experts."""
        down = torch.cat([getattr(self, f"{name}_A") for name in self.projections], dim=-2)
        if runs is not None:
            return grouped_linear(self.scale * grouped_linear(x, down, runs), self._up(), runs)
        if self.rule.is_expert:
            return F.linear(self.scale * F.linear(x, down), self._up())
        hidden = self.scale * F.linear(x, down)
        if self.rule.cut == "rows":
            hidden = gather_rows(hidden, self.groups.tensor)
        elif self.rule.cut == "columns":
            hidden = scatter_sum(hidden, self.groups.tensor)
        return F.linear(hidden, self._up())

    def _up(self) -> torch.Tensor:
        """[(experts,) out, r x projections]: every B in the columns of its own A, its rows where the layer has them."""
        width, blocks = self.rank * len(self.projections), []
        for name, rows in zip(self._names, self._rows, strict=True):
            if name not in self.projections:
                blocks.append(_experts_last(self._any().new_zeros(*self._any().shape[:-2], rows, width)))
                continue
            before = self.rank * self.projections.index(name)
            b = F.pad(getattr(self, f"{name}_B"), (before, width - self.rank - before))
            blocks.append(_experts_last(b))
        return _experts_first(self.rule.join(blocks)).contiguous()

    def _any(self) -> torch.Tensor:
        return next(self.parameters())


def _experts_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.movedim(0, -1) if weight.dim() == 3 else weight


def _experts_first(weight: torch.Tensor) -> torch.Tensor:
    return weight.movedim(-1, 0) if weight.dim() == 3 else weight


@dataclass(frozen=True)
class Pair:
    """The two matrices of one Hugging Face matrix, this rank's pieces of them."""

    a: Own
    b: Own


class Lora:
    """The adapters of one virtual stage."""

    def __init__(self, policy: PolicyModel, family: Family, lora: LoraConfig) -> None:
        """Puts adapters, without values, onto a stage whose weights are there, and freezes those."""
        self.settings, self._policy = lora, policy
        self.targets = lora_targets(family, policy.shape, lora)
        self.rules = adapter_rules(self.targets)
        by_rule: dict[str, list[Target]] = {}
        for target in self.targets:
            by_rule.setdefault(target.rule.megatron, []).append(target)
        self.adapters: list[Adapter] = []
        found = {id(own.parameter): named.rule for own, named in policy.rules(family)}
        for layer in list(policy.modules()):
            weight = layer._parameters.get("weight")
            rule = found.get(id(weight))
            if weight is not None and rule is not None and rule.megatron in by_rule:
                self._adapt(layer, weight, rule, by_rule[rule.megatron])
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        for adapter in self.adapters:
            adapter.requires_grad_(True)
        _let_gradients_through(policy)

    def _adapt(
        self, layer: torch.nn.Module, weight: torch.nn.Parameter, rule: WeightRule, targets: Sequence[Target]
    ) -> None:
        adapter = Adapter(weight, rule, targets, self.settings, self._policy.groups)
        layer.add_module(INSIDE.strip("."), adapter)
        layer.register_forward_hook(_add)
        self.adapters.append(adapter)

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """(Hugging Face name of a weight, its adapter)."""
        owns = {named.hf_names[0]: own for own, named in self._policy.adapter_rules()}
        for name, own in owns.items():
            weight = adapted_weight(name)
            if name == adapter_name(weight, A):
                yield weight, Pair(own, owns[adapter_name(weight, B)])

    @cached_property
    def by_weight(self) -> dict[str, Pair]:
        """``pairs``, by the weight's name."""
        return dict(self.pairs())

    def merged(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        """A rank's piece of a Hugging Face weight, with its adapter merged in where it has one."""
        pair = self.by_weight.get(name)
        return piece if pair is None else merge(piece, pair.a.data, pair.b.data, self.settings.scale)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was before training, within."""
        for adapter in self.adapters:
            adapter.on = False
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter.on = True


def _add(layer: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """A forward hook of a layer: its output, with what its adapter adds."""
    adapter: Any = layer.lora
    if not adapter.on:
        return output
    if isinstance(output, torch.Tensor):
        return output + adapter(*inputs)
    product, bias = output
    return product + adapter(*inputs), bias


def _let_gradients_through(policy: PolicyModel) -> None:
    """Makes what comes out of a frozen embedding need a gradient: recompute keeps none of what nothing needs one of,
    the adapters' among it, and a stage without adapters must have an output to differentiate."""

    def need(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    if policy.pre_process:
        policy.embedding.register_forward_hook(need)


def mark_adapters(policy: PolicyModel) -> None:
    """Sets what Megatron's DDP, reductions and gradient norm read off a parameter (``model._mark_parameters``)."""
    expert_tensor = policy.groups.megatron.expt_tp
    for own, named in policy.adapter_rules():
        parameter: Any = own.parameter
        whole = named.rule.cut == "whole"
        if not named.rule.is_expert:
            parameter.tensor_model_parallel = not whole
            parameter.sequence_parallel = whole and policy.config.sequence_parallel
            continue
        parameter.allreduce = False
        parameter.tensor_model_parallel = True  # else 0.16.1's norm takes it from the first *dense* tensor rank alone
        parameter.shared_by_expert_tensor = whole and expert_tensor.size() > 1
        parameter.shared = parameter.shared_by_expert_tensor and expert_tensor.rank() > 0  # counted in the norm once


def sum_shared_gradients(modules: Sequence[Any]) -> None:
    """Completes the gradients of what expert-tensor ranks hold whole, each of which knows its own rows' or columns'
    part. After Megatron's reductions, on policies under DDP: a bucket's shares are the same on these ranks. Collective.
    """
    gradients = [
        parameter.main_grad
        for module in modules
        for parameter in module.parameters()
        if getattr(parameter, "shared_by_expert_tensor", False)
    ]
    sum_gradients(gradients, modules[0].module.groups.megatron.expt_tp)


@torch.no_grad()
def fill_adapters(policy: PolicyModel, reader: HfReader | None, seed: int) -> None:
    """Values of a stage's adapters: those of a directory, or PEFT's first ones, A uniform in +-1 / sqrt(in) and B zero.

    The same in every layout. Raises WeightError for tensors that are missing or of another shape.
    """
    for own, named in policy.adapter_rules():
        (name,) = named.hf_names
        group = policy.groups.megatron.expt_tp if named.rule.is_expert else policy.groups.tensor
        shape = _whole_shape(own.data.shape, named, group.size())
        tensor = _first_values(name, shape, seed) if reader is None else reader.read(PEFT_PREFIX + name)
        if tuple(tensor.shape) != shape:
            where = reader.directory if reader is not None else "?"
            raise WeightError(f"{where}: {name} is {tuple(tensor.shape)}, and lora.rank and the model ask for {shape}")
        own.data.copy_(take_piece(tensor, named.rule.cut, group.rank(), group.size()))


def _whole_shape(piece: Sequence[int], named: NamedRule, ranks: int) -> tuple[int, int]:
    rows, columns = piece
    factor = {"rows": (ranks, 1), "columns": (1, ranks)}.get(named.rule.cut, (1, 1))
    return rows * factor[0], columns * factor[1]


def _first_values(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    if name.endswith(f".{B}.weight"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


_OF_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def sharded_adapters(policy: PolicyModel) -> dict[str, ShardedTensor]:
    """Where each adapter's parameter of this rank lies in a checkpoint, by its name here.

    Tensors have their Hugging Face names behind "lora."; those of a layer's experts are one, with a dimension first.
    """
    groups, found = policy.groups, {}
    first = {id(own.parameter): named for own, named in reversed(list(policy.adapter_rules()))}
    for name, parameter in policy.named_parameters():
        if INSIDE not in name:
            continue
        named = first[id(parameter)]
        (hf_name,) = named.hf_names
        offsets, prepended = [], 0
        ranks, copies = groups.tensor, groups.data_context
        if named.rule.is_expert:
            ranks, copies = groups.megatron.expt_tp, groups.expert_data
            prepended = 3 - parameter.dim()
            experts = (groups.expert.rank(), groups.expert.size())
            if prepended:  # a parameter an expert
                match = _OF_EXPERT.search(hf_name)
                assert match is not None
                experts = (int(match[1]), policy.shape.num_experts)
            offsets.append((0, *experts))
        axis = {"rows": 0, "columns": 1}.get(named.rule.cut)
        if axis is not None:
            offsets.append((axis + named.rule.is_expert, ranks.rank(), ranks.size()))
        found[name] = ShardedTensor.from_rank_offsets(
            "lora." + _OF_EXPERT.sub(".experts.", hf_name),
            parameter,
            *offsets,
            replica_id=(0, 0 if axis is not None else ranks.rank(), copies.rank()),
            prepend_axis_num=prepended,
        )
    return found
