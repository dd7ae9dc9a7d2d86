"""What a model in memory says next, whatever its own generation config says.

Shapes: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cfsp.checkpoint.turn_end import ends_in, turn_end
from cfsp.quality.perplexity import divergence_and_agreement
from cfsp.streaming.decoder_end import text_model
from cfsp.text.records import Conversation, templated
from cfsp.text.tokenizers import encoded

# A model with its tokenizer, which are loaded where they are needed.
Whole = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]

# KL in nats between a prompt alone and padded, by rounding: 2e-7 in float32, 0.01 in bfloat16.
_MOST_OF_PADDING, _MOST_IN_HALF = 1e-3, 0.1


def asking(question: str) -> Conversation:
    """Return the beginning of a chat in which a user asks something."""
    return [{"role": "user", "content": question}]


def prompt_of(asked: Conversation, tokenizer: PreTrainedTokenizerBase, number: int) -> list[int]:
    """Return the tokens that ask a model what a user says last, whose number errors name.

    One that thinks first answers at once.
    """
    text = templated(asked, tokenizer, number, add_generation_prompt=True, enable_thinking=False)
    tokens: list[int] = encoded(tokenizer, text)["input_ids"]
    return tokens


class Generator:
    """A model with its tokenizer, which continues several prompts at once.

    Attributes:
        ends: the tokens that end what it says.
    """

    def __init__(
        self,
        whole: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        more_ends: Collection[int] = (),
    ) -> None:
        self._model, self._tokenizer = text_model(whole), tokenizer
        # A tokenizer names one, as a config does.
        named = ends_in(whole.generation_config) | ends_in(tokenizer)
        self.ends = named | turn_end(tokenizer) | {*more_ends}
        self._pad = min(self.ends, default=0)
        # What a call leaves open is the model's own, such as its penalty of repetition.
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=sorted(self.ends) or None, pad_token_id=self._pad
        )

    def reads_padded(self, prompts: Sequence[list[int]]) -> bool:
        """Return whether the shortest is read as it is alone when padded like the longest."""
        few = [min(prompts, key=len), max(prompts, key=len)]
        alone_1V, padded_2V = (
            self._generate(some, max_new_tokens=1, output_logits=True).logits[0]
            for some in (few[:1], few)
        )
        off, _ = divergence_and_agreement(padded_2V[:1], alone_1V)
        return off < (_MOST_OF_PADDING if self._model.dtype == torch.float32 else _MOST_IN_HALF)

    def continue_from(
        self, prompts: Sequence[list[int]], tokens: int, **how: Any
    ) -> list[list[int]]:
        """Return at most so many tokens that follow each prompt, up to and with one of `ends`.

        They are the likeliest ones, unless `how` asks transformers to sample.
        """
        if not prompts:
            return []
        sequences_BT = self._generate(prompts, max_new_tokens=tokens, **how).sequences
        found = []
        for said in sequences_BT[:, max(map(len, prompts)) :].tolist():
            words = list(takewhile(lambda token: token not in self.ends, said))
            found.append(said[: len(words) + 1])
        return found

    def text_of(self, said: Sequence[int]) -> str:
        """Return the text of what a model said."""
        words = [token for token in said if token not in self.ends]
        return str(self._tokenizer.decode(words, skip_special_tokens=True)).strip()

    def _generate(self, prompts: Sequence[list[int]], **options: Any) -> Any:
        length = max(map(len, prompts))
        rows = [[self._pad] * (length - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tokens_BT, mask_BT = torch.tensor([rows, mask], device=self._model.device)
        with torch.inference_mode():
            return self._model.generate(
                tokens_BT, attention_mask=mask_BT, return_dict_in_generate=True, **options
            )
