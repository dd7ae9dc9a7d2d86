"""Tasks of lm-evaluation-harness on a .gguf file, from llama.cpp's own logits.

Requests, scoring and standard errors are the harness's, as for `cfsp eval --tasks`.

Shapes: T tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from cfsp.checkpoint.llama_cpp import LlamaCpp
from cfsp.quality.tasks.harness import TaskRunner

# The strings, and the tokens of the context and of the continuation.
Request = tuple[tuple[str, str], list[int], list[int]]


def scorer(runner: TaskRunner, file: Path, tokenizer: Any) -> Callable[[str], dict[str, Any]]:
    """Return what scores a .gguf file, with the tokenizer of the checkpoint it was made of."""
    return partial(runner.score, GgufModel(file, tokenizer), torch.float32)


class GgufModel(TemplateLM):
    """The model as the harness asks it: log-likelihoods of continuations, nothing else."""

    def __init__(self, file: Path, tokenizer: Any) -> None:
        super().__init__()
        self._file = file
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token at the end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation without context: BOS where there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens, with those around them that the tokenizer adds by itself."""
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **how))

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Return of each continuation the log-likelihood, and whether it is the greedy one."""
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        found: list[tuple[float, bool]] = []
        cached: list[int] = []
        with LlamaCpp(self._file, context=longest) as model:
            for _, context, continuation in requests:
                tokens = (context + continuation)[:-1]
                # What it has in common with the request before is not computed again, but for the
                # last token of the context, whose logits are of the first token that continues it.
                shared = min(_equal_at_the_start(cached, tokens), len(context) - 1)
                model.rewind(shared)
                logits_TV = model.feed(tokens[shared:], last=len(continuation))
                cached = tokens
                expected_T = torch.tensor(continuation)
                likelihoods_T1 = logits_TV.log_softmax(dim=1).gather(1, expected_T[:, None])
                is_greedy = bool((logits_TV.argmax(dim=1) == expected_T).all())
                found.append((float(likelihoods_T1.sum()), is_greedy))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refuse: no task of ours asks for it."""
        raise NotImplementedError("log-likelihoods of whole texts")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Refuse: only choices and given continuations are scored."""
        raise NotImplementedError("answers that the model writes")


def _equal_at_the_start(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
