"""What is sent to a server by value."""

import json
import pickle
import pickletools

import megatron.core  # noqa: F401  (0.19.2 replaces a function that pickles of tensors name)
import pytest
import torch

from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.sync.tensor import pickled

TAKEN = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch.storage", "_load_from_bytes")}
"""Of what SGLang 0.5.23 lets a pickle name (srt/utils/common.py), what tensors need."""


def test_a_bucket_names_nothing_that_a_server_refuses_and_holds_the_tensors() -> None:
    bucket = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.tensor([1.5], dtype=torch.bfloat16))]
    content = pickled(bucket)
    strings, named = [], set()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "STACK_GLOBAL":
            named.add(tuple(strings[-2:]))
        elif "UNICODE" in opcode.name:
            strings.append(argument)
    assert named == TAKEN
    for (name, tensor), (sent_name, sent) in zip(bucket, pickle.loads(content), strict=True):
        assert name == sent_name
        assert torch.equal(tensor, sent)


def test_every_tensor_rank_of_every_server_is_sent_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(Servers, "tensor_ranks", lambda self: (2, 1))
    monkeypatch.setattr(Servers, "_all", lambda self, path, bodies: sent.extend(bodies))
    Servers(["http://a", "http://b"]).post_tensors(b"QUJD")
    assert [json.loads(body) for body in sent] == [
        {"serialized_named_tensors": ["QUJD"] * ranks, "flush_cache": False} for ranks in (2, 1)
    ]
