"""Smaller configs, of whose models the proof runs the first that has the units of the large one.

All widths (hidden size, FFN channels, size of a head, ranks) are divided by the same number; all
counts (blocks, heads, experts, groups) stay. So what must divide another or be its double still
does, and the small model has its FFNs at the places of the large one. Where the size of a head
cannot change, the number of heads is divided instead; where neither can, only FFN channels are.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig

DIVISORS = (32, 16, 8, 4, 2)
LEAST_HIDDEN_SIZE = 64
MOST_TOKEN_IDS = 512
# Of a state-space block: it computes with whole chunks however few tokens there are.
CHUNK = 16

_WIDTH = re.compile(
    r"(^|_)(size|sizes|dim|dims|rank|width|inner|embd|channels|rotary_ndims|mrope_section"
    r"|d_model|d_ff|d_kv|d_head|d_ssm|d_inner|d_state)($|_)"
)
_FFN_WIDTH = re.compile(r"intermediate|ffn|n_inner|d_ff|inner_dim")
_HEADS = re.compile(rf"^(hidden_size|d_model|n_embd|dim|.*heads?)$|{_FFN_WIDTH.pattern}")
_NO_WIDTH = re.compile(
    r"vocab|window|chunk|patch|image|kernel|block_size|batch|group|position|token|cache"
    r"|pad|context|conv_size|vision|audio"
)


def smaller_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield copies of a config, the smallest first and the last with its widths as they are."""
    text_config: Any = config.get_text_config(decoder=True)
    hidden = getattr(text_config, "hidden_size", 0)
    divisors = [number for number in DIVISORS if hidden // number >= LEAST_HIDDEN_SIZE]
    for divisor in divisors:
        yield _shrunk(config, _WIDTH, divisor)
        yield _shrunk(config, _HEADS, divisor)
    for divisor in divisors:
        yield _shrunk(config, _FFN_WIDTH, divisor)
    yield _shrunk(config, _WIDTH, 1)


def _shrunk(config: PreTrainedConfig, names: re.Pattern[str], divisor: int) -> PreTrainedConfig:
    smaller = copy.deepcopy(config)
    text_config = smaller.get_text_config(decoder=True)
    vocabulary = getattr(text_config, "vocab_size", 0)
    for part in (smaller, text_config):
        _use_few_tokens(part, vocabulary)
    _divide(text_config, names, divisor)
    return smaller


def _divide(part: Any, names: re.Pattern[str], divisor: int) -> None:
    """Divide the widths of a config and of the configs and dictionaries in it."""
    values = part if isinstance(part, dict) else vars(part)
    for name, value in list(values.items()):
        if type(value) is int and str(name).endswith("chunk_size"):
            values[name] = min(value, CHUNK)
        elif isinstance(value, dict) or hasattr(value, "to_dict"):
            _divide(value, names, divisor)
        elif names.search(str(name)) and not _NO_WIDTH.search(str(name)):
            values[name] = _each(value, lambda n: n // divisor if n >= divisor else n)


def _each(value: Any, change: Callable[[int], int]) -> Any:
    """Return a whole number, or those in a list, changed; all else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_each(item, change) for item in value)
    return change(value) if type(value) is int and value > 0 else value


def _use_few_tokens(part: Any, vocabulary: int) -> None:
    """Cut the vocabulary; the ids of special tokens move into what is left."""
    for name, value in list(vars(part).items()):
        if type(value) is int and name.startswith("vocab_size"):
            setattr(part, name, min(value, MOST_TOKEN_IDS))
        elif vocabulary > MOST_TOKEN_IDS and re.search(r"token_(id|index)s?$", name):
            setattr(part, name, _each(value, lambda n: n % MOST_TOKEN_IDS))
