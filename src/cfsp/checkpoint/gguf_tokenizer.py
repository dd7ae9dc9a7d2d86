"""A tokenizer in GGUF's terms, both ways: tokens, types, scores, merges, and how text is split.

Two kinds of byte-pair encoding occur: SentencePiece's (GGUF `llama`), where a score ranks the
tokens; and byte-level (GGUF `gpt2`), where text is split first and a file has only a name for how.
The expressions are those of the models' own tokenizer.json; which name means what, llama.cpp says
(its src/llama-vocab.cpp). transformers builds the tokenizer of a file, but for BOS and the splits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cfsp.checkpoint.turn_end import turn_end
from cfsp.errors import CannotSayError, ExportError, OutputError, first_line

if TYPE_CHECKING:
    from gguf import GGUFReader, SpecialVocab

# Where tokenizer_config.json keeps the name of the pre-tokenizer, for the way back.
PRE_TOKENIZER_KEY = "gguf_pre_tokenizer"

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

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


def _recognised(fields: dict[str, Any]) -> str:
    """Return the name of how a tokenizer.json of byte-level BPE treats text."""
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
    for known in exact or alike:
        return known.name
    raise ExportError(
        "cannot tell llama.cpp's name for the way in which this tokenizer splits text "
        f"({' then '.join(steps)}); give it with --pre-tokenizer (known ones: "
        f"{', '.join(p.name for p in PRE_TOKENIZERS)})"
    )


# From a file.


def tokenizer_of(path: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a file, with BOS and the splits that llama.cpp would make."""

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(f"tokenizer.ggml.{name}")
        return default if found is None else found.contents()

    kind, name = field("model"), field("pre", "default")
    known = BY_NAME.get(name) if kind == "gpt2" else None
    said: dict[str, Any] = {"gguf_file": str(path.absolute())}
    if kind in ("gpt2", "llama"):
        adds_bos = known.adds_bos if known else kind == "llama"
        said["add_bos_token"] = bool(field("add_bos_token", adds_bos))
    # Not from the file's directory, where transformers would take the tokenizer of another model.
    with tempfile.TemporaryDirectory() as empty:
        tokenizer: Any = AutoTokenizer.from_pretrained(empty, trust_remote_code=False, **said)
    if kind == "gpt2":
        _restore_added(tokenizer, field("tokens"), field("token_type", ()))
    backend = tokenizer.backend_tokenizer
    if known is not None:
        backend.pre_tokenizer = known.splits()
        backend.model.ignore_merges = known.ignores_merges
    elif kind == "llama" and not field("add_space_prefix", True):
        _without_space_prefix(backend)
    if kind == "llama" and reader.fields["general.architecture"].contents() == "phi3":
        tokenizer._tokenizer = _taking_spaces(backend)
    if kind == "gpt2":
        tokenizer.init_kwargs[PRE_TOKENIZER_KEY] = name
    return tokenizer


def _restore_added(tokenizer: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make added tokens whole that no bytes are written as, such as DeepSeek's with a wide bar.

    transformers takes them for text of those bytes, and adds those it needs behind all others.
    """
    from tokenizers import Tokenizer

    letter_of = bytes_to_unicode()
    letters = set(letter_of.values())
    added = {
        number: (token, kind)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (_CONTROL, _USER_DEFINED) and not set(token) <= letters
    }
    if not added:
        return
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = fields["model"]["vocab"]
    ordinary = {token: number for number, token in enumerate(tokens) if number not in added}
    left = set(ordinary.values())
    others = [each for each in fields["added_tokens"] if each["id"] in left]
    for number, (token, kind) in added.items():
        spelled = "".join(letter_of[byte] for byte in token.encode())
        vocabulary.pop(spelled, None)
        if spelled in ordinary:  # text of the same bytes, such as two spaces
            vocabulary[spelled] = ordinary[spelled]
        vocabulary[token] = number
        rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        others.append({"id": number, "content": token, "special": kind == _CONTROL, **rules})
    fields["added_tokens"] = sorted(others, key=itemgetter("id"))
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.update_post_processor()


def _taking_spaces(backend: Any) -> Any:
    """Let special tokens take the white space behind them, as Phi 3's do; no file says it."""
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    return type(backend).from_str(json.dumps(data))


def _without_space_prefix(backend: Any) -> None:
    """Put no space before a text; transformers always does for a tokenizer of Llama's kind."""
    from tokenizers import decoders, pre_tokenizers

    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


# Into a file.


def fields_of(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, pre_tokenizer: str | None
) -> tuple[dict[str, Any], SpecialVocab]:
    """Translate a tokenizer, for an embedding matrix of so many rows."""
    # Fields are called as the writer's methods without `add_`. Ids without a token become unused.
    from gguf import SpecialVocab

    with tempfile.TemporaryDirectory() as directory:
        try:
            tokenizer.save_pretrained(directory)
        except Exception as error:  # of a full disk the package tokenizers has its own
            raise OutputError(
                f"cannot write to {directory}: {first_line(error)}; make room there, or set TMPDIR"
            ) from error
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CannotSayError(
                "the tokenizer has no tokenizer.json form, which gguf export needs"
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = steps_of(fields.get("pre_tokenizer"), "pretokenizers")
        byte_level = any(step["type"] == "ByteLevel" for step in splits)
        special = SpecialVocab(directory, load_merges=byte_level, n_vocab=vocabulary)
    if fields["model"]["type"] != "BPE":
        raise CannotSayError(
            f"gguf export knows BPE tokenizers, this one is {fields['model']['type']}"
        )
    if byte_level and not special.merges:
        raise CannotSayError("the tokenizer has no merges, without which llama.cpp reads none")
    ids: list[int] = tokenizer("a")["input_ids"]
    for kind, token, found in (
        ("bos", tokenizer.bos_token_id, ids[:1]),
        ("eos", tokenizer.eos_token_id, ids[-1:]),
    ):
        special.add_special_token[kind] = token is not None and found == [token]
    for end in (turn_end(tokenizer) - {tokenizer.eos_token_id}) & {*range(vocabulary)}:
        special.special_token_ids.setdefault("eot", end)
    tokens, types = _tokens(fields, vocabulary)
    came_with = tokenizer.init_kwargs.get(PRE_TOKENIZER_KEY)  # from a .gguf file
    pre = pre_tokenizer or (came_with or _recognised(fields) if byte_level else "default")
    written: dict[str, Any] = {
        "tokenizer_model": "gpt2" if byte_level else "llama",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": types,
    }
    if not byte_level:
        written["token_scores"] = _scores(fields, tokens)
        before = steps_of(fields.get("normalizer"), "normalizers")
        written["add_space_prefix"] = any(
            step["type"] == "Prepend"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in [*before, *splits]
        )
    return written, special


def _tokens(fields: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    model = fields["model"]
    entries = [(i, text, _NORMAL) for text, i in model["vocab"].items()]
    # transformers adds a family's usual tokens to any tokenizer, also beyond the embeddings.
    entries += [
        (entry["id"], entry["content"], _CONTROL if entry["special"] else _USER_DEFINED)
        for entry in fields["added_tokens"]
        if entry["id"] < vocabulary
    ]
    for i, text, kind in entries:
        if i >= vocabulary:
            raise ExportError(
                f"the tokenizer has token {i} ({text!r}), the model only {vocabulary} embeddings"
            )
        tokens[i] = text
        types[i] = kind
        if model.get("byte_fallback") and text.startswith("<0x") and len(text) == 6:
            types[i] = _BYTE
        elif text == model.get("unk_token"):
            types[i] = _UNKNOWN
    return tokens, types


def _scores(fields: dict[str, Any], tokens: list[str]) -> list[float]:
    """Rank tokens by the merge that makes them: the first merge is the first to be done."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(fields["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, i)
    last = len(rank)
    return [-float(rank.get(token, last)) for token in tokens]
