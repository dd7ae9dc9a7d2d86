"""Answers to questions in the chat template, beside those of the dense model.

Every model answers greedily, one model after the other in memory. The dense model's answers are
then read by all models, as texts are: of a window, a question and its answer, the answer counts.

Shapes: B questions of a batch, N of all, T tokens, P predictions, V vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import takewhile
from numbers import Integral
from operator import eq
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.locating import exists
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import longest_input_of
from cfsp.errors import TextError, UsageError
from cfsp.progress import item_progress
from cfsp.quality.generation import Generator, Whole, asking, prompt_of
from cfsp.quality.paired import as_json, per_count
from cfsp.quality.perplexity import WindowSums
from cfsp.quality.results_file import answer_measures
from cfsp.streaming.work_dir import WorkDir, load_or_compute
from cfsp.text.records import Conversation
from cfsp.text.sources import TextSource
from cfsp.text.windows import Windows

_FILE = Path(__file__).with_name("questions.jsonl")
_BATCH = 32
ANSWER_TOKENS = 96  # at most
_LOOP_TOKENS, _LOOP_TIMES = 4, 4  # a loop is a sequence of so many tokens that comes so many times


@dataclass(frozen=True)
class Questions:
    """Questions with their kinds: what a user says, after what a chat may begin with."""

    asked: tuple[tuple[str, Conversation], ...]

    @classmethod
    def of(cls, asked: int | str | Path) -> Questions:
        """Return so many questions of those that come with cfsp, or those that begin chats."""
        lines = _FILE.read_text(encoding="utf-8").splitlines()
        if isinstance(asked, bool):  # to Python it is a number, too
            raise UsageError(
                f"--answers must be a number of questions, of which {len(lines)} come with cfsp, "
                f"or a file of chats, found {asked}"
            )
        if not isinstance(asked, Integral):
            return cls(tuple(_openings(str(asked))))
        if asked < 1:
            raise UsageError(f"--answers needs at least 1 question, found {asked}")
        if asked > len(lines):
            raise UsageError(
                f"{len(lines)} questions come with cfsp, found --answers {asked}; ask fewer, or "
                "your own with --answers CHATS"
            )
        found = (json.loads(line) for line in lines[:asked])
        return cls(tuple((each["kind"], asking(each["question"])) for each in found))

    def identity(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return what answers depend on besides the models, as JSON types."""
        asked = json.dumps([self.asked, str(tokenizer.chat_template)])
        digest = sha256(asked.encode()).hexdigest()
        return {"questions": len(self.asked), "tokens": ANSWER_TOKENS, "digest": digest}

    def prompts(self, source: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the tokens that ask a model each question."""
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"--answers asks in the chat template, and the tokenizer of {source.label} has "
                "none; measure an instruct model, or leave it out"
            )
        prompts, room = [], longest_input_of(source.config)
        for number, (_, asked) in enumerate(self.asked, start=1):
            prompts.append(prompt_of(asked, tokenizer, number))
            if room is not None and len(prompts[-1]) + ANSWER_TOKENS > room:
                raise UsageError(
                    f"question {number} has {len(prompts[-1])} tokens and its answer up to "
                    f"{ANSWER_TOKENS}, but {source.label} reads {room} at once; leave it out"
                )
            check_tokens(source.config, torch.tensor(prompts[-1:]), source.label)
        return prompts


def _openings(name: str) -> Iterator[tuple[str, Conversation]]:
    """Yield each chat up to what its user says first, so with the system's turn."""
    source, number = TextSource(name, "evaluation"), 0
    if isinstance(source.place[0], Path) and not exists(source.place[0]):
        raise TextError(
            f"--answers: {name} does not exist; give a .jsonl or .parquet file of chats, or a "
            "number of the questions that come with cfsp"
        )
    source.open()
    for number, chat in enumerate(source.documents() if source.is_chat else (), start=1):
        roles = [message["role"] for message in chat]
        if "user" not in roles:
            raise TextError(f"{name}, chat {number}: there is no message of the role `user`")
        yield Path(name.removesuffix(":messages")).stem, chat[: roles.index("user") + 1]
    if not number:
        raise TextError(
            f"{name} holds no chats, which --answers needs: a column `messages` (of a file that "
            "has another one, too: FILE:messages)"
        )


def answers_of(
    prompts: Sequence[list[int]], whole: Whole, work_dir: WorkDir, name: str, label: str
) -> list[dict[str, Any]]:
    """Return a model's greedy answers: `tokens`, their text, and whether it `stops` and `loops`.

    What a killed run has answered is not asked again.
    """

    @cache
    def answering() -> tuple[Generator, int]:
        """Return the model in memory, and how many prompts it reads at once."""
        model = Generator(*whole())
        return model, _BATCH if model.reads_padded(prompts) else 1

    found: list[dict[str, Any]] = []
    with item_progress(label, len(prompts), "answer") as bar:

        def ask(some: Sequence[list[int]]) -> dict[str, Any]:
            # The time left is by what is asked here, and not by what was answered before.
            bar.initial, bar.n = bar.initial + len(found) - bar.n, len(found)
            answers = _greedy(*answering(), some)
            bar.update(len(some))
            return {"answers": answers}

        for start in range(0, len(prompts), _BATCH):
            some = prompts[start : start + _BATCH]
            found += load_or_compute(work_dir, f"{name}-{start}", partial(ask, some))["answers"]
    return found


def _greedy(model: Generator, at_once: int, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Return the answers to some questions, each up to and with the end of its turn."""
    found = []
    for start in range(0, len(prompts), at_once):
        for tokens in model.continue_from(prompts[start : start + at_once], ANSWER_TOKENS):
            stops = tokens[-1] in model.ends
            found.append(
                {
                    "tokens": tokens,
                    "answer": model.text_of(tokens),
                    "stops": stops,
                    "loops": is_loop(tokens[:-1] if stops else tokens),
                }
            )
    return found


def is_loop(tokens: Sequence[int]) -> bool:
    """Return whether some sequence of 4 tokens comes at least 4 times."""
    runs = Counter(zip(*(tokens[shift:] for shift in range(_LOOP_TOKENS)), strict=False))
    return max(runs.values(), default=0) >= _LOOP_TIMES


def windows_of(prompts: Sequence[list[int]], answers: Sequence[dict[str, Any]]) -> Windows:
    """Return a window for each question with its answer, of which only the answer counts."""
    rows = [[*prompt, *each["tokens"]] for prompt, each in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    return Windows(
        torch.tensor([row + row[-1:] * (length - len(row)) for row in rows]),
        {"answers": len(rows)},
        counted_N=torch.tensor([len(each["tokens"]) for each in answers]),
        padding_N=torch.tensor([length - len(row) for row in rows]),
    )


def answers_result(
    questions: Questions,
    windows: Windows,
    sums: WindowSums,
    own: Sequence[dict[str, Any]],
    dense: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return what a model's results say of its answers, as JSON types.

    Returns:
        `digest`: of the dense model's answers; `longest`: the tokens that one may have; of each
        answer how many were `predicted`, their `divergence` from the dense model (KL, nats), and
        how many `agreed` in the likeliest token; `documents`: each question, its kind, the model's
        own answer and its tokens, whether it stops and loops, and how many of its first tokens are
        `alike` the dense model's; `summary`: all of these in the mean.
    """
    predicted = windows.scored_N.tolist()
    documents = [
        {"kind": kind, "question": asked[-1]["content"]}
        | {name: each[name] for name in ("answer", "tokens", "stops", "loops")}
        | {"alike": sum(takewhile(bool, map(eq, each["tokens"], its["tokens"])))}
        for (kind, asked), each, its in zip(questions.asked, own, dense, strict=True)
    ]
    found = {
        "digest": windows.digest,
        "longest": ANSWER_TOKENS,
        "predicted": predicted,
        # The dense model agrees with itself.
        "divergence": sums.get("divergence", [0.0] * len(predicted)),
        "agreed": sums.get("agreed", predicted),
        "documents": documents,
    }
    summary = {name: per_count(*each) for name, each in answer_measures(found).items()}
    return {**found, "summary": as_json(summary)}
