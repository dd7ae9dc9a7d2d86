"""Conversations as token windows in which only the answers are trained on.

Chat templates mark no answers. An answer is therefore found as what a longer conversation adds:
the template of the messages up to it, minus the template of those before it with the prompt for
an answer. Tokens are made from the whole text at once, and belong to an answer by their offsets.

Shapes: R tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.errors import TextError
from cfsp.recovery.loss import IGNORED
from cfsp.text.chats import check_has_template, templated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.text.chats import Conversation


def chat_tokens(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the token ids and labels of one conversation after the other, as int64 [R].

    Labels are the token ids where an assistant speaks, `IGNORED` elsewhere.

    Args:
        conversations: lists of messages.
        tokenizer: with a chat template.

    Raises:
        TextError: the tokenizer has no chat template, or a conversation does not fit it.
    """
    check_has_template(tokenizer)
    for number, conversation in enumerate(conversations, start=1):
        ids, answer = answer_tokens(conversation, tokenizer, number)
        token_R = torch.tensor(ids, dtype=torch.int64)
        yield token_R, token_R.where(torch.tensor(answer, dtype=torch.bool), IGNORED)


def answer_tokens(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, number: int = 1
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation and whether each belongs to an answer.

    Args:
        conversation: its messages.
        tokenizer: a fast one, with a chat template.
        number: of the conversation, for errors.

    Raises:
        TextError: the template refuses the conversation, or writes earlier messages differently
            once later ones follow.
    """
    answers: list[tuple[int, int]] = []
    whole = templated(conversation, tokenizer, number)
    for index, message in enumerate(conversation):
        if message["role"] == "assistant":
            before = templated(conversation[:index], tokenizer, number, add_generation_prompt=True)
            after = templated(conversation[: index + 1], tokenizer, number)
            if not (whole.startswith(after) and after.startswith(before)):
                raise TextError(
                    f"conversation {number}: the chat template changes earlier messages when "
                    "later ones follow, so answers cannot be told from the rest"
                )
            answers.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    # A token that begins with the space before an answer belongs to the answer.
    return ids, [any(max(start, a) < min(stop, b) for a, b in answers) for start, stop in offsets]
