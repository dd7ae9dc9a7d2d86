"""Small models of several architectures, trained from nothing on the same text in the same way.

All have the same hidden size, number of blocks, vocabulary, tokens, batches and schedule; an
architecture differs in what its name says.

    llama           residual stream normalised before attention and FFN; gated FFN
    llama-gqa       the same with a key-value head for every four query heads
    llama-mqa       the same with one key-value head
    olmo2           normalised after attention and FFN instead of before
    gemma2          normalised before and after both (sandwich)
    neox-serial     as llama's residual stream, but FFN without gate (4 times the hidden size)
    neox-parallel   the same with attention and FFN side by side in one residual step
    mixtral         llama with 8 experts of half its FFN's width, of which each token takes two
    qwen2-moe       llama with 16 experts of a quarter of it, of which each token takes two, beside
                    a shared expert of half of it

Shapes: B windows of a batch, N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from cfsp.recovery.data import read_text
from cfsp.text.sources import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = Path(__file__).parent / "trained"
# Tried on `llama`: 3e-3 with the usual initial weights of 0.02 learns little in so few tokens.
LEARNING_RATE = 1e-2
_INITIAL = 0.06
_BATCH_TOKENS = 2048
_HEAD_DIM = 8
_WARM_UP = 0.1
# Two experts for each token, and a loss that keeps the router from forgetting the others.
_BALANCED = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.01}


@dataclass(frozen=True)
class Size:
    """How large the models are and how long they are trained.

    Attributes:
        hidden: hidden size; a head has 8 dimensions, so there are hidden / 8 heads.
        blocks: number of blocks.
        vocabulary: entries of the byte-level BPE tokenizer, trained on the same text.
        tokens: training tokens; the text is repeated if it is shorter.
        seqlen: tokens of a window.
    """

    hidden: int = 64
    blocks: int = 8
    vocabulary: int = 512
    tokens: int = 2_000_000
    seqlen: int = 128

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.hidden // _HEAD_DIM


def _common(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": 2 * size.seqlen,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": _INITIAL,
    }


def _neox(size: Size, parallel: bool) -> PreTrainedConfig:
    common = _common(size)
    for name in ("num_key_value_heads", "head_dim"):
        del common[name]
    common["intermediate_size"] = 4 * size.hidden
    return GPTNeoXConfig(**common, use_parallel_residual=parallel)


def _mixtral(size: Size) -> PreTrainedConfig:
    common = {**_common(size), **_BALANCED}
    width = common["intermediate_size"] // 2
    return MixtralConfig(**{**common, "intermediate_size": width}, num_local_experts=8)


def _qwen2_moe(size: Size) -> PreTrainedConfig:
    common = {**_common(size), **_BALANCED}
    width = common["intermediate_size"] // 4
    experts = {"num_experts": 16, "moe_intermediate_size": width, "norm_topk_prob": True}
    return Qwen2MoeConfig(**common, **experts, shared_expert_intermediate_size=2 * width)


ARCHITECTURES: dict[str, Callable[[Size], PreTrainedConfig]] = {
    "llama": lambda size: LlamaConfig(**_common(size)),
    "llama-gqa": lambda size: LlamaConfig(
        **{**_common(size), "num_key_value_heads": max(1, size.heads // 4)}
    ),
    "llama-mqa": lambda size: LlamaConfig(**{**_common(size), "num_key_value_heads": 1}),
    "olmo2": lambda size: Olmo2Config(**_common(size)),
    "gemma2": lambda size: Gemma2Config(**_common(size), query_pre_attn_scalar=_HEAD_DIM),
    "neox-serial": lambda size: _neox(size, parallel=False),
    "neox-parallel": lambda size: _neox(size, parallel=True),
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
}


def place_of(architecture: str, seed: int, size: Size, directory: Path) -> Path:
    """Return the directory of a trained model, whether it is there or not; see `trained`."""
    return directory / f"{architecture}-{size.hidden}x{size.blocks}-{size.tokens}-seed{seed}"


def trained(
    architecture: str, seed: int, size: Size, directory: Path, texts: Sequence[str]
) -> Path:
    """Train a model, or find it trained before.

    Args:
        architecture: a name of `ARCHITECTURES`.
        seed: of the initial weights and of the order of the windows.
        size: of the model, and how long.
        directory: where models of this size and text are kept.
        texts: what to train on, as for `--data`.

    Returns:
        The directory of the model, with its tokenizer.
    """
    place = place_of(architecture, seed, size, directory)
    if not (place / "config.json").is_file():
        tokenizer = tokenizer_of(texts, size.vocabulary, directory)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            ARCHITECTURES[architecture](size), dtype=torch.float32
        )
        tokens_NT = read_text(texts, tokenizer, seqlen=size.seqlen).train.token_NT
        train(model, tokens_NT, size.tokens, seed, place.name)
        tokenizer.save_pretrained(place)
        model.save_pretrained(place)
    return place


def tokenizer_of(texts: Sequence[str], vocabulary: int, directory: Path) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer trained on the texts, or find it trained before."""
    place = directory / f"tokenizer-{vocabulary}"
    if not place.is_dir():
        _train_tokenizer(texts, vocabulary).save_pretrained(place)
    return PreTrainedTokenizerFast.from_pretrained(place)


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (
        document for text in texts for document in TextSource(text, "calibration").documents()
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>")


def train(model: PreTrainedModel, tokens_NT: Tensor, tokens: int, seed: int, label: str) -> None:
    """Train a model in place: AdamW, linear warm-up, cosine decay to a tenth.

    Args:
        model: in training dtype.
        tokens_NT: windows; passed through again if they are too few.
        tokens: how many tokens to train on.
        seed: of the order of the windows.
        label: what the progress line says.
    """
    batch = max(1, _BATCH_TOKENS // tokens_NT.shape[1])
    steps = max(1, tokens // (batch * tokens_NT.shape[1]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    model.train()
    begin, losses = time.perf_counter(), []
    for _, batch_BT in zip(range(steps), _batches(tokens_NT, batch, seed), strict=False):
        output = model(input_ids=batch_BT, use_cache=False)
        text = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch_BT[:, 1:].flatten())
        balance = getattr(output, "aux_loss", None)
        loss = text if balance is None else text + model.config.router_aux_loss_coef * balance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(text.detach()))
    model.eval()
    last = losses[-max(1, steps // 20) :]
    print(
        f"{label}: {model.num_parameters():,} parameters, {steps} steps, "
        f"loss {losses[0]:.3f} to {sum(last) / len(last):.3f}, "
        f"{time.perf_counter() - begin:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _batches(tokens_NT: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order_N = torch.randperm(len(tokens_NT), generator=generator)
        whole = order_N[: max(1, len(order_N) // batch) * batch]
        yield from (tokens_NT[chosen] for chosen in torch.split(whole, batch))


def _rate(progress: float) -> float:
    warm = min(1.0, (progress + 1e-3) / _WARM_UP)
    return warm * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
