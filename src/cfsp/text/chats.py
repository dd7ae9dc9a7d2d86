"""Conversations: lists of messages, and the text that a model's chat template makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cfsp.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
CHAT_COLUMN = "messages"


def conversation_texts(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield the text of each conversation, all speakers included.

    Raises:
        TextError: the tokenizer has no chat template, or a conversation does not fit it.
    """
    check_has_template(tokenizer)
    for number, conversation in enumerate(conversations, start=1):
        yield templated(conversation, tokenizer, number)


def check_has_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can write conversations as text.

    Raises:
        TextError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            "the model's tokenizer has no chat template, which chat data needs; give plain text, "
            "or an instruct model"
        )


def templated(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text that the chat template makes of a conversation.

    Args:
        conversation: its messages.
        tokenizer: with a chat template.
        number: of the conversation, for errors.
        add_generation_prompt: end with what asks for an answer.

    Raises:
        TextError: the template refuses the conversation.
    """
    template: Any = tokenizer.apply_chat_template

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            text: str = template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what they like
            raise TextError(
                f"conversation {number} does not fit the chat template: {error}"
            ) from error
        return text

    text = render(conversation)
    contents = [content for m in conversation if (content := m["content"].strip())]
    if not contents or any(content in text for content in contents):
        return text
    # Templates of some multimodal models look at the parts of a message, and see none in a text.
    return render(
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation]
    )


def checked_conversation(value: Any, where: str) -> Conversation:
    """Check that a value is a list of messages, each with a role and a content.

    Args:
        value: of the column `messages`.
        where: file and line, for the error.

    Raises:
        TextError: it is something else.
    """
    if not isinstance(value, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    ):
        raise TextError(
            f"{where}: column {CHAT_COLUMN!r} must be a list of messages, each with the texts "
            f'"role" and "content", found {str(value)[:60]}'
        )
    return value
