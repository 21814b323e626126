"""What checks look at, read once each and kept, failures included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from megatron_gspo.config import Placement, RunConfig, load
from megatron_gspo.config.inputs import MODELS, advice, missing
from megatron_gspo.config.training import DataConfig
from megatron_gspo.data.formats import Paths
from megatron_gspo.data.mixture import Source, mix
from megatron_gspo.data.prompts import CompletionSet, PromptSet, load_completions, load_prompts
from megatron_gspo.data.tokenizer import Tokenizer, open_tokenizer
from megatron_gspo.doctor.installed import Environment, environment_of, own_environment
from megatron_gspo.doctor.machine import Machine, look_at_machine
from megatron_gspo.doctor.tensors import Tensor, adapters_of, tensors_of
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.layout import check_layout
from megatron_gspo.rollout.sglang.launcher import find_server_python

F = TypeVar("F")


def fact(make: Callable[[Facts], F]) -> property:
    """A property whose value, or exception, is made once."""
    name = make.__name__

    @functools.wraps(make)
    def get(self: Facts) -> F:
        if name not in self._outcomes:
            try:
                self._outcomes[name] = (make(self), None)
            except Exception as caught:
                self._outcomes[name] = (None, caught)
        value, problem = self._outcomes[name]
        if problem is not None:
            raise problem
        return value

    return property(get)


class Facts:
    """Lazy facts about a configuration and this machine. Reading one raises what its reading raised."""

    WORDS: ClassVar[dict[str, str]] = {
        "config": "the configuration",
        "model": "the model's config.json",
        "reader": "the model's safetensors",
        "engine": "the servers' environment",
        "layout": "a layout that holds",
        "placement": "a placement that holds",
        "tokenizer": "the tokenizer",
        "prompts": "the prompts",
    }
    """Facts that other checks are made of, as "not checked: it needs ..." names them."""

    def __init__(
        self, path: Path, overrides: Sequence[str] = (), ranks: int | None = None, ranks_per_node: int | None = None
    ) -> None:
        self._path, self._overrides = path, overrides
        self.asked_ranks = ranks
        """World size as asked for by ``--ranks``; None: what the configuration needs when it starts by itself."""
        self.asked_per_node = ranks_per_node
        """Ranks of each machine as asked for by ``--ranks-per-node``; this machine stands for each of them."""
        self._outcomes: dict[str, tuple[Any, Exception | None]] = {}

    def problem(self, name: str) -> Exception | None:
        """Why a fact cannot be had; None when it can."""
        try:
            getattr(self, name)
        except Exception as caught:
            return caught
        return None

    @fact
    def config(self) -> RunConfig:
        """The validated configuration."""
        return load(self._path, self._overrides)

    @fact
    def missing(self) -> dict[str, str]:
        """Setting -> path, of the files and directories that the configuration reads and that are not there."""
        return missing(self.config)

    def advice(self, setting: str) -> str:
        """How to come by a missing input; empty where nothing is known."""
        return advice(self.missing[setting], self._path, is_model=setting in MODELS)

    @fact
    def machine(self) -> Machine:
        """This machine."""
        return look_at_machine()

    @fact
    def environment(self) -> Environment:
        """Of this process, the trainer's."""
        return own_environment()

    @fact
    def engine(self) -> Environment | None:
        """Of the servers that are started here; None when none are. Raises DependencyError, ConfigError."""
        starts = self.local_servers or self.config.reward_server.model
        return environment_of(find_server_python(self.config.rollout.server_python)) if starts else None

    @fact
    def model(self) -> tuple[Family, ModelShape]:
        """Family and shape of the policy."""
        return read_model(self.config.model.path)

    @property
    def family(self) -> Family:
        """Of the policy."""
        family: Family = self.model[0]
        return family

    @property
    def shape(self) -> ModelShape:
        """Of the policy."""
        shape: ModelShape = self.model[1]
        return shape

    @fact
    def reader(self) -> HfReader:
        """Of its safetensors."""
        return HfReader(self.config.model.path)

    @fact
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the policy, by the tables of its family."""
        return tuple(tensors_of(self.family, self.shape))

    @fact
    def adapters(self) -> tuple[Tensor, ...]:
        """Every matrix of the policy's adapters; none without ``lora.rank``. Raises ConfigError for other targets."""
        return tuple(adapters_of(self.family, self.shape, self.config.lora))

    @fact
    def ranks(self) -> int:
        """Ranks of the layout on this machine or under its launcher."""
        return self.asked_ranks or self.config.parallel.world_size()

    @fact
    def ranks_per_node(self) -> int:
        """As asked for; else a rank a GPU where ``--ranks`` are more than this machine's, and all ranks here."""
        gpus = len(self.machine.gpus)
        spread = gpus if gpus and self.asked_ranks and self.asked_ranks > gpus else self.ranks
        return min(self.ranks, self.asked_per_node or spread)

    @property
    def nodes(self) -> int:
        """Machines that the ranks fill."""
        return ceil(self.ranks / self.ranks_per_node)

    @fact
    def layout(self) -> int:
        """Data-parallel ranks, of a layout that multiplies out and divides the model. Raises LayoutError."""
        data_size: int = self.config.parallel.data_size(self.ranks)
        check_layout(self.config.parallel, self.shape)
        return data_size

    @fact
    def tokenizer(self) -> Tokenizer:
        """That of ``model.path``."""
        return open_tokenizer(self.config)

    @property
    def supervised(self) -> bool:
        """Whether the run fine-tunes."""
        return not self.config.algorithm.draws_responses

    @property
    def local_servers(self) -> int:
        """Servers that the run starts on this machine."""
        if self.supervised or self.config.rollout.named:
            return 0
        if self.problem("placement"):  # said by the placement's own check
            return self.config.rollout.local_servers or 1
        return len(self.placement.first_cards)

    @fact
    def placement(self) -> Placement:
        """Where trainer and servers lie on this machine. Raises ConfigError."""
        machine = self.machine
        return self.config.placed(ranks=self.ranks_per_node, cards=len(machine.gpus), cores=machine.cores)

    @fact
    def prompts(self) -> PromptSet | CompletionSet:
        """The training prompts (of ``data.limit``), of any length; as many rows are looked at as training does."""
        if self.sources:
            return mix(self.sources)
        return self.read_prompts(self.config.data.path, self.config.data.limit)

    @fact
    def sources(self) -> tuple[Source, ...]:
        """What the training prompts are mixed of."""
        data = self.config.data
        read = [(s, self.read_prompts(s.path, s.limit, data.of_source(s))) for s in data.sources]
        return tuple(Source(s.name, s.weight, found) for s, found in read if isinstance(found, PromptSet))

    def read_prompts(self, path: str, limit: int | None, data: DataConfig | None = None) -> PromptSet | CompletionSet:
        """Reads the training prompts, or completions; ``data``: of a source."""
        data, rollout = data or self.config.data, self.config.rollout
        read: Callable[..., PromptSet | CompletionSet] = load_prompts
        if self.supervised:
            read = functools.partial(load_completions, max_response_tokens=rollout.max_response_tokens)
        return read(
            path,
            max_prompt_tokens=rollout.max_prompt_tokens,
            keep_long=True,
            tokenizer=self.tokenizer,
            format=data.format,
            fields=Paths.named_by(data),
            chat_template=data.chat_template,
            skip_bad=data.skip_bad,
            limit=limit,
        )
