"""A decoder that transformers does not know, and others that only seem as if they could be cut."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

HIDDEN, CHANNELS, BLOCKS = 32, 48, 4


class ToyConfig(PreTrainedConfig):
    model_type = "cfsp_toy"
    trick: str = ""
    vocab_size: int = 64
    hidden_size: int = HIDDEN
    channels: int = CHANNELS
    num_hidden_layers: int = BLOCKS
    tie_word_embeddings: bool = False


class InterleavedFFN(nn.Module):
    """Gate and up share `squeeze`, row about row."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.trick, self.config = config.trick, config
        self.scale = config.channels**-0.5 if self.trick == "scaled as it is built" else 1.0
        self.squeeze = nn.Linear(HIDDEN, 2 * config.channels)
        self.unsqueeze = nn.Linear(config.channels, HIDDEN, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        both = self.squeeze(x_BTD)
        gate, up = both[..., ::2], both[..., 1::2]
        if self.trick == "softmax over channels":
            gate = gate.softmax(-1)
        elif self.trick == "channels rolled":
            gate = gate.sigmoid().roll(1, -1)
        else:
            gate = gate.sigmoid()
        if self.trick == "output not used":
            return torch.zeros_like(x_BTD)
        act = gate * up
        if self.trick.startswith("quantised by the largest"):
            act[..., int(self.trick.split()[-1])] *= 50
            step = act.abs().max() / 127
            act = (act / step).round() * step
        if self.trick == "scaled while it runs":
            act = act * self.config.channels**-0.5
        if self.trick == "more rows than tokens":
            return self.unsqueeze(torch.cat([act, act]))[: len(act)]
        return self.unsqueeze(self.scale * act)


class Mixer(nn.Module):
    """Stands for attention: each token gets the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # In float32 whatever the dtype of the model is.
        seen_TT = torch.ones(x_BTD.shape[1], x_BTD.shape[1]).tril()
        sums_BTD = seen_TT @ x_BTD.float()
        least = torch.full((), torch.finfo(x_BTD.dtype).min)
        means_BTD = torch.max(sums_BTD / seen_TT.sum(1, keepdim=True), least)
        return self.mix(means_BTD.to(x_BTD.dtype))


class ToyBlock(nn.Module):
    def __init__(self, config: ToyConfig, index: int) -> None:
        super().__init__()
        self.trick = config.trick
        self.mixer = Mixer()
        self.thinker = InterleavedFFN(config) if index != 1 else None
        # In a list, so that it is no submodule of this block.
        self.watched: list[nn.Module] = []
        if self.trick == "width feeds attention" and self.thinker:
            self.mixer.from_channels = nn.Linear(2 * config.channels, HIDDEN, bias=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        mixed = self.mixer(hidden_states)
        if self.trick == "width feeds attention" and self.thinker:
            mixed = mixed + self.mixer.from_channels(self.thinker.squeeze(hidden_states))
        for thinker in self.watched:
            mixed = mixed * thinker.squeeze.weight.norm()
        hidden_states = hidden_states + mixed
        if self.thinker is None:
            return hidden_states
        added = self.thinker(hidden_states)
        if self.trick == "choices that float32 would round":
            added = added + (1e8 * added).sin().sign()
        return hidden_states + added


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "core"

    def _init_weights(self, module: nn.Module) -> None:
        pass


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, HIDDEN)
        self.steps = nn.ModuleList(ToyBlock(config, i) for i in range(config.num_hidden_layers))
        if config.trick == "weights tied between blocks":
            self.steps[3].thinker.unsqueeze.weight = self.steps[2].thinker.unsqueeze.weight
        if config.trick == "a neighbour looks":
            self.steps[1].watched.append(self.steps[0].thinker)
        if config.trick == "one module in two blocks":
            self.steps[3].thinker = self.steps[2].thinker
        self.post_init()

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> BaseModelOutput:
        if self.config.trick == "takes no token ids":
            raise TypeError("no token ids")
        hidden = self.words(input_ids)
        if self.config.trick == "windows and tokens are one axis":
            hidden = hidden.flatten(0, 1)[None]
        for number, step in enumerate(self.steps):
            if self.config.trick == "a block skipped" and number == 2:
                continue
            hidden = step(hidden)
            if self.config.trick == "a block called twice" and number == 2:
                hidden = step(hidden)
            if self.config.trick == "something between blocks" and number == 2:
                hidden = 2 * hidden
        return BaseModelOutput(last_hidden_state=hidden)


class ToyForCausalLM(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.core = ToyModel(config)
        self.head = nn.Linear(HIDDEN, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **more: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.core(input_ids, **more).last_hidden_state))


def register() -> None:
    """Make the class known to transformers' Auto classes, as a user would."""
    AutoConfig.register("cfsp_toy", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
