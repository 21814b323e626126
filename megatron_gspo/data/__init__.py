"""Prompt files, tokenizers and the order in which prompts are visited."""

from megatron_gspo.data.cursor import CursorState, PromptCursor
from megatron_gspo.data.prompts import Completion, CompletionSet, PromptSet, load_completions, load_prompts
from megatron_gspo.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Completion",
    "CompletionSet",
    "CursorState",
    "PromptCursor",
    "PromptSet",
    "Tokenizer",
    "load_completions",
    "load_prompts",
    "load_tokenizer",
]
