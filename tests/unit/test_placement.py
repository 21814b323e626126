"""Where trainer and servers lie: what "auto" takes, what the cards and the model allow, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gspo.config import Placement, PlacementConfig, RolloutConfig, dump, parse
from megatron_gspo.errors import ConfigError


def placed(ranks: int = 8, cards: int = 8, rollout: dict[str, Any] | None = None, **settings: Any) -> Placement:
    return PlacementConfig(**settings).resolved(RolloutConfig(**rollout or {}), ranks=ranks, cards=cards)


def test_auto_is_apart_where_cards_are_left_for_a_server_and_else_colocated() -> None:
    assert (placed(8, 16).mode, placed(8, 16).first_cards) == ("apart", tuple(range(8, 16)))
    assert (placed(8, 8).mode, placed(8, 8).first_cards) == ("colocated", tuple(range(8)))
    assert (placed(6, 8, tensor=2).mode, placed(6, 8, tensor=2).first_cards) == ("apart", (6,))
    assert (placed(6, 8, tensor=4).mode, placed(6, 8, tensor=4).first_cards) == ("colocated", (0,))
    assert placed(6, 8, gpus=4).mode == placed(6, 8, {"local_servers": 3}).mode == "colocated"
    assert placed(6, 8, tensor=4).why == "the ranks take 6 of 8 cards, and the servers need 4 at least"
    assert placed(0, 8).first_cards == tuple(range(8)), "an evaluation has no ranks"


def test_on_a_cpu_and_with_named_servers_auto_is_apart_and_colocated_must_be_said() -> None:
    named = {"servers": ("http://a:1",)}
    assert not placed(1, 0).colocated and placed(1, 0, mode="colocated").colocated
    assert not placed(8, 8, named).colocated and placed(8, 8, named, mode="colocated").colocated
    assert placed(8, 8, named).first_cards == () and placed(1, 0).first_cards == (0,)
    assert placed(1, 0, mode="colocated").server_args == (), "a CPU server has no memory saver"


def test_trainer_and_servers_share_a_card_only_where_they_take_turns() -> None:
    for ranks, cards, tensor in ((1, 2, 1), (4, 8, 2), (8, 16, 4), (3, 8, 1)):
        apart = placed(ranks, cards, mode="apart", tensor=tensor)
        assert apart.cards and not apart.cards & set(range(ranks)) and max(apart.cards) < cards
        colocated = placed(ranks, cards, mode="colocated", tensor=tensor)
        assert colocated.cards & set(range(ranks))


def test_a_server_is_told_its_size_its_share_and_that_it_will_sleep() -> None:
    sizes = {"tensor": 8, "expert": 4, "attention_data": 2}
    told = placed(8, 8, **sizes).server_args
    assert told == (
        *("--tp-size", "8", "--ep-size", "4", "--attn-dp-size", "2"),
        *("--mem-fraction-static", "0.5", "--enable-memory-saver"),
    )
    assert placed(8, 16, memory=0.7).server_args == ("--mem-fraction-static", "0.7")
    assert placed(8, 16).share == 0.8 and placed(8, 8).share == 0.5


def test_server_args_win_and_a_contradiction_is_refused_with_both_names() -> None:
    args = {"server_args": ("--tp-size", "4", "--mem-fraction-static=0.6")}
    assert placed(8, 16, args).first_cards == (8, 12) and placed(8, 16, args).share == 0.6
    assert placed(8, 16, args, tensor=4, memory=0.6).first_cards == (8, 12)
    for settings, said in (
        ({"tensor": 2}, r"placement\.tensor = 2, and rollout\.server_args say --tp-size 4"),
        ({"memory": 0.7}, r"placement\.memory = 0\.7, and rollout\.server_args say --mem-fraction-static 0\.6"),
    ):
        with pytest.raises(ConfigError, match=said):
            placed(8, 16, args, **settings)
    known = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r"}, "rollout": args}
    with pytest.raises(ConfigError, match=r"placement\.tensor = 2"):
        parse({**known, "placement": {"tensor": 2}})
    config = parse(known)
    import tomllib

    assert parse(tomllib.loads(dump(config))) == config, "what is written with its defaults contradicts nothing"


def test_the_users_first_card_says_the_mode_or_contradicts_it() -> None:
    on_0, on_6 = ({"server_args": ("--base-gpu-id", card)} for card in ("0", "6"))
    assert placed(6, 8, on_0).mode == "colocated" and placed(6, 8, on_6).mode == "apart"
    assert placed(6, 8, on_6).first_cards == (6,)
    for rollout, mode, said in ((on_0, "apart", "one of the ranks' 6"), (on_6, "colocated", "none of the ranks' 6")):
        with pytest.raises(ConfigError, match=rf'placement\.mode = "{mode}".*--base-gpu-id . is {said} cards'):
            placed(6, 8, rollout, mode=mode)


@pytest.mark.parametrize(
    ("settings", "rollout", "said"),
    [
        ({"mode": "apart"}, {}, r"from card 8 on need 9 cards, and this machine shows 8.*placement\.mode"),
        ({"tensor": 16}, {}, r"1 local server\(s\) of 16 card\(s\) each need 16 cards"),
        ({"gpus": 3, "tensor": 2}, {}, r"placement\.gpus = 3 is no multiple of a server's 2 card"),
        ({"gpus": 8, "tensor": 2}, {"local_servers": 3}, r"placement\.gpus = 8 are 4 server.*local_servers = 3"),
    ],
)
def test_what_the_cards_do_not_allow_is_one_error(settings: dict[str, Any], rollout: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        placed(8, 8, rollout, **settings)


def test_parts_of_the_tensor_ranks_divide_them() -> None:
    for name in ("expert", "attention_data"):
        with pytest.raises(ValueError, match=f"{name} = 3 does not divide tensor = 4"):
            PlacementConfig(**{"tensor": 4, name: 3})
