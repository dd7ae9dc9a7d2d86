"""Chats that the dense model writes itself, whose answers the pruned one learns.

A model that was trained on chats goes on from the beginning of a user's turn with what users say,
and then answers that (Magpie, arXiv 2406.08464). So it teaches what it does in its own template,
which no text is in, and no data is needed for that.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsp.checkpoint.text_config import longest_input_of
from cfsp.checkpoint.turn_end import turn_end
from cfsp.processes import process_count
from cfsp.progress import item_progress
from cfsp.quality.generation import Generator, asking, prompt_of
from cfsp.recovery.data import with_chats
from cfsp.recovery.prepare import Prepared
from cfsp.streaming.work_dir import WorkDir, load_or_compute
from cfsp.text.records import Conversation, templated
from cfsp.text.tokenizers import encoded, load_tokenizer

_AT_ONCE = 32
_QUESTION_TOKENS, _ANSWER_TOKENS = 64, 128  # at most
# As chats are mostly sampled; questions are to be of many kinds.
_ASKING: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 50}
_ANSWERING = _ASKING | {"temperature": 0.7}
_MARK = "river"
_SHARE_OF_TIME = 0.25
_LEAST_WINDOWS = 96  # 48 steps of two were measured to win by chats, 32 were not


def with_own_chats(
    ready: Prepared, dense: PreTrainedModel | None, work_dir: WorkDir | None
) -> Prepared:
    """Return the same with chats that the dense model writes, if it has a template for them.

    None where a run has few windows, or where they would take more than a quarter of its minutes,
    and none of several processes, of which only the first has a work directory.
    Where an answer was cut off it says nothing about the end of one: only what the teacher thinks
    of it is to be learnt.
    """
    training = ready.settings.training
    if dense is None or not training.own_chats or training.teacher_weight < 1:
        return ready
    if work_dir is None or process_count() > 1:  # no process waits for what one writes
        return ready
    in_step = training.windows_in_step
    windows = in_step * training.limit.in_steps(len(ready.text.train), in_step)
    if windows < _LEAST_WINDOWS:
        return ready
    tokenizer = load_tokenizer(ready.source.directory)
    if not opening_of(tokenizer):
        return ready
    seconds = _SHARE_OF_TIME * 60 * (training.limit.minutes or math.inf)

    def write() -> dict[str, Any]:
        return {"chats": own_chats(dense, tokenizer, training.own_chats, training.seed, seconds)}

    with ready.watch.stage("chats"):
        kept = load_or_compute(work_dir, "chats", write)["chats"]
    return replace(ready, text=with_chats(ready.text, kept, tokenizer, training.bos))


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before what a user says first; none if nothing marks where that ends."""
    has_ends = getattr(tokenizer, "is_fast", False) and turn_end(tokenizer, ("user",))
    if not has_ends or not turn_end(tokenizer):
        return []
    before = templated(asking(_MARK), tokenizer, 1).rpartition(_MARK)[0]
    opening: list[int] = encoded(tokenizer, before)["input_ids"]
    return opening


def own_chats(
    whole: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    seconds: float = math.inf,
) -> list[Conversation]:
    """Return the chats that a model writes; it begins so many.

    Those are left out whose question is empty, does not end, or is too long to be answered. It
    stops, with none, as soon as a part of them took more than that part of the seconds, and where
    it reads a question otherwise beside a longer one.
    """
    model = Generator(whole, tokenizer, turn_end(tokenizer, ("user",)))
    opening, room = opening_of(tokenizer), longest_input_of(whole.config)
    torch.manual_seed(seed)
    chats: list[Conversation] = []
    begun = time.monotonic()
    with item_progress("chats of the dense model", count, "chat") as bar:
        for start in range(0, count, _AT_ONCE):
            openings = [opening] * min(_AT_ONCE, count - start)
            due = begun + seconds * (start + len(openings)) / count
            left = due - time.monotonic()
            asked = model.continue_from(openings, _QUESTION_TOKENS, max_time=left, **_ASKING)
            questions = {model.text_of(said) for said in asked if said[-1] in model.ends} - {""}
            prompts = {each: prompt_of(asking(each), tokenizer, 1) for each in sorted(questions)}
            if room is not None:
                prompts = {q: p for q, p in prompts.items() if len(p) + _ANSWER_TOKENS <= room}
            if prompts and not model.reads_padded([*prompts.values()]):
                return []
            left = due - time.monotonic()
            said = model.continue_from(
                [*prompts.values()], _ANSWER_TOKENS, max_time=left, **_ANSWERING
            )
            if time.monotonic() > due:
                return []
            answers = map(model.text_of, said)
            chats += [
                [*asking(question), {"role": "assistant", "content": answer}]
                for question, answer in zip(prompts, answers, strict=True)
                if answer
            ]
            bar.update(len(openings))
    return chats
