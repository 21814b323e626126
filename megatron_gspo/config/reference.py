"""What every setting is, read from the configuration's own types and docstrings.

``docs/configuration.md`` and ``megatron-gspo explain`` are both written from this.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from megatron_gspo.algorithm.base import Algorithm, algorithm_class
from megatron_gspo.algorithm.catalog import ALGORITHMS
from megatron_gspo.config.run import RunConfig
from megatron_gspo.config.sources import SourceConfig, SourceReward
from megatron_gspo.config.training import OptimizerConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.section import LONGEST_S, MOST, Section

NAMES = {bool: "true or false", int: "integer", float: "number", str: "string", dict: "table"}
BOUNDS = ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt"))
SUGGESTIONS = 4


@dataclass(frozen=True)
class Setting:
    """One setting in words; code in them stands between backticks, as in Markdown."""

    section: str
    name: str
    value: str
    """Its type, bounds or choices: ``number > 0``."""
    default: str
    """``required``, ``absent`` or a value as TOML has it."""
    meaning: str

    @property
    def key(self) -> str:
        """``optimizer.lr``."""
        return f"{self.section}.{self.name}"


def sections() -> dict[str, str]:
    """Section -> what it is about, in the order of the configuration."""
    return {name: _prose(_section(name).__doc__) for name in RunConfig.model_fields}


def settings(section: str) -> tuple[Setting, ...]:
    """The settings of a section, in its order; those of every algorithm, each said once with whose it is."""
    if section != "algorithm":
        fields = _section(section).model_fields
        return tuple(
            Setting(section, name, _value(f), _default(f), _prose(f.description)) for name, f in fields.items()
        )
    every = {name: algorithm_class(name).model_fields for name in ALGORITHMS}
    names = dict.fromkeys([*Algorithm.model_fields, *(setting for fields in every.values() for setting in fields)])
    return tuple(_of_algorithms(setting, every) for setting in names)


def algorithms_with(name: str) -> list[str]:
    """The algorithms of the catalog that have this setting."""
    return [algorithm for algorithm in ALGORITHMS if name in algorithm_class(algorithm).model_fields]


def _of_algorithms(name: str, every: Mapping[str, Mapping[str, FieldInfo]]) -> Setting:
    """A setting that all algorithms have, or some: whose it is, and each one's default."""
    if name == "name":
        field = Algorithm.model_fields[name]
        known = ", ".join(f"`{json.dumps(algorithm)}`" for algorithm in every)
        return Setting("algorithm", name, f"{known} or string", _default(field), _prose(field.description))
    having = {algorithm: fields[name] for algorithm, fields in every.items() if name in fields}
    defaults: dict[str, list[str]] = {}
    for algorithm, field in having.items():
        defaults.setdefault(_default(field), []).append(algorithm)
    several = len(defaults) > 1
    default = ", ".join(f"{value} ({', '.join(names)})" if several else value for value, names in defaults.items())
    field = next(iter(having.values()))
    text = next(filter(None, (_description(algorithm_class(algorithm), name) for algorithm in having)), None)
    of = "" if several or len(having) == len(every) else f" Of {', '.join(having)}."
    return Setting("algorithm", name, _value(field), default, _prose(text) + of)


def find(word: str) -> tuple[Setting, ...]:
    """The settings that ``SECTION``, ``SECTION.KEY`` or a ``KEY`` that only one section has stands for.

    Raises ConfigError for a word that is none of these, with those that it may have been meant to be.
    """
    every = {setting.key: setting for section in RunConfig.model_fields for setting in settings(section)}
    name = word.partition("=")[0].strip().strip("[]")  # what may be copied: section.key=value, [section]
    if name in RunConfig.model_fields:
        return settings(name)
    if name in every:
        return (every[name],)
    found = with_name(name)
    if len(found) == 1:
        return found
    if found:
        raise ConfigError(f"{len(found)} sections have {name}: name one of {_listed(setting.key for setting in found)}")
    raise ConfigError(f"no setting {word!r}{did_you_mean(name)}")


def with_name(name: str) -> tuple[Setting, ...]:
    """The settings of all sections whose key is ``name``; without the critic's own optimizer, whose keys are those of
    ``[optimizer]``."""
    found = tuple(s for section in RunConfig.model_fields for s in settings(section) if s.name == name)
    shared = name in OptimizerConfig.model_fields
    return tuple(s for s in found if not (shared and s.key.startswith("critic.")))


def did_you_mean(word: str) -> str:
    """What a setting that is none may have meant: a key of its section, one that is part of another or spelt like it,
    or one whose meaning has its words; else what there is."""
    if in_source := re.fullmatch(r"data\.sources\.\d+\.(reward\.)?(\w+)", word):
        keys = (SourceReward if in_source[1] else SourceConfig).model_fields
        near = difflib.get_close_matches(in_source[2], keys, n=1)
        return f" (did you mean {near[0]}?)" if near else f" (it has {', '.join(keys)})"
    section, dot, name = word.partition(".")
    if dot and section in RunConfig.model_fields:
        own = {setting.name: setting for setting in settings(section)}
        close = difflib.get_close_matches(name, own, n=1)
        close = [f"{section}.{key}" for key in close] or _meant(name, own.values())
        return f" (did you mean {_listed(close)}?)" if close else f" (keys of {section}: {', '.join(own)})"
    close = _close(word, {s.key: s for section in RunConfig.model_fields for s in settings(section)})
    return f" (did you mean {_listed(close)}?)" if close else f" (sections: {', '.join(RunConfig.model_fields)})"


def _close(word: str, every: dict[str, Setting]) -> list[str]:
    close = [key for key in every if word and word in key]
    if not close:
        close = difflib.get_close_matches(word, [*RunConfig.model_fields, *every], n=1)
    if not close:
        close = difflib.get_close_matches(word.rpartition(".")[2], sorted({s.name for s in every.values()}), n=1)
        close = [setting.key for name in close for setting in with_name(name)]
    return close[:SUGGESTIONS] or _meant(word, every.values())


def _meant(word: str, among: Iterable[Setting]) -> list[str]:
    """Settings whose key and meaning have every word of it: ``learning_rate``."""
    words = re.findall(r"[a-z0-9]+", word.lower())
    found = [s.key for s in among if words and all(w in f"{s.key} {s.meaning}".lower() for w in words)]
    return found[:SUGGESTIONS]


def _description(owner: type[Section], name: str) -> str | None:
    """A setting's docstring, by the nearest class that has one: one that only changes a default has none."""
    classes = (base for base in owner.__mro__ if issubclass(base, Section) and name in base.model_fields)
    return next((text for base in classes if (text := base.model_fields[name].description)), None)


def _listed(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else str(last)


def _section(name: str) -> type[Section]:
    return typing.cast(type[Section], RunConfig.model_fields[name].annotation)


def _value(field: FieldInfo) -> str:
    bounds = [bound for item in _metadata(field) for bound in _bounds(item)]
    return " ".join([_type(field.annotation), " and ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"{'list of' if Ellipsis in arguments else len(arguments)} {_type(arguments[0])}s"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "table"
    return NAMES[origin or annotation]


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Bounds of the field, or of the type that it allows beside None."""
    yield from field.metadata
    for part in typing.get_args(field.annotation):
        for item in getattr(part, "__metadata__", ()):
            yield from getattr(item, "metadata", [item])


def _bounds(item: Any) -> Iterator[str]:
    for kind, sign, name in BOUNDS:
        if isinstance(item, kind):
            value = getattr(item, name)
            if value in (MOST, LONGEST_S):  # of every number of things, and of every time
                continue
            yield f"{sign} {'2^63' if value == 2**63 else f'{value:g}'}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "absent" if value is None else f"`{json.dumps(value)}`"


def _prose(text: str | None) -> str:
    return re.sub(r"\s+", " ", (text or "").replace("``", "`")).strip()
