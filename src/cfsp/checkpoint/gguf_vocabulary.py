"""The tokenizer of a .gguf file, which says little of it: tokens, merges, and a name for the rest.

transformers builds it; BOS and how text is split are llama.cpp's rules (`pre_tokenizers`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.llama_cpp_tokens import tokens_differ
from cfsp.checkpoint.pre_tokenizers import BY_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

# Where tokenizer_config.json keeps the name of the pre-tokenizer, for the way back.
PRE_TOKENIZER_KEY = "gguf_pre_tokenizer"


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a file, with BOS and the splits that llama.cpp would make."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    reader = GGUFReader(path)

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(f"tokenizer.ggml.{name}")
        return default if found is None else found.contents()

    kind, name = field("model"), field("pre", "default")
    known = BY_NAME.get(name) if kind == "gpt2" else None
    said: dict[str, Any] = {"gguf_file": path.name}
    if kind in ("gpt2", "llama"):
        adds_bos = known.adds_bos if known else kind == "llama"
        said["add_bos_token"] = bool(field("add_bos_token", adds_bos))
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **said)
    backend = tokenizer.backend_tokenizer
    if known is not None:
        backend.pre_tokenizer = known.splits()
        backend.model.ignore_merges = known.ignores_merges
    elif kind == "llama" and not field("add_space_prefix", True):
        _without_space_prefix(backend)
    if kind == "gpt2":
        tokenizer.init_kwargs[PRE_TOKENIZER_KEY] = name
    return tokenizer


def _without_space_prefix(backend: Any) -> None:
    """Put no space before a text; transformers always does for a tokenizer of Llama's kind."""
    from tokenizers import decoders, pre_tokenizers

    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def warn_of_other_tokens(path: Path, directory: Path) -> None:
    """Warn where the tokenizer of a converted model splits text otherwise than that of its file.

    Args:
        path: the .gguf file.
        directory: of the converted model.
    """
    from transformers import AutoTokenizer

    # As it will be loaded: some model types have a tokenizer class that splits in its own way.
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    name = tokenizer.init_kwargs.get(PRE_TOKENIZER_KEY)
    difference = tokens_differ(path, tokenizer)
    if difference:
        difference = f"llama.cpp splits text differently: {difference}"
    elif difference is None and name is not None and name not in BY_NAME:
        difference = f"cfsp does not know its pre-tokenizer {name!r}"
    if difference:
        _logger.warning(
            "%s: %s; so the model may get other tokens here than it was trained with: use the "
            "safetensors of the same model",
            path.name,
            difference,
        )
