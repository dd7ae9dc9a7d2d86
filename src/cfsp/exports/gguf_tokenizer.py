"""A tokenizer in GGUF's terms: tokens, types, scores, merges, and how text is split first.

Two kinds of byte-pair encoding occur: byte-level (GGUF `gpt2`), where a regular expression
splits the text first and llama.cpp has a name for each expression; and SentencePiece's
(GGUF `llama`), where a score ranks the tokens. The package `gguf` reads special tokens and chat
template; what transformers runs is the truth about everything else.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.gguf_import import PRE_TOKENIZER_KEY
from cfsp.checkpoint.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, recognised, steps_of
from cfsp.errors import ExportError
from cfsp.exports.common import CannotSayError

if TYPE_CHECKING:
    from gguf import SpecialVocab
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def read_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, pre_tokenizer: str | None
) -> tuple[dict[str, Any], SpecialVocab]:
    """Translate a tokenizer, for an embedding matrix of so many rows."""
    # Fields are called as the writer's methods without `add_`. Ids without a token become unused.
    from gguf import SpecialVocab

    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CannotSayError(
                "the tokenizer has no tokenizer.json form, which gguf export needs"
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = steps_of(fields.get("pre_tokenizer"), "pretokenizers")
        byte_level = any(step["type"] == "ByteLevel" for step in splits)
        special = SpecialVocab(directory, load_merges=byte_level, n_vocab=vocabulary)
    if fields["model"]["type"] != "BPE":
        raise CannotSayError(
            f"gguf export knows BPE tokenizers, this one is {fields['model']['type']}"
        )
    ids: list[int] = tokenizer("a")["input_ids"]
    for kind, token, found in (
        ("bos", tokenizer.bos_token_id, ids[0]),
        ("eos", tokenizer.eos_token_id, ids[-1]),
    ):
        special.add_special_token[kind] = token is not None and found == token
    tokens, types = _tokens(fields, vocabulary)
    pre = pre_tokenizer or (_pre_tokenizer_name(tokenizer, fields) if byte_level else "default")
    written: dict[str, Any] = {
        "tokenizer_model": "gpt2" if byte_level else "llama",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": types,
    }
    if not byte_level:
        written["token_scores"] = _scores(fields, tokens)
        before = steps_of(fields.get("normalizer"), "normalizers")
        written["add_space_prefix"] = any(
            step["type"] == "Prepend"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in [*before, *splits]
        )
    return written, special


def _pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]) -> str:
    """Return the name that the tokenizer came with from a .gguf file, or that of what it does."""
    if name := tokenizer.init_kwargs.get(PRE_TOKENIZER_KEY):
        return str(name)
    known = recognised(fields)
    if isinstance(known, PreTokenizer):
        return known.name
    raise ExportError(
        f"cannot tell llama.cpp's name for the way in which this tokenizer splits text ({known}); "
        f"give it with --pre-tokenizer (known ones: {', '.join(p.name for p in PRE_TOKENIZERS)})"
    )


def _tokens(fields: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    model = fields["model"]
    entries = [(i, text, _NORMAL) for text, i in model["vocab"].items()]
    # transformers adds a family's usual tokens to any tokenizer, also beyond the embeddings.
    entries += [
        (entry["id"], entry["content"], _CONTROL if entry["special"] else _USER_DEFINED)
        for entry in fields["added_tokens"]
        if entry["id"] < vocabulary
    ]
    for i, text, kind in entries:
        if i >= vocabulary:
            raise ExportError(
                f"the tokenizer has token {i} ({text!r}), the model only {vocabulary} embeddings"
            )
        tokens[i] = text
        types[i] = kind
        if model.get("byte_fallback") and text.startswith("<0x") and len(text) == 6:
            types[i] = _BYTE
        elif text == model.get("unk_token"):
            types[i] = _UNKNOWN
    return tokens, types


def _scores(fields: dict[str, Any], tokens: list[str]) -> list[float]:
    """Rank tokens by the merge that makes them: the first merge is the first to be done."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(fields["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, i)
    last = len(rank)
    return [-float(rank.get(token, last)) for token in tokens]
