"""What is done about the gap between the engine that draws and the trainer that learns."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megatron_gspo.section import NonNegativeFloat, PositiveFloat, Section


class Correction(Section):
    """Weights for the gap between the engine's policy mu and the trainer's pi_old, with rho = pi_old / mu."""

    rule: str = "off"
    """The weight of a token: "truncate" min(rho, high); "clip" rho within [low, high]; "mask" rho inside [low, high], 0
    outside (IcePop); "drop" 1 inside, 0 outside; "off"; or a function of your own, ``module:function`` of
    (log rho, low, high)."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """What rho is of: a token; "sequence", the product over the response; "geometric", its geometric mean. Others call
    the latter "sequence" too."""
    low: NonNegativeFloat = 0.5
    """Lower bound of "clip", "mask" and "drop"; 0 is none."""
    high: PositiveFloat = 2.0
    """Upper bound."""
    reject: Literal["off", "k1", "k2", "k3"] = "off"
    """Leaves out what is too far off by an estimate of the divergence: k1 |log rho|, k2 (log rho)^2 / 2, k3
    rho - 1 - log rho."""
    reject_level: Literal["token", "sequence"] = "sequence"
    """Whether ``reject`` looks at single tokens or at a response's mean."""
    reject_above: PositiveFloat = 0.01
    """Nats above which ``reject`` leaves out."""
    veto: NonNegativeFloat = 0.0
    """A response with a token whose rho is below this is left out; 0 vetoes none."""
    denominator: Literal["keep", "shrink"] = "keep"
    """Tokens that are left out stay in the lengths and counts that weights are divided by, or leave them too."""
    opsm: PositiveFloat | None = None
    """Off-policy sequence masking (DeepSeek-V3.2): leaves out responses with A < 0 whose mean log(pi_old / pi_theta)
    is above this, in training."""
    bypass: bool = False
    """Losses take the engine's mu for pi_old: their ratios carry the whole distance from what was drawn. The pi_old
    pass is left out where nothing else reads it: a mixture of experts has it unless ``replay.mode`` is "off",
    ``replay.drift_every`` 0, and no engine routes are asked for."""

    @property
    def weighs(self) -> bool:
        """Whether tokens get weights before training."""
        return self.rule != "off" or self.reject != "off" or self.veto > 0

    @model_validator(mode="after")
    def _check(self) -> Correction:
        known = ("off", "truncate", "clip", "mask", "drop")
        if self.rule not in known and ":" not in self.rule:
            raise ValueError(
                f'rule = "{self.rule}" is no rule (known: {", ".join(known)}; one of your own is module:function)'
            )
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        if self.bypass and self.weighs:
            raise ValueError(
                "bypass = true makes pi_old the engine's policy: rho is 1 everywhere, and rule, reject and veto have "
                "nothing to correct; remove one of them"
            )
        return self
