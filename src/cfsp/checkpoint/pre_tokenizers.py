"""How llama.cpp treats text before byte pairs are merged, by the name in a GGUF file; as data.

A file of byte-level BPE (GGUF `gpt2`) holds tokens and merges, and only a name for how text is
split first. The expressions are those of the models' own tokenizer.json; which name means what,
llama.cpp says (its src/llama-vocab.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Steps that tokenizer.json has words for; every other step is an expression.
DIGITS, GPT2 = "digits", "gpt2"

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MIXED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES


@dataclass(frozen=True)
class PreTokenizer:
    """One way to treat text."""

    names: str  # in files, separated by spaces; the first is written
    steps: tuple[str, ...]  # `DIGITS` (each on its own), `GPT2` (as the last), or an expression
    adds_bos: bool = False  # before a text, where the file does not say
    ignores_merges: bool = False  # a word that is a token is one, whatever the merges say

    @property
    def name(self) -> str:
        """Return what is written."""
        return self.names.split()[0]

    def splits(self) -> Any:
        """Return the steps as the package tokenizers makes them."""
        from tokenizers import Regex, pre_tokenizers

        made: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True)
            if step == DIGITS
            else pre_tokenizers.Split(Regex(step), behavior="isolated")
            for step in self.steps
            if step != GPT2
        ]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in self.steps)
        return pre_tokenizers.Sequence([*made, last])


PRE_TOKENIZERS = (
    PreTokenizer(
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum "
        "modern-bert",
        (GPT2,),
    ),
    PreTokenizer(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (DIGITS, GPT2)
    ),
    PreTokenizer(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        (_WORDS + r"\p{N}{1,3}" + _REST,),
        adds_bos=True,
        ignores_merges=True,
    ),
    PreTokenizer("dbrx smaug-bpe glm4 chatglm-bpe", (_WORDS + r"\p{N}{1,3}" + _REST,)),
    PreTokenizer(
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        (_WORDS + r"\p{N}" + _REST,),
    ),
    PreTokenizer(
        "qwen35",
        (
            _SHORT
            + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            + _SPACES,
        ),
    ),
    PreTokenizer(
        "tekken",
        (rf"{_MIXED}|{_CAPITALS}|\p{{N}}" + _REST_WITH_SLASH,),
        adds_bos=True,
        ignores_merges=True,
    ),
    PreTokenizer(
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        (rf"{_MIXED}{_SHORT}?|{_CAPITALS}{_SHORT}?|\p{{N}}{{1,3}}" + _REST_WITH_SLASH,),
    ),
    PreTokenizer(
        "deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS)
    ),
    PreTokenizer(
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        (
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ\u30a0-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
        ),
    ),
    PreTokenizer("falcon", (r"[\p{P}$+<=>^~|`]+", _GPT2_WORDS, "[0-9][0-9][0-9]")),
    # What a file without a name means.
    PreTokenizer("default", (r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
)

BY_NAME = {name: known for known in PRE_TOKENIZERS for name in known.names.split()}


def steps_of(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json, of which one alone is no sequence."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def recognised(fields: dict[str, Any]) -> PreTokenizer | str:
    """Return how a tokenizer.json of byte-level BPE treats text; if it has no name, its steps."""
    steps = []
    for step in steps_of(fields["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split":
            expression = step["pattern"].get("Regex", "")
            steps.append(expression.replace("\r", r"\r").replace("\n", r"\n"))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            steps.append(DIGITS)
        elif step["type"] != "ByteLevel":
            steps.append(step["type"])
        elif step.get("use_regex", True):
            steps.append(GPT2)
    alike = [known for known in PRE_TOKENIZERS if known.steps == tuple(steps)]
    whole_words = fields["model"].get("ignore_merges", False)
    exact = [known for known in alike if known.ignores_merges == whole_words]
    return next(iter(exact or alike), " then ".join(steps))
