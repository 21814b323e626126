"""Checks of the layout and of the Hugging Face directory that training starts from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.estimate import microbatches, tokens_of_minibatch
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.nodes import check_nodes
from megatron_gspo.doctor.tokenizer import check_template_files, check_turn_end
from megatron_gspo.errors import LayoutError, WeightError
from megatron_gspo.hf.carried import carried_names
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.hf.directory import check_companions
from megatron_gspo.hf.elsewhere import other_names, some
from megatron_gspo.hf.layout import check_layout as check_layout_of
from megatron_gspo.hf.layout import check_recompute, check_replay
from megatron_gspo.megatron.checkpoint_files import is_distributed, read_header
from megatron_gspo.report.text import count


def check_configuration(facts: Facts) -> Check:
    """Which algorithm, for how many steps."""
    config = facts.config
    return ok(f"{config.algorithm.name}, {config.train.outer_steps} outer steps, {config.total_steps} optimizer steps")


def check_layout(facts: Facts) -> list[Check]:
    """Whether it multiplies out and divides the model, and what each data-parallel rank gets of a mini-batch."""
    try:
        parallel, data = facts.config.parallel, facts.layout
    except LayoutError as caught:
        return [error(str(caught), layout_fix(facts, str(caught)))]
    check_recompute(facts.config.model, facts.config.parallel, facts.shape)
    check_replay(facts.config.replay, facts.shape)
    text = (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} x data {data} = "
        f"{facts.ranks} ranks; expert {parallel.expert} x expert_tensor {parallel.expert_tensor}"
    )
    if parallel.virtual_pipeline > 1:
        text += f"; {parallel.virtual_pipeline} virtual stages per rank, micro-batches padded to a multiple of stages"
    if parallel.tensor > 1:
        text += "; sequence parallel, since tensor > 1"
    sequences, _ = tokens_of_minibatch(facts.config)
    packs = microbatches(facts.config, data)
    checks = [ok(f"{text}; {sequences} sequences per mini-batch, at full length {count(packs, 'pack')} a rank")]
    if sequences < data:
        checks.append(
            warning(
                f"{sequences} sequences per mini-batch for {data} data-parallel ranks: some train on nothing",
                f"{_fewer_data_ranks(facts)}, fewer train.minibatches, or more train.prompts_per_step",
            )
        )
    if packs < parallel.pipeline > 1:
        checks.append(
            warning(
                f"{packs} micro-batches per mini-batch for {parallel.pipeline} pipeline stages: most of them wait",
                "fewer train.minibatches, a smaller train.microbatch_tokens, or fewer parallel.pipeline",
            )
        )
    if facts.config.train.prompts_per_step < data and not facts.supervised:
        checks.append(
            warning(
                f"{facts.config.train.prompts_per_step} prompts per step, {data} leaders to fetch them: some are idle",
                f"{_fewer_data_ranks(facts)}, or more train.prompts_per_step",
            )
        )
    return [*checks, *check_nodes(facts)]


def layout_fix(facts: Facts, problem: str) -> str:
    """What to change for a layout that does not hold: the option or the setting that is at fault, with values that
    would do where there are any."""
    parallel = facts.config.parallel
    if facts.asked_ranks and "the world has" in problem:
        model = parallel.tensor * parallel.pipeline * parallel.context
        if parallel.data:
            return f"--ranks {model * parallel.data}, or parallel.data"
        return f"--ranks: a multiple of {model} (tensor x pipeline x context), or one of these"
    named = re.search(r"parallel\.(\w+) (\d+) =", problem)
    if named is None:
        setting = re.search(r"\b(?:expert|stage_layers|virtual_pipeline|pipeline)\b", problem)
        return f"parallel.{setting[0]}" if setting else "[parallel]"
    name, asked = named[1], int(named[2])
    would_do = [size for size in range(1, min(2 * asked, 1024) + 1) if _holds(facts, name, size)]
    nearest = sorted(sorted(would_do, key=lambda size: abs(size - asked))[:3])
    return f"parallel.{name}" + (f" = {' or '.join(map(str, nearest))}" if nearest else "")


def _holds(facts: Facts, name: str, size: int) -> bool:
    try:
        check_layout_of(facts.config.parallel.model_copy(update={name: size}), facts.shape)
    except LayoutError:
        return False
    return True


def _fewer_data_ranks(facts: Facts) -> str:
    return "fewer --ranks" if facts.asked_ranks and facts.config.parallel.data is None else "fewer parallel.data"


def check_model(facts: Facts) -> Check:
    """config.json: a family that is known, and how it reads."""
    shape = facts.shape
    check_companions(Path(facts.config.model.path))
    experts = f", {shape.num_experts} experts top-{shape.top_k} in {sum(shape.moe_layers)} of them" * bool(
        shape.num_experts
    )
    head = "tied" if shape.tied_embeddings else "own"
    raw = read_config(facts.config.model.path)
    stored = raw.get("dtype", raw.get("torch_dtype", "unknown"))
    text = (
        f"{shape.architecture}, {shape.num_layers} layers{experts}, hidden {shape.hidden_size}, vocabulary "
        f"{shape.vocab_size} with its {head} head, stored {stored}, trained {facts.config.model.dtype}"
    )
    if raw.get("router_aux_loss_coef") and shape.num_experts:
        text += f"; its router_aux_loss_coef = {raw['router_aux_loss_coef']} is not used: no auxiliary loss"
    return ok(text)


def check_weights(facts: Facts) -> Check:
    """Every tensor that the family's table asks for, against the files' headers; no data is read."""
    path = Path(facts.config.model.path)
    if is_distributed(path):
        return ok(f"a Megatron checkpoint, converted from {read_header(path)['extra'].get('converted_from', 'a run')}")
    reader, wanted = facts.reader, {tensor.name: tensor.shape for tensor in facts.tensors}
    stored = set(reader.names())
    missing = [name for name in wanted if name not in stored]
    if missing:
        text, hint = f"{reader.directory}: {some(missing)} missing, of {len(wanted)}", other_names(stored)
        return error(f"{text}; {hint}" if hint else text, "model.path: a whole model")
    wrong: list[str] = []
    for name, shape in wanted.items():
        try:
            found = reader.shape(name)
        except WeightError as caught:  # a file that is absent, truncated or no safetensors: it names the file
            return error(str(caught), "model.path: copy the file again")
        if found != shape:
            wrong.append(f"{name} {list(found)}, not {list(shape)}")
    if wrong:
        return error(f"{reader.directory}: {some(wrong)}: not what config.json asks for", "model.path")
    for name in wanted:
        reader.dtype(name)  # raises for one that is not read
    carried = carried_names(stored, facts.shape)
    extra = sorted(stored - set(wanted) - {"lm_head.weight"} - set(carried))
    text = f"{len(wanted)} tensors, each of the shape that config.json asks for"
    if reader.without_index():
        text += f"; in {len(reader.files())} files without an index ({some([path.name for path in reader.files()])})"
    if reader.stacked():
        text += f"; experts are stacked ({some(reader.stacked())}) and read as slices"
    if carried:
        text += f", and {len(carried)} of {facts.shape.carried_layers} layers behind the last, which are only carried"
    if extra:
        return warning(f"{text}; {some(extra)} in the files that no table names: not read", "model.path")
    return ok(text)


def check_tokenizer(facts: Facts) -> Sequence[Check]:
    """Ids against the vocabulary, stop tokens, chat template and the end of a turn, padding."""
    tokenizer, config = facts.tokenizer, facts.config
    template = tokenizer.render("x", True) != tokenizer.render("x", False)
    how = "the chat template" if template and config.data.chat_template else "no chat template"
    text = (
        f"{len(tokenizer)} tokens for a vocabulary of {tokenizer.vocab_size}, stop tokens "
        f"{', '.join(map(str, tokenizer.stop_ids))}; prompts are rendered with {how}"
    )
    checks = [ok(text), *check_turn_end(tokenizer, config.data.chat_template)]
    checks += check_template_files(Path(config.model.path), config.data.chat_template)
    pad = read_config(config.model.path).get("pad_token_id")
    if isinstance(pad, int) and pad >= 0 and pad not in tokenizer.stop_ids:
        checks.append(
            warning(
                f"pad_token_id = {pad} in config.json: transformers makes its row of a new model zero, where RMSNorm's "
                f"gradient is 1 / sqrt(eps), and it can be sampled",
                "of a model made from scratch: pad_token_id = null in config.json; a trained model may have it",
            )
            if _is_zero_row(facts, pad)
            else ok(f"pad_token_id = {pad}: its embedding is not zero")
        )
    return checks


def _is_zero_row(facts: Facts, row: int) -> bool:
    """Whether a row of the embedding is zero; the one place where weights are read, a page of them."""
    from safetensors import safe_open

    name = "model.embed_tokens.weight"
    try:
        path = facts.reader.file_of(name)
        with safe_open(path, framework="pt", device="cpu") as file:
            return not file.get_slice(name)[row : row + 1].any()
    except Exception:  # the weights check says what is wrong with them
        return False
