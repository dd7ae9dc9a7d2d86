"""A .gguf file as an ordinary checkpoint: dequantised once by transformers, then cached."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedModel

from cfsp.checkpoint.gguf_rope import restore_numbers, restore_positions
from cfsp.checkpoint.gguf_tokenizer import BY_NAME, PRE_TOKENIZER_KEY, tokenizer_of
from cfsp.checkpoint.llama_cpp import tokens_differ
from cfsp.checkpoint.output import (
    cannot_write,
    created_parents,
    exclusive,
    staged_directory,
)
from cfsp.checkpoint.own_files import sha256_of
from cfsp.checkpoint.text_config import text_config_of
from cfsp.checkpoint.turn_end import ends_in, turn_end
from cfsp.errors import ELSEWHERE, CheckpointError, MissingExtraError, OutputError, first_line
from cfsp.progress import library_progress

if TYPE_CHECKING:
    from gguf import GGUFReader

_logger = logging.getLogger(__name__)

# Part of the name of a converted model: one that was converted in another way is not the same.
_CONVERSION = 9
_ROWS = 4096  # that are compared
_MOST_OF_A_NAME = 150  # bytes, of 255 that file systems mostly take
_PATIENCE = 3600.0  # seconds for which another process that converts the same file is waited for
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.")
# Keys of configs that files do not have, and the tensors that tell.
_BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_down.bias"}
# Numbers of which llama.cpp reads one a block; of most graphs transformers reads one for all.
_OF_BLOCKS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")


def import_gguf(path: Path) -> Path:
    """Return a directory with the file's config, tokenizer and weights as safetensors.

    Weights become bfloat16, or float32 or float16 where that is what the file mostly stores.
    """
    stem = os.fsencode(path.stem)[:_MOST_OF_A_NAME].decode(errors="ignore")
    target = _converted_directory() / f"{stem}-{sha256_of(path)[:16]}-v{_CONVERSION}"
    if not (target / "config.json").is_file():
        reader = gguf_reader(path)
        dtype = _stored_dtype(path, reader)
        _logger.info(
            "converting %s (%.2f GB) to safetensors; this takes a minute or more, once",
            path.name,
            path.stat().st_size / 1e9,
        )
        try:
            # Processes that torchrun starts open one file at once: the others wait for the first.
            own = target.with_name(f"{target.name}.converting")
            with created_parents(own), exclusive(own, _PATIENCE), library_progress():
                if not (target / "config.json").is_file():
                    with staged_directory(target) as staging:
                        _convert(path, reader, dtype, staging)
        except OutputError as error:
            # Another process may have converted it where there is no lock.
            if not (target / "config.json").is_file():
                raise OutputError(
                    f"the converted model cannot be written to {target.parent}; set CFSP_CACHE to "
                    "a directory that can be, with room for it"
                ) from error
        _logger.info(
            "the converted model has %.2f GB in %s; without that it is converted again",
            sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e9,
            target,
        )
    return target


def gguf_reader(path: Path) -> GGUFReader:
    """Open a file with the package gguf; all that its header announces must be in the file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError("reading a .gguf file", "gguf") from error

    class BoundedReader(GGUFReader):  # type: ignore[misc]
        # It takes counts and lengths at their word: one that claims 2^60 entries would keep it
        # busy, and growing, for ever.
        def _get(self, offset: int, dtype: Any, count: Any = 1, *order: Any, **more: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **more)
            if len(found) < count:
                raise ValueError(f"its header reaches beyond its {len(self.data)} bytes")
            return found

    try:
        return BoundedReader(path)
    except Exception as error:  # the reader has no exception type of its own
        raise CheckpointError(
            f"{path} is not a readable GGUF file ({first_line(error)}); download it again"
        ) from error


def _stored_dtype(path: Path, reader: GGUFReader) -> torch.dtype:
    # Norms are stored in F32 in every file; matrices tell.
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
    if not matrices:
        raise CheckpointError(
            f"{path} holds no weight matrices; use the safetensors of the same model"
        )
    kind = Counter(t.tensor_type.name for t in matrices).most_common(1)[0][0]
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def _convert(path: Path, reader: GGUFReader, dtype: torch.dtype, target: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, LlamaConfig

    if (count := _said(path, reader, "split.count", int, 1)) > 1:
        raise CheckpointError(
            f"{path} is a part of {count}; join them first: llama-gguf-split --merge FIRST WHOLE"
        )
    graph = _said(path, reader, "general.architecture", str)
    if instead := ELSEWHERE.get(graph):
        raise CheckpointError(f"{path} is for llama.cpp alone (its graph {graph}); {instead}")
    try:
        # Not from the file's directory, where transformers would find an adapter and add it.
        # A file whose name is just mistral it takes for another type than the graph that runs it.
        config = (LlamaConfig if graph == "llama" else AutoConfig).from_pretrained(
            target, gguf_file=str(path.absolute()), trust_remote_code=False
        )
        vars(config).pop("model_type", None)
        names = [tensor.name for tensor in reader.tensors]
        for key, ending in _BIASES.items():
            if any(name.endswith(ending) for name in names) and hasattr(config, key):
                setattr(config, key, True)
        restore_numbers(config, reader)
        model, told = AutoModelForCausalLM.from_pretrained(
            target,
            config=config,
            gguf_file=str(path.absolute()),
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
            use_kernels=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # only to say which they are
        )
        for name, found, expected in sorted(told["mismatched_keys"]):
            raise ValueError(f"{name} is {tuple(found)} in it, {tuple(expected)} by its header")
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} of the model's tensors, as {missing[0]}")
        restore_positions(model.config, reader)
        tokenizer = tokenizer_of(path, reader)
        model.generation_config.eos_token_id = _ends(model, tokenizer, reader)
    except StrictDataclassError as error:
        fields = {key: reader.get_field(f"{graph}.{key}") for key in _OF_BLOCKS}
        keys = [key for key, each in fields.items() if each and isinstance(each.contents(), list)]
        listed = ValueError(f"it says {', '.join(keys)} block by block, as if widths differed")
        raise _unreadable(path, listed if keys else error) from error
    except Exception as error:  # transformers has no one exception type for this
        raise _unreadable(path, error) from error
    # The weights are dense now; with these left, saving would announce them as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    _warn_of_unread(model, path, reader)
    _tie_again(model, path, reader)
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:  # of a full disk both have errors of their own
        raise cannot_write(target, error) from error
    _warn_of_other_tokens(path, target)


def _said(path: Path, reader: GGUFReader, key: str, kind: type, default: Any = None) -> Any:
    field = reader.get_field(key)
    found = default if field is None else field.contents()
    if not isinstance(found, kind):
        raise CheckpointError(f"{path} has no {key} that can be read; download it again")
    return found


def _ends(model: PreTrainedModel, tokenizer: Any, reader: GGUFReader) -> int | list[int] | None:
    """Return what ends an answer; transformers takes the end of a text from a file alone."""
    ends = ends_in(model.config)
    fields = (reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    said = {field.contents() for field in fields if field is not None} | turn_end(tokenizer)
    own: int | list[int] | None = model.config.eos_token_id
    return own if said <= ends else sorted(ends | said)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"transformers cannot read {path} ({first_line(error)}); use the safetensors of the same "
        "model"
    )


def _warn_of_unread(model: PreTrainedModel, path: Path, reader: GGUFReader) -> None:
    """Warn where a file holds more numbers than the model that was read has."""
    state = model.state_dict()
    own = {each.data_ptr(): each.numel() for each in state.values()}
    is_tied, blocks = len(own) < len(state), text_config_of(model.config).num_hidden_layers
    held = sum(
        int(each.n_elements)
        for each in reader.tensors
        # Positions are numbers of the config, and blocks beyond the last predict later tokens.
        if not each.name.startswith("rope_")
        and not (each.name == _HEAD and is_tied)
        and not ((block := _BLOCK.match(each.name)) and int(block[1]) >= blocks)
    )
    if (unread := held - sum(own.values())) > 0:
        _logger.warning(
            "%s holds %s numbers that transformers does not read, so the model may compute "
            "something else: use the safetensors of the same model",
            path.name,
            f"{unread:,}",
        )


def _tie_again(model: PreTrainedModel, path: Path, reader: GGUFReader) -> None:
    """Make the head the embedding again where both are copies of one matrix, quantised twice."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is head or not model._tied_weights_keys or embedding.shape != head.shape:
        return
    one, other = (each.detach()[:_ROWS].double() for each in (embedding, head))
    apart = float((one - other).norm() / one.norm())
    bits = _bits_per_weight(reader)
    if not apart <= _rounding(min(bits.get(_HEAD, 16), bits.get(_EMBEDDING, 16))):
        return
    if bits.get(_HEAD, 0) > bits.get(_EMBEDDING, 0):
        embedding.data.copy_(head.data)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    _logger.info(
        "%s stores the embedding twice, as embedding and as head (%.1f%% apart): they are tied "
        "again, which leaves %.1fM parameters instead of %.1fM",
        path.name,
        100 * apart,
        model.num_parameters() / 1e6,
        (model.num_parameters() + head.numel()) / 1e6,
    )


def _rounding(bits: float) -> float:
    """Return how far two copies of a matrix are apart at most, relative to it, by their rounding.

    Each is 2 to 3 / 2^b from what was stored in b bits for a weight; a head that was trained by
    itself has nothing of the embedding.
    """
    return min(0.2, max(0.01, 5 / 2**bits))


def _bits_per_weight(reader: GGUFReader) -> dict[str, float]:
    return {each.name: 8 * int(each.n_bytes) / int(each.n_elements) for each in reader.tensors}


def _warn_of_other_tokens(path: Path, directory: Path) -> None:
    """Warn where the tokenizer of a converted model splits text otherwise than its .gguf file's."""
    # As it will be loaded: some model types have a tokenizer class that splits in its own way.
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        difference = tokens_differ(path, tokenizer)
    except Exception as error:  # of a tokenizer that cannot split what the file's can
        raise _unreadable(path, error) from error
    name = tokenizer.init_kwargs.get(PRE_TOKENIZER_KEY)
    if difference:
        difference = f"llama.cpp splits text differently: {difference}"
    elif difference is None and name is not None and name not in BY_NAME:
        difference = f"cfsp does not know its pre-tokenizer {name!r}"
    if difference:
        _logger.warning(
            "%s: %s; so the model may get other tokens here than it was trained with: use the "
            "safetensors of the same model",
            path.name,
            difference,
        )


def _converted_directory() -> Path:
    """Return the folder of all converted models: in $CFSP_CACHE, or in cfsp in the user's cache."""
    if own := os.environ.get("CFSP_CACHE"):
        return Path(own) / "gguf"
    try:
        users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # as of a user of a container
        raise OutputError(
            "a .gguf file is converted into the user's cache, but the user has no home directory; "
            "set CFSP_CACHE to a directory that can be written to"
        ) from error
    return Path(users) / "cfsp" / "gguf"
