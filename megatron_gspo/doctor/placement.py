"""Check of where trainer and servers lie: the cards, what divides the model, and what sleeping servers need."""

from __future__ import annotations

from megatron_gspo.doctor.check import Check, error, ok
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.report.text import count
from megatron_gspo.rollout.sglang.cards import check_divides

SAVER = "torch-memory-saver"


def check_where(facts: Facts) -> Check:
    """The placement, with its reason. Raises ConfigError for one that neither the machine nor the model allows."""
    if facts.supervised:
        return ok("supervised fine-tuning has no servers")
    placement = facts.placement
    text = f"{placement.mode}: {placement.why}"
    if placement.colocated:
        text += "; in turns: the servers sleep while the trainer computes (docs/placement.md)"
    if facts.config.rollout.named:
        return ok(text)
    check_divides(placement.sizes, read_config(facts.config.model.path))
    if not facts.machine.gpus:
        return ok(text)
    each, cards = count(placement.sizes.cards, "card"), ", ".join(map(str, sorted(placement.cards)))
    text += f"; {count(len(placement.first_cards), 'server')} of {each} on {cards}; ranks on 0"
    text += f" to {facts.ranks_per_node - 1}" * (facts.ranks_per_node > 1)
    if placement.colocated and facts.engine is not None and SAVER not in facts.engine.versions:
        return error(f"{text}; the servers cannot sleep without {SAVER}", "make install DEVICE=cuda")
    return ok(text)
