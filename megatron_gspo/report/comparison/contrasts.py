"""Which arms are set against which: a list that is fixed by the plan before any cell has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_gspo.report.comparison.cells import Arm


@dataclass(frozen=True)
class Contrast:
    """A seed's value is the sum over ``plus`` minus the sum over ``minus``, of arms run with that seed."""

    name: str
    """As a formula."""
    subject: str
    """In words: who is set against whom."""
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    higher: str
    """The clause that a mean above 0 stands for; ``lower`` for one below."""
    lower: str
    tested: bool = True
    """False for the dense twin, a control: it has intervals and no place among the tests."""

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms of it."""
        return self.plus + self.minus

    def value(self, of: Callable[[str], float]) -> float:
        """Its value from each arm's."""
        return sum(map(of, self.plus)) - sum(map(of, self.minus))


def contrasts(arms: Sequence[Arm]) -> list[Contrast]:
    """Every contrast that the arms allow.

    - losses at one replay mode: the later loss of the plan minus the earlier one
    - replay modes of one loss: r2 - off, r3 - off, r3 - r2
    - what one loss gains from replay minus what another gains: the paper's claim is that GRPO needs replay and GSPO
      does not, which is neither of the above
    """
    experts = [arm for arm in arms if not arm.dense]
    return [
        *_between_losses(experts),
        *_between_replays(experts),
        *_gains(experts),
        *_between_losses([arm for arm in arms if arm.dense], tested=False),
    ]


def _pair(a: Arm, b: Arm, tested: bool = True) -> Contrast:
    return Contrast(
        name=f"{a.name} − {b.name}",
        subject=f"{a.name} against {b.name}",
        plus=(a.name,),
        minus=(b.name,),
        higher=f"{a.name} ended higher than {b.name}",
        lower=f"{a.name} ended lower than {b.name}",
        tested=tested,
    )


def _between_losses(arms: Sequence[Arm], tested: bool = True) -> list[Contrast]:
    return [_pair(b, a, tested) for a, b in combinations(arms, 2) if a.loss != b.loss and a.replay == b.replay]


def _between_replays(arms: Sequence[Arm]) -> list[Contrast]:
    pairs = combinations(sorted(arms, key=lambda arm: arm.replay), 2)  # off, r2, r3
    found = [_pair(b, a) for a, b in pairs if a.loss == b.loss and a.replay != b.replay]
    return sorted(found, key=lambda contrast: [arm.name for arm in arms].index(contrast.minus[0]))


def _gains(arms: Sequence[Arm]) -> list[Contrast]:
    by_place = {(arm.loss, arm.replay): arm.name for arm in arms}
    losses, replays = dict.fromkeys(arm.loss for arm in arms), dict.fromkeys(arm.replay for arm in arms)
    return [
        _gain(by_place, a, b, replay)
        for a, b in combinations(losses, 2)
        for replay in replays
        if replay != "off" and all((loss, mode) in by_place for loss in (a, b) for mode in ("off", replay))
    ]


def _gain(by_place: Mapping[tuple[str, str], str], a: str, b: str, replay: str) -> Contrast:
    """What ``b`` gains from ``replay`` minus what ``a`` does."""
    with_b, off_b, with_a, off_a = (by_place[place] for place in ((b, replay), (b, "off"), (a, replay), (a, "off")))
    return Contrast(
        name=f"({with_b} − {off_b}) − ({with_a} − {off_a})",
        subject=f"The gain from {replay}, {b} against {a}",
        plus=(with_b, off_a),
        minus=(off_b, with_a),
        higher=f"{b} gained more from {replay} than {a}",
        lower=f"{b} gained less from {replay} than {a}",
    )
