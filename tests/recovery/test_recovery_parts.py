"""The parts of recovery: its text, the ranks of adapters, and the sliced loss."""

import copy
import json
import math
import re
from collections.abc import Iterator
from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import ByT5Tokenizer, LlamaConfig

from builders import plan_of
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.errors import PlanError, TextError, UsageError
from cfsp.planning.unit_plan import UnitPlan
from cfsp.recovery import loss as module
from cfsp.recovery.adaptation import allocate_ranks, ranks_of
from cfsp.recovery.data import WindowData, answer_tokens, read_text
from cfsp.recovery.loss import IGNORED, Outputs, language_model_loss
from cfsp.recovery.settings import MOST_TOKENS, Adaptation, Limit, Training
from cfsp.text import sources
from cfsp.text.drawing import spread_documents
from cfsp.text.offline import KINDS
from cfsp.text.sources import TextSource

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHAT
    return changed


def conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "be quiet"},
        {"role": "user", "content": f"number {number} of the river"},
        {"role": "assistant", "content": f"green stone {number}"},
        {"role": "user", "content": "and then"},
        {"role": "assistant", "content": "light falls"},
    ]


def write_chat(path: Path, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"messages": conversation(i)}) for i in range(count)))
    return path


def test_all_windows_are_used_once_and_some_are_held_out(tokenizer, text_file, other_text_file):
    both = [str(text_file), str(other_text_file)]
    text = read_text(both, tokenizer, seqlen=32)
    assert text.sources[both[0]] == read_text(both[:1], tokenizer, seqlen=32).sources[both[0]]
    assert len(text.train) == sum(text.sources.values())
    train, held = (
        {tuple(window.tolist()) for window in data.token_NT} for data in (text.train, text.held_out)
    )
    assert train.isdisjoint(held)
    assert len(held) == len(text.held_out) >= 2
    assert text.train.digest == read_text(both, tokenizer, seqlen=32).train.digest
    data = text.train  # other answers in the same tokens are another text
    labels_NT = data.label_NT.where(torch.arange(32) > 8, IGNORED)
    assert WindowData(data.token_NT, labels_NT).digest != data.digest
    item = text.train[0]
    assert item["labels"][0] == IGNORED  # nothing predicts the first token
    assert item["labels"][1:].tolist() == item["input_ids"][1:].tolist()


def words_of(data, tokenizer):
    return {word for row in data.token_NT for word in tokenizer.decode(row).split()}


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_held_out_documents_are_spread_over_a_text(ending, tokenizer, tmp_path):
    """Of a text that is sorted, both ends are judged by, and nothing of what is trained on."""
    documents = [f"river stone d{number} light falls\n" * 130 for number in range(100)]
    path = tmp_path / f"sorted.{ending}"
    lines = [json.dumps({"text": document}) for document in documents]
    path.write_text("\n".join(lines) if ending == "jsonl" else "".join(documents))
    text = read_text([str(path)], tokenizer, seqlen=64)
    held, train = (
        sorted(int(word[1:]) for word in words_of(data, tokenizer) if re.fullmatch(r"d\d+", word))
        for data in (text.held_out, text.train)
    )
    assert 3 <= len(held) <= 8 and held[0] < 40 and held[-1] == 99
    assert 0.02 < len(text.held_out) / len(text.train) < 0.06
    if ending == "jsonl":
        assert not set(held) & set(train)


def test_no_more_is_read_than_a_run_needs(tokenizer, tmp_path, monkeypatch):
    """Of a local text from all over it, the same again; of one on the hub its beginning."""
    documents = [f"river stone d{number} light falls\n" * 30 for number in range(100)]
    path = tmp_path / "sorted.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))

    def found(name: str = str(path), **how: Any) -> tuple[int, list[int]]:
        text = read_text([name], tokenizer, seqlen=64, **how)
        words = words_of(text.train, tokenizer) | words_of(text.held_out, tokenizer)
        numbers = sorted(int(word[1:]) for word in words if re.fullmatch(r"d\d+", word))
        return 64 * (len(text.train) + len(text.held_out)), numbers

    whole, numbers = found()
    assert numbers == [*range(100)]
    assert found(most=whole) == (whole, numbers)
    some, numbers = found(most=whole // 20)
    assert whole // 20 <= some < whole // 4
    assert numbers[0] < 40 and numbers[-1] >= 60 and len(numbers) < 40
    assert found(most=whole // 20) == (some, numbers) != found(most=whole // 20, seed=1)

    def endless(*_: str) -> Iterator[tuple[dict[str, str], str]]:
        return (({"text": document}, "there") for document in cycle(documents))

    monkeypatch.setattr(sources, "hub_records", endless)
    _, numbers = found("c4", most=whole // 20)
    assert numbers == [*range(len(numbers))]
    monkeypatch.setattr("cfsp.recovery.data._PASS_OVER_A_HUB_TEXT", whole // 10)
    assert found("c4")[1] == [*range(len(found("c4")[1]))] != numbers


def test_of_chats_answers_count_and_a_long_text_is_taken_in_long_pieces(tmp_path):
    chat, prose = tmp_path / "chat.jsonl", tmp_path / "prose.txt"
    asked = {"role": "user", "content": "q" * 1000}, {"role": "assistant", "content": "a" * 10}
    chat.write_text("\n".join([json.dumps({"messages": asked})] * 50))
    found = spread_documents(TextSource(str(chat), "calibration"), 100, 0)
    assert len(found) == 10 and found[-1][0] > 10
    prose.write_text("a river\n" * 100_000)
    whole = spread_documents(TextSource(str(prose), "calibration"), math.inf, 0)
    numbers = [n for n, _ in spread_documents(TextSource(str(prose), "calibration"), 200_000, 0)]
    assert 45 < len(numbers) < 60 < 180 < len(whole)
    assert sum(b > a + 1 for a, b in pairwise(numbers)) <= 4


def test_what_a_run_needs_of_a_text():
    few = Training(Limit(steps=3))
    many = Training(Limit(steps=1000), batch_windows=4, seqlen=256)
    assert few.most_tokens(1) == Training(Limit(minutes=0.01)).most_tokens(1) == 1 << 17
    assert many.most_tokens(1) == many.most_tokens(3) == 1000 * 4 * 256
    an_hour = Training(Limit(minutes=60))
    assert an_hour.most_tokens(1) == 3 * an_hour.most_tokens(3) == 3600 * 10_000
    assert Training(Limit(minutes=100_000)).most_tokens(1) == MOST_TOKENS
    assert Training().most_tokens(1) == math.inf


@pytest.mark.usefixtures("short_kinds")
def test_every_kind_of_the_mixed_text_is_held_out(tokenizer):
    text = read_text(["mixed", "mixed/books"], tokenizer, seqlen=32)
    assert list(text.sources) == [f"mixed/{kind}" for kind in KINDS]
    for data in (text.held_out, text.train):
        assert words_of(data, tokenizer) >= set(KINDS)


# Qwen3's template shows the last answer with what was thought before it, earlier ones without.
THOUGHTS_LAST = CHAT.replace(
    "{{ m['content'] }}",
    "{% if loop.last and m['role'] == 'assistant' %}(thought) {% endif %}{{ m['content'] }}",
)
# The prompts of DeepSeek-R1 and QwQ open thoughts, which are left out of every answer.
THINKING = CHAT.replace("<s>assistant: {% endif", "<s>assistant: <think>{% endif")
HELLO = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("template", "turns", "read", "trained"),
    [
        (CHAT, conversation(7), "river", " green stone 7|\n light falls|\n"),
        (CHAT, [HELLO, *conversation(7)[1:3]], "hello", " green stone 7|\n"),
        (THOUGHTS_LAST, conversation(7), "green stone 7", "(thought) light falls|\n"),
        (THOUGHTS_LAST, conversation(7)[:-1], "green stone 7", ""),
        (THINKING, conversation(7), "river", " green stone 7|\n light falls|\n"),
    ],
    ids=["answers", "an opening is none", "as last shown", "a question is last", "thinking"],
)
def test_only_answers_are_labelled(template, turns, read, trained, chat_tokenizer):
    chat_tokenizer.chat_template = template
    token_R, label_R = answer_tokens(turns, chat_tokenizer)
    text = chat_tokenizer.decode(token_R)
    assert read in text and "think" not in text
    labelled_R = label_R != IGNORED
    assert torch.equal(token_R[labelled_R], label_R[labelled_R])
    assert chat_tokenizer.decode(label_R[labelled_R]).replace("</s>", "|") == trained


def test_a_chat_file_is_packed(chat_tokenizer, tmp_path):
    path = write_chat(tmp_path / "chat.jsonl", 40)
    text = read_text([str(path)], chat_tokenizer, seqlen=64)
    label_NT = text.train.label_NT
    assert bool((label_NT != IGNORED).any(dim=1).all())
    assert 0.1 < float((label_NT != IGNORED).float().mean()) < 0.6
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"messages": [conversation(i) for i in range(40)]})
    parquet.write_table(table, tmp_path / "chat.parquet")
    for same in (path, tmp_path / "chat.parquet"):
        found = read_text([f"{same}:messages"], chat_tokenizer, seqlen=64)
        assert found.train.digest == text.train.digest


def test_templates_that_give_no_answers_are_errors(tokenizer, tmp_path):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    good = write_chat(tmp_path / "good.jsonl", 5)
    with pytest.raises(TextError, match="no chat template"):
        read_text([str(good)], plain, seqlen=64)
    without_offsets = ByT5Tokenizer(chat_template=tokenizer.chat_template)
    with pytest.raises(TextError, match=r"ByT5Tokenizer\) does not say which characters .* plain"):
        read_text([str(good)], without_offsets, seqlen=64)
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(TextError, match="changes earlier messages"):
        read_text([str(good)], forgetful, seqlen=64)


# Ranks.


importances = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=60)


@given(importances, st.integers(1, 64))
def test_the_total_is_kept_no_block_is_without_and_more_important_ones_have_no_less(
    importance_L, rank
):
    ranks_L = allocate_ranks(importance_L, rank)
    assert sum(ranks_L) == rank * len(importance_L)
    assert min(ranks_L) >= 1
    by_importance = [found for _, found in sorted(zip(importance_L, ranks_L, strict=True))]
    assert by_importance == sorted(by_importance)


def test_of_remainders_that_are_equal_in_floats_the_more_important_comes_first():
    """All of 1.0 have 32.55, and so has, before the last of them, what lacks an ulp of it."""
    importance_L = [1.0] * 5 + [0.5] * 4 + [0.625, 0.84375, 1 - 2**-53, 0.375, 0.0625, 0.03125, 1.0]
    ranks_L = allocate_ranks([*importance_L, 0.03125], 21)
    assert ranks_L[15] >= ranks_L[11]


def test_proportional_where_no_rounding_is_needed():
    assert allocate_ranks([0.1, 0.2, 0.3], 8) == [4, 8, 12]
    assert sum(allocate_ranks([0.5] * 4, 2.25)) == 9


def test_blocks_without_an_ffn_get_the_mean_importance(tmp_path):
    units = [UnitPlan(block, 8, (0, 1), 0.1, importance, path="mlp")
             for block, importance in ((0, 0.2), (2, 0.6), (2, 0.6))]  # fmt: skip
    plan_of(*units).save(tmp_path / PLAN_FILE)
    of_ffns = SimpleNamespace(units=units)
    architecture = SimpleNamespace(block_count=3, of_part=lambda part: of_ffns)
    config = LlamaConfig(hidden_size=10, num_attention_heads=1)
    of_model = {"architecture": architecture, "config": config, "label": "m"}
    source = SimpleNamespace(directory=tmp_path, **of_model)
    with pytest.raises(UsageError, match=r"of at most 10, the hidden size, .* found 10\.5"):
        ranks_of(source, Adaptation(rank=10.5))
    for allocation, expected in (
        ("importance", [5, 10, 15]), ("inverse", [16, 8, 6]), ("uniform", [10, 10, 10]),
    ):  # fmt: skip
        assert ranks_of(source, Adaptation(rank=10, allocation=allocation)) == expected
    of_ffns.units = units[:2]
    with pytest.raises(PlanError, match=r"describes 3 FFNs, the model has 2 in 3 blocks"):
        ranks_of(source, Adaptation(rank=10, allocation="importance"))
    units[0] = UnitPlan(0, 8, (0, 1), 0.1, 0.0, path="mlp")
    plan_of(*units[:2]).save(tmp_path / PLAN_FILE)
    with pytest.raises(UsageError, match=r"found 0\.0; use --rank-allocation uniform"):
        ranks_of(source, Adaptation(rank=10, allocation="importance"))


# The sliced loss against what autograd makes of the plain formulas.


N, D, V = 11, 8, 37


@pytest.fixture(autouse=True)
def small_slices(monkeypatch) -> None:
    # Four tokens a slice: the last slice is not full.
    monkeypatch.setattr(module, "_LEAST_ROWS", 4)
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", 0)


def inputs(seed: int = 0) -> tuple[Outputs, Tensor, Outputs]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, requires_grad=True)
    head_VD = torch.randn(V, D, generator=generator)
    label_N = torch.randint(V, (N,), generator=generator)
    label_N[[2, 7]] = IGNORED
    teacher_ND = torch.randn(N, D + 1, generator=generator)
    teacher_VD = torch.randn(V, D + 1, generator=generator)
    return Outputs(hidden_ND, head_VD), label_N, Outputs(teacher_ND, teacher_VD)


def whole(outputs: Outputs) -> Outputs:
    """Return the same as logits."""
    assert outputs.head_VD is not None
    return Outputs(outputs.output_ND @ outputs.head_VD.T)


def plain_loss(own: Outputs, label_N: Tensor, teacher: Outputs, weight: float | None) -> Tensor:
    keep_N = label_N != IGNORED
    logit_NV, teacher_NV = (whole(each).output_ND[keep_N] for each in (own, teacher))
    labels = cross_entropy(logit_NV, label_N[keep_N], reduction="sum")
    if weight is None:
        return labels
    mine, target = (log_softmax(each, 1) for each in (logit_NV, teacher_NV))
    divergence = (target.exp() * (target - mine)).sum()
    return weight * divergence + (1 - weight) * labels


def gradient(loss: Tensor, own: Outputs) -> Tensor:
    (found,) = torch.autograd.grad(3.0 * loss, own.output_ND, retain_graph=True)
    return found


@pytest.mark.parametrize("weight", [None, 1.0, 0.3])
def test_loss_and_gradient_by_slices_and_by_whole_logits(weight):
    own, label_N, teacher = inputs()
    plain = plain_loss(own, label_N, teacher, weight)
    for made in (lambda outputs: outputs, whole):
        taught = (made(teacher), weight) if weight else ()
        ours = language_model_loss(made(own), label_N, *taught)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(gradient(ours, own), gradient(plain, own))


def test_bfloat16_autocast_stays_near_float32():
    own, label_N, _ = inputs()
    plain = language_model_loss(own, label_N)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = language_model_loss(own, label_N)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.02, atol=0.02)
    found = gradient(rounded, own)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gradient(plain, own), rtol=0.1, atol=0.1)


def test_without_gradient_and_without_labels():
    own, label_N, _ = inputs()
    with torch.no_grad():
        quiet = language_model_loss(own, label_N)
    torch.testing.assert_close(quiet, language_model_loss(own, label_N).detach())
    nothing = language_model_loss(own, torch.full_like(label_N, IGNORED))
    assert nothing.item() == 0
    assert float(gradient(nothing, own).abs().max()) == 0
