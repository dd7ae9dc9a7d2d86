"""The token with which a chat template ends an answer, which not every config knows as an end.

Many copies of Gemma and all .gguf files of Phi-3 name <eos> alone, and their models end a turn with
<end_of_turn> or <|end|>.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SAID = "river"


def ends_in(config: Any) -> set[int]:
    """Return the tokens that a config, or one of generation, names as an end: none to several."""
    named = getattr(config, "eos_token_id", None)
    return {*(named if isinstance(named, list) else [named])} - {None}


def turn_end(tokenizer: Any, roles: Sequence[str] = ("user", "assistant")) -> set[int]:
    """Return the token, if the template ends what the last role says with one that is no text."""
    turns = [{"role": role, "content": _SAID} for role in roles]
    try:
        before, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_SAID)
        first: list[int] = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
        return {*first} & tokenizer.added_tokens_decoder.keys() if before else set()
    except Exception:  # it has no template, or one of which chats will say more
        return set()
