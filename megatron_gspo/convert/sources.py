"""A checkpoint of either kind as tensors in Hugging Face names, read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_gspo.algorithm.gae import ValueScale
from megatron_gspo.convert.kinds import Kind, home_of_config, kind_of
from megatron_gspo.errors import ConfigError, MegatronGspoError, WeightError
from megatron_gspo.hf.carried import Carried, carried_names, find_carried
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.critic import in_reward_units, read_critic
from megatron_gspo.hf.directory import check_companions
from megatron_gspo.hf.elsewhere import other_names, some
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.names import INDEX
from megatron_gspo.hf.stream import TensorInfo
from megatron_gspo.megatron.checkpoint import POLICY, check_adapters, header_of_model, prefix_of
from megatron_gspo.megatron.checkpoint_files import HEADER
from megatron_gspo.megatron.checkpoint_stream import DistributedReader
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.places import Place, Places, find_places

CRITIC = "critic"
"""What a run's checkpoint calls its critic (``train.learner``)."""
REPEATED = "repeated"
"""In a converted checkpoint's header: {name: the tensor that it repeats}, of a stored head that is tied."""
HELD_BYTES = 64 * 1024**2
"""Read through memory maps before they are let go: mapped pages count as this process's memory."""


class Model:
    """What ``config.json`` says, and where its parameters lie in a distributed checkpoint: of one of its models."""

    def __init__(self, home: Path, groups: Groups, name: str = POLICY) -> None:
        self.home, self.name, self.valued = home, name, name == CRITIC
        self.family: Family
        self.shape: ModelShape
        self.family, self.shape = (read_critic if self.valued else read_model)(home, dequantised=True)
        check_companions(home)
        try:
            self.places: Places = find_places(
                self.family, self.shape, groups, prefix=prefix_of(name), valued=self.valued
            )
        except MegatronGspoError:
            raise
        except (ValueError, TypeError, AssertionError, ZeroDivisionError, RuntimeError) as error:
            raise ConfigError(f"{home / 'config.json'}: Megatron makes no model of it: {error}") from None
        templates = self.family.tensor_shapes(self.shape)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(templates[template])
            for place in self.places.parameters
            for name, template in zip(place.named.hf_names, place.named.rule.hf, strict=True)
        }
        """Hugging Face name -> shape, of every tensor that the family's table names."""


def open_source(
    directory: Path, config: Path | None, groups: Groups, *, model: str = POLICY, drop_unknown: bool = False
) -> Source:
    """The checkpoint at ``directory``, or of a distributed one the ``model`` of that name, checked as far as headers
    tell. Raises ConfigError or WeightError."""
    kind: Kind = kind_of(directory)
    if kind == "hugging-face" and model != POLICY:
        raise ConfigError(
            f"{directory} is a Hugging Face directory, which holds one model: --model {model} chooses among those of a "
            f"run's checkpoint"
        )
    home = home_of_config(directory, config, critic=model == CRITIC)
    return _open(directory, kind, Model(home, groups, model), drop_unknown)


def _open(directory: Path, kind: Kind, model: Model, drop_unknown: bool) -> Source:
    if kind == "hugging-face":
        return HuggingFaceSource(directory, model, drop_unknown=drop_unknown)
    return MegatronSource(directory, model, drop_unknown=drop_unknown)


class StoredTensors:
    """A directory of safetensors as it is, of whatever architecture."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = HfReader(directory)
        self._names = list(self._reader.names())
        self._held = 0

    def names(self) -> list[str]:
        """Without repeated ones."""
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        """A tensor's name, dtype and shape."""
        return TensorInfo(name, self._reader.dtype(name), self._reader.shape(name))

    def read(self, name: str) -> torch.Tensor:
        """Raises WeightError naming file and tensor."""
        self._held += self.info(name).nbytes
        if self._held > HELD_BYTES:
            self.release()
        return self._reader.read(name)

    def files(self) -> list[Path]:
        """Everything that tensors are read from."""
        return list(self._reader.files())

    def release(self) -> None:
        """Gives up what reading holds."""
        self._reader.release()
        self._held = 0


class HuggingFaceSource(StoredTensors):
    """A directory that holds just the tensors of its family's table, in the shapes of its config, and carried ones."""

    def __init__(self, directory: Path, model: Model, *, drop_unknown: bool = False) -> None:
        super().__init__(directory)
        self.model = model
        stored = self._reader.names()
        self.carried = carried_names(stored, model.shape)
        self._check_names(set(stored), drop_unknown)
        for name, shape in model.shapes.items():
            found = self._reader.shape(name)
            if found != shape:
                raise WeightError(
                    f"{self._reader.file_of(name)}: {name} has shape {found}, and config.json asks for {shape}"
                )
        self._names = [*(name for name in stored if name in model.shapes), *self.carried]

    def files(self) -> list[Path]:
        """Every file that holds a tensor."""
        return [self.model.home / "config.json", self.directory / INDEX, *super().files()]

    def _check_names(self, stored: set[str], drop_unknown: bool) -> None:
        missing = sorted(self.model.shapes.keys() - stored)
        if missing:
            hint = other_names(stored)
            raise WeightError(
                f"{self.directory}: {some(missing)} missing: config.json asks for them{f'; {hint}' if hint else ''}"
            )
        self.repeated = self._repeated(stored)
        self.dropped = sorted(stored - self.model.shapes.keys() - self.repeated.keys() - set(self.carried))
        if self.dropped and not drop_unknown:
            raise WeightError(
                f"{self._reader.file_of(self.dropped[0])}: {some(self.dropped)} in the files, and the table of "
                f"{self.model.family.architecture} names no such tensor: leave them out with --drop-unknown"
            )

    def _repeated(self, stored: set[str]) -> dict[str, str]:
        """A tied head that is stored although the embedding is it. Raises WeightError when it is another matrix."""
        if not self.model.shape.tied_embeddings:
            return {}
        embedding = next(n for p in self.model.places.parameters if "embedding" in p.name for n in p.named.hf_names)
        extra = stored & {"lm_head.weight"}
        if extra and not _same(self._reader.read("lm_head.weight"), self._reader.read(embedding)):
            raise WeightError(
                f"{self._reader.file_of('lm_head.weight')}: lm_head.weight is not {embedding} byte for byte, and "
                f"config.json ties them (tie_word_embeddings = true): set it to false, or remove the tensor"
            )
        return dict.fromkeys(extra, embedding)


class MegatronSource:
    """One model of a distributed checkpoint of any layout; optimizer state in it is not read.

    Layers that training does not touch come from files beside it, or from the model that training started from; a
    critic has none. A critic's value head is read as one that gives values in the rewards' units.
    """

    def __init__(self, directory: Path, model: Model, *, drop_unknown: bool = False, whole: bool = True) -> None:
        """Without ``whole``, tensors may be missing, and those that are there for nothing are left."""
        self.directory, self.model = directory, model
        self.header: dict[str, Any] = {}
        if (directory / HEADER).is_file():
            self.header = header_of_model(directory, model.name, model.shape)
            if model.name == POLICY:
                check_adapters(directory, self.header)
        elif model.name != POLICY:
            raise ConfigError(
                f"{directory} has no {HEADER}, which says of a run's checkpoint what models are in it: without one, it "
                f"is a policy's"
            )
        self._scale = self._value_scale() if model.valued else None
        self.repeated: dict[str, str] = self.header.get("extra", {}).get(REPEATED, {})
        self.reader = DistributedReader(directory)
        keys = self.reader.keys()
        there = [place for place in model.places.parameters if whole or place.pieces[0].key in keys]
        self._place_of = {name: place for place in there for name in place.named.hf_names}
        self._carried = Carried(None, ()) if model.valued else find_carried(directory, model.shape)
        if self._carried.reader is None and not model.valued:
            self._carried = find_carried(model.home, model.shape)
        self.carried = self._carried.names
        self._last: tuple[Place, dict[str, torch.Tensor]] | None = None
        if whole:
            self._check(drop_unknown)

    def _value_scale(self) -> ValueScale:
        """What a critic's values are normalised by. Raises WeightError."""
        kept = self.header["extra"].get(self.model.name)
        try:
            return ValueScale(**kept)
        except TypeError:
            raise WeightError(
                f"{self.directory}: {HEADER} says {kept!r:.80} of its values, which is not how they are normalised"
            ) from None

    @property
    def unknown(self) -> list[str]:
        """Tensors that the family's model has no parameter for; the optimizer's are none of it."""
        wanted = {piece.key for place in self.model.places.parameters for piece in place.pieces}
        others = tuple(prefix_of(name) for name in self.header.get("models", {}))  # a critic beside the policy
        left = [key for key in self.reader.keys() - wanted if not key.startswith("optimizer.")]
        if self.model.name == POLICY:
            return sorted(key for key in left if not key.startswith(others))
        return sorted(key for key in left if key.startswith(prefix_of(self.model.name)))

    def _check(self, drop_unknown: bool) -> None:
        for place in self.model.places.parameters:
            for piece in place.pieces:
                found = self.reader.shape(piece.key)
                cut = place.named.rule.cut == "vocabulary" and found[0] > piece.whole[0]  # a layout's padding
                if found != piece.whole and not (cut and found[1:] == piece.whole[1:]):
                    raise WeightError(
                        f"{self.directory}: {piece.key} has shape {found}, and config.json asks for {piece.whole}"
                    )
        if (unknown := self.unknown) and not drop_unknown:
            raise WeightError(
                f"{self.directory}: {some(unknown)} in the checkpoint, and {self.model.family.architecture} has no "
                f"such parameter: leave them out with --drop-unknown"
            )

    def names(self) -> list[str]:
        """In an order in which reading is cheap; without repeated ones."""
        return [*self._place_of, *self.carried]

    def info(self, name: str) -> TensorInfo:
        """A tensor's name, dtype and shape."""
        place = self._place_of.get(name)
        if place is None:
            reader = self._carried_reader()
            return TensorInfo(name, reader.dtype(name), reader.shape(name))
        return TensorInfo(name, self.reader.dtype(place.pieces[0].key), self.model.shapes[name])

    def read(self, name: str) -> torch.Tensor:
        """The parameters of one name often make several: the last is kept, and split once."""
        place = self._place_of.get(name)
        if place is None:
            return self._carried_reader().read(name)
        if self._last is None or self._last[0] is not place:
            self._last = None
            self._last = (place, self._split(place))
        return self._last[1][name]

    def _split(self, place: Place) -> dict[str, torch.Tensor]:
        pieces = [self.reader.read(piece.key, piece.offset, piece.size) for piece in place.pieces]
        rows = [block.reshape(piece.rows, *place.shape[1:]) for block, piece in zip(pieces, place.pieces, strict=True)]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        tensors = dict(zip(place.named.hf_names, place.named.rule.split(whole), strict=True))
        if self._scale is None:
            return tensors
        mean, std = self._scale.mean, self._scale.std
        return {name: in_reward_units(name, tensor, mean, std) for name, tensor in tensors.items()}

    def _carried_reader(self) -> HfReader:
        assert self._carried.reader is not None, "a name of no tensor"
        return self._carried.reader

    def files(self) -> list[Path]:
        """Every file that holds a block."""
        beside = [self._carried.reader.file_of(name) for name in self.carried] if self._carried.reader else []
        described = [self.model.home / "config.json", self.directory / ".metadata"]
        return [*described, *self.reader.files(), *sorted(set(beside))]

    def release(self) -> None:
        """Closes the files; a later read opens them again."""
        self.reader.close()
        if self._carried.reader is not None:
            self._carried.reader.release()
        self._last = None


Source = HuggingFaceSource | MegatronSource


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Byte for byte: a NaN is itself."""
    return a.dtype == b.dtype and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def same_dtype(place: Place, infos: list[TensorInfo]) -> torch.dtype:
    """The dtype of a parameter's tensors. Raises ConfigError when they differ: one matrix has one."""
    dtypes = {info.dtype for info in infos}
    if len(dtypes) > 1:
        found = ", ".join(f"{info.name} is {info.dtype}" for info in infos)
        raise ConfigError(f"{found}: Megatron keeps them in one matrix ({place.name}), which has one dtype")
    return dtypes.pop()
