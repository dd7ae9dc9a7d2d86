"""Conversations: lists of messages, and the text that a model's chat template makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cfsp.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contents are texts; beside images they are lists of parts.
Conversation = list[dict[str, Any]]
CHAT_COLUMN = "messages"


def conversation_texts(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield the text of each conversation, all speakers included."""
    check_has_template(tokenizer)
    for number, conversation in enumerate(conversations, start=1):
        yield templated(conversation, tokenizer, number)


def check_has_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can write conversations as text, or raise TextError."""
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            "the model's tokenizer has no chat template, which chat data needs; give plain text, "
            "or an instruct model"
        )


def templated(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    **asked: bool,
) -> str:
    """Return the text that the chat template makes of a conversation, whose number errors name.

    The template is asked for more by name: `add_generation_prompt` ends it with what asks for an
    answer, and without `enable_thinking` a model that thinks first answers at once.
    """
    template: Any = tokenizer.apply_chat_template

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            text: str = template(messages, tokenize=False, **asked)
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


def checked_conversation(value: Any, where: str, *, beside_images: bool) -> Conversation:
    """Return messages with their contents as texts, without the places of images beside them."""
    messages = checked_messages(value, where)
    parts = [part for message in messages for part in message["content"]]
    if not beside_images and any(part["type"] == "image" for part in parts):
        raise TextError(
            f"{where}: a message has an image, but there is no column 'images' beside the messages"
        )
    return [
        {**message, "content": "".join(part.get("text", "") for part in message["content"])}
        for message in messages
    ]


def checked_messages(value: Any, where: str) -> Conversation:
    """Return messages, each with a role and a content, with all contents as lists of parts.

    A content is a text, or a list of {"type": "text", "text"} and {"type": "image"}.
    """
    found = value if isinstance(value, list) and all(isinstance(m, dict) for m in value) else None
    contents = [_parts(message.get("content")) for message in found or ()]
    roles = [message.get("role") for message in found or ()]
    if found is None or None in contents or not all(isinstance(role, str) for role in roles):
        raise TextError(
            f"{where}: column {CHAT_COLUMN!r} must be a list of messages, each with the texts "
            f'"role" and "content", found {str(value)[:60]}'
        )
    return [{**message, "content": parts} for message, parts in zip(found, contents, strict=True)]


def _parts(content: Any) -> list[dict[str, str]] | None:
    """Return the parts of a message's content; None if it is none."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        return None
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            parts.append({"type": "image"})
        else:
            return None
    return parts
