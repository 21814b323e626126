"""Tokenizer files in the shapes in which model families publish theirs; templates are our own, in the same shape."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages[::-1] %}"
    "{%- set index = messages|length - 1 - loop.index0 %}"
    "{%- if message.role == 'user' and ns.last == messages|length - 1 %}{%- set ns.last = index %}{%- endif %}"
    "{%- endfor %}{%- for message in messages %}"
    "{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}"
    "{%- endif %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- elif message.role == 'assistant' %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- content }}"
    "{%- for call in message.tool_calls or [] %}{%- if call.function %}{%- set call = call.function %}{%- endif %}"
    "{{- '<tool_call>\\n' + (call | tojson) + '\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
OLMOE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.system = message['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' and message['content'] is none %}{{ '<\uff5cAssistant\uff5c>' }}"
    "{% for call in message['tool_calls'] %}{{ call['function']['name'] }}{% endfor %}"
    "{{ '<\uff5cend\u2581of\u2581sentence\uff5c>' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + message['content'] + '<\uff5cend\u2581of\u2581sentence\uff5c>' }}"
    "{% elif message['role'] == 'tool' %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{%- macro visible(content) %}{% if content is string %}{{ content }}{% else %}{{ content }}"
    "{% endif %}{%- endmacro %}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ visible(m.content) }}"
    "{{- '/nothink' if enable_thinking is defined and not enable_thinking else '' }}{% elif m.role == 'assistant' %}"
    "<|assistant|>\n<think></think>\n{{ visible(m.content).split('</think>')[-1].strip() }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>{{ call.function.name }}</tool_call>{% endfor %}"
    "{% elif m.role == 'system' %}<|system|>\n{{ visible(m.content) }}{% elif m.role == 'tool' %}"
    "<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"


@dataclass(frozen=True)
class Family:
    """A family's published files around a vocabulary of bytes."""

    architecture: str
    tokenizer_class: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    template: str = ""
    jinja_file: bool = False
    """The template is a ``chat_template.jinja``, not a setting of ``tokenizer_config.json``."""
    config: dict[str, Any] = field(default_factory=dict)
    """More of ``tokenizer_config.json``."""
    eos_ids: tuple[str, ...] = ()
    """``eos_token_id`` of ``generation_config.json``, as texts."""


FAMILIES = {
    "Qwen3": Family(
        "Qwen3MoeForCausalLM",
        "Qwen2Tokenizer",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
        QWEN3,
        config={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "bos_token": None},
        eos_ids=("<|im_end|>", "<|endoftext|>"),
    ),
    "Qwen3 distilled": Family(
        "Qwen3ForCausalLM",
        "LlamaTokenizerFast",
        (BOS, EOS, "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        ("<think>", "</think>"),
        DEEPSEEK,
        config={"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "add_bos_token": True, "legacy": True},
        eos_ids=(EOS,),
    ),
    "OLMoE": Family(
        "OlmoeForCausalLM",
        "GPTNeoXTokenizer",
        ("|||IP_ADDRESS|||", "<|padding|>", "<|endoftext|>"),
        template=OLMOE,
        config={"bos_token": "|||IP_ADDRESS|||", "eos_token": "|||IP_ADDRESS|||", "pad_token": "<|padding|>"},
        eos_ids=("<|endoftext|>",),
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        "LlamaTokenizerFast",
        (BOS, EOS, "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        ("<think>", "</think>"),
        DEEPSEEK,
        config={
            "bos_token": {"__type": "AddedToken", "content": BOS, "special": True},
            "eos_token": {"__type": "AddedToken", "content": EOS, "special": True},
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
        },
        eos_ids=(EOS,),
    ),
    "GLM-4.5": Family(
        "Glm4MoeForCausalLM",
        "PreTrainedTokenizerFast",
        ("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "/nothink"),
        GLM,
        jinja_file=True,
        config={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "do_lower_case": False},
        eos_ids=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
}
MODEL_TYPES = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "OlmoeForCausalLM": "olmoe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MixtralForCausalLM": "mixtral",
}
MERGES = [("Ġ", "a"), ("Ġ", "h"), ("h", "e"), ("o", "w"), ("Ġh", "ow"), ("1", "2"), ("Ċ", "Ċ")]
VOCABULARY = 320
QWEN_SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(special: Sequence[str] = (), plain: Sequence[str] = ()) -> Backend:
    """256 bytes, a few merges, then the added tokens."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    backend = Backend(models.BPE(vocabulary, MERGES))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
        + [AddedToken(token, special=False, normalized=False) for token in plain]
    )
    return backend


def write(directory: Path, name: str) -> Path:
    """A family's directory: ``config.json``, ``generation_config.json``, ``tokenizer.json`` and its configuration."""
    family = FAMILIES[name]
    backend = byte_level(family.special, family.plain)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": family.tokenizer_class, "added_tokens_decoder": added(backend), **family.config}
    if family.template and not family.jinja_file:
        settings["chat_template"] = family.template
    if family.jinja_file:
        (directory / "chat_template.jinja").write_text(family.template)
    dump(directory / "tokenizer_config.json", settings)
    ids = [backend.token_to_id(token) for token in family.eos_ids]
    configure(directory, family.architecture, ids[0])
    dump(directory / "generation_config.json", {"eos_token_id": ids})
    return directory


def write_qwen2_moe(directory: Path, tokenizer_class: str = "Qwen2Tokenizer", eos: str = "<|endoftext|>") -> Path:
    """Qwen2-MoE as older snapshots have it: ``vocab.json`` and ``merges.txt``, no ``tokenizer.json``."""
    backend = byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    plain = byte_level()
    dump(directory / "vocab.json", plain.get_vocab())
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": tokenizer_class, "eos_token": eos, "pad_token": "<|endoftext|>"}
    settings |= {"added_tokens_decoder": added(backend), "add_prefix_space": False, "chat_template": QWEN2}
    dump(directory / "tokenizer_config.json", settings)
    configure(directory, "Qwen2MoeForCausalLM", backend.token_to_id("<|endoftext|>"))
    return directory


def write_mixtral(directory: Path, *, with_json: bool = True) -> Path:
    """Mixtral: a SentencePiece ``tokenizer.model``, its conversion to ``tokenizer.json``, and LlamaTokenizer named."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Tom has 2 apples, and then half as many in May. How many are left?"] * 3),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    if with_json:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = [
            (piece[:cut], piece[cut:])
            for piece in sorted(pieces[259:], key=vocabulary.__getitem__)
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
        backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
        backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    dump(directory / "tokenizer_config.json", settings | {"chat_template": MIXTRAL})
    configure(directory, "MixtralForCausalLM", 2)
    return directory


def write_moonlight(directory: Path) -> Path:
    """Moonlight: a tiktoken vocabulary, and remote code that ends the process of whoever runs it."""
    ranks = (f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (directory / "tiktoken.model").write_text("".join(ranks))
    (directory / "tokenization_moonshot.py").write_text("raise SystemExit('remote code was run')\n")
    auto = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
    settings = {"tokenizer_class": "TikTokenTokenizer", "auto_map": auto, "eos_token": "[EOS]", "bos_token": "[BOS]"}
    dump(directory / "tokenizer_config.json", settings)
    configure(directory, "DeepseekV3ForCausalLM", 257)
    return directory


def added(backend: Backend) -> dict[str, dict[str, Any]]:
    """``added_tokens_decoder`` of a ``tokenizer_config.json``."""
    return {
        str(i): {"content": token.content, "special": token.special, "normalized": token.normalized}
        | {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        for i, token in backend.get_added_tokens_decoder().items()
    }


def configure(directory: Path, architecture: str, eos: int) -> None:
    config = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture], "vocab_size": VOCABULARY}
    dump(directory / "config.json", config | {"eos_token_id": eos, "transformers_version": "4.51.0"})


def change(path: Path, **settings: Any) -> None:
    """Sets settings of a JSON file."""
    dump(path, json.loads(path.read_text(encoding="utf-8")) | settings)


def dump(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
