"""How the ranks lie on machines: which groups of a layout reach from one node to another."""

from __future__ import annotations

from math import ceil

from megatron_gspo.doctor.check import Check, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.report.text import count


def nodes_of(block: int, ranks: int, per_node: int) -> int:
    """Nodes that a group reaches at most, of those that are made of ``block`` ranks in a row."""
    starts = range(0, ranks, block)
    return max((start + block - 1) // per_node - start // per_node + 1 for start in starts)


def check_nodes(facts: Facts) -> list[Check]:
    """Nothing on one node. On several: groups whose collectives stand in every layer, and cross the network.

    Ranks are in the order tensor, context, data, pipeline; those of experts expert_tensor, expert
    (``megatron.groups``).
    """
    ranks, per_node, nodes = facts.ranks, facts.ranks_per_node, facts.nodes
    if nodes == 1:
        return []
    parallel = facts.config.parallel
    blocks = {
        "tensor": parallel.tensor,
        "context": parallel.tensor * parallel.context,
        "expert_tensor": parallel.expert_tensor,
        "expert": parallel.expert_tensor * parallel.expert,
    }
    crossing = {
        name: reached
        for name, block in blocks.items()
        if getattr(parallel, name) > 1 and (reached := nodes_of(block, ranks, per_node)) > 1
    }
    what = {"context": "keys and values of attention", "expert": "tokens on their way to experts"}
    carried = [f"{what[name]} ({name} {getattr(parallel, name)})" for name in what if name in crossing]
    network = "gradients" + "".join(f", {text}" for text in carried)
    checks = [ok(f"{ranks} ranks on {nodes} nodes of {per_node}: over the network go {network}")]
    return checks + [
        warning(
            f"parallel.{name} = {getattr(parallel, name)} reaches over {crossing[name]} nodes of {per_node} ranks: the "
            f"sums in every layer cross the network",
            f"parallel.{name}: {_divisors(per_node, below=getattr(parallel, name))}",
        )
        for name in ("tensor", "expert_tensor")
        if name in crossing
    ]


def check_ranks(facts: Facts) -> Check | None:
    """Nodes that are not full; None when all are."""
    ranks, per_node = facts.ranks, facts.ranks_per_node
    if facts.nodes == 1 or ranks % per_node == 0:
        return None
    full = ceil(ranks / per_node) * per_node
    return warning(
        f"{ranks} ranks on nodes of {per_node}: the last one has {count(ranks % per_node, 'rank')}",
        f"--ranks {full - per_node} or {full}, or another --ranks-per-node",
    )


def _divisors(number: int, below: int) -> str:
    """ "1, 2 or 4"."""
    found = [str(d) for d in range(1, min(number, below - 1) + 1) if number % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
