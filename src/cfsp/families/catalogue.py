"""The language model types of the installed transformers, and the proof of each.

A family is built from a config of its type, with values by hand where the default one cannot be
built or run; real configs have these values. It is proved in a process of its own: a class may
crash or hang.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cfsp.errors import CfspError, UnsupportedModelError, first_line
from cfsp.settings import PARTS, Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# For each part why none of it can go; None if some can.
Reasons = dict[Part, str | None]

# Seconds. For a few types all proofs take more than two minutes on a slow core of its own.
PROOF_LIMIT = 1800.0
MOST_AT_A_TIME = 4
# Prints what `why_not` says of the type and the class that follow; nothing is imported from the
# current directory.
PROGRAM = (sys.executable, "-P", "-m", "cfsp.families.catalogue")
# Begins the line of the answer: classes print before it, and at exit.
_ANSWER = "why not: "


_HEADS = {"head_dim": 128}
_OCR_EXPERTS = {"mlp_layer_types": ["dense"] + 31 * ["sparse"], "num_experts_per_tok": 6}
_COMPASS_ROPE = {"rope_parameters": {
    "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50000.0},
}}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
    "indexer_compress_ratio": 16,
}  # fmt: skip


def _with_sections(*sections: int, **more: float) -> dict[str, Any]:
    """Return a text config whose rotary embeddings are in sections of these lengths."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections], **more}
    return {"text_config": {**_HEADS, "rope_parameters": rope}}


_VALUES: dict[str, dict[str, Any]] = {
    # The size of a head is computed from no default.
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "hunyuan_vl": _with_sections(16, 16, 16, 16),
    "ministral": _HEADS,
    # Nor the number of key and value heads.
    "nemotron": {"num_key_value_heads": 48},
    # No number of experts, or of experts for a token.
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    # It is not said which blocks are which.
    "lfm2_moe": {"layer_types": 8 * ["conv", "conv", "conv", "full_attention"]},
    "deepseek_ocr2": {"text_config": _OCR_EXPERTS},
    # Sliding blocks without a window.
    "step3p7": {"text_config": {"sliding_window": 512}},
    # Two kinds of blocks need rotary parameters each.
    "cohere_compass_text": _COMPASS_ROPE,
    "cohere_compass": {"text_config": _COMPASS_ROPE},
    # Sparse blocks without the sizes of their indexer.
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    # 96 heads do not divide 4096, and the sections of rotary embeddings are those of half a head.
    "glm4v_moe": _with_sections(8, 12, 12, partial_rotary_factor=0.5),
    # 14 vision heads do not divide 1152.
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    # 24 layers of a vision tower that has work for six: one would be a matrix of 47 GB.
    "inkling_mm_model": {"vision_config": {"num_hidden_layers": 6}},
    # The ids of image tokens are looked up by name.
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGA": 4}},
    "emu3": {"vocabulary_map": {"<image>": 8711, "<|extra_200|>": 8710}},
    # It is not said which layers of the vision tower are used.
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
}


@dataclass(frozen=True)
class Family:
    """A model type and its class; multimodal types can have one with and one without pictures."""

    model_type: str
    class_name: str

    def config(self) -> PreTrainedConfig:
        """Return the config of a checkpoint of the class, if one can be made."""
        import transformers

        model_class = getattr(transformers, self.class_name)
        values = copy.deepcopy(_VALUES.get(self.model_type, {}))
        config: PreTrainedConfig = transformers.CONFIG_MAPPING[self.model_type](**values)
        # A multimodal type's class for text alone is built from the config of its text decoder.
        if model_class.config_class is config.sub_configs.get("text_config"):
            config = config.get_text_config()
        config.architectures = [self.class_name]
        return config


def installed_families() -> list[Family]:
    """Return what transformers has for language modelling and for text from images."""
    from transformers.models.auto import modeling_auto

    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    # The first of several classes is the one that the Auto class builds unless told otherwise.
    pairs = {
        (model_type, names if isinstance(names, str) else names[0])
        for mapping in mappings
        for model_type, names in mapping.items()
        if model_type in modeling_auto.CONFIG_MAPPING_NAMES  # not what our modelling file adds
    }
    return [Family(model_type, class_name) for model_type, class_name in sorted(pairs)]


def proved_before() -> tuple[str, dict[Family, Reasons]]:
    """Return what `make families` found: the version of transformers, and why not for each part."""
    found = json.loads(files("cfsp.families").joinpath("proved.json").read_text(encoding="utf-8"))
    return found["transformers"], {
        Family(row["model_type"], row["class"]): {part: row["why_not"].get(part) for part in PARTS}
        for row in found["families"]
    }


def why_not(family: Family) -> Reasons:
    """Prove a family with a config of its type; return for each part why none can go, if so.

    What is proved is the class as which a checkpoint of the family is opened.
    """
    # To list what was proved before should not take seconds.
    from cfsp.architecture.expert_proof import with_experts
    from cfsp.architecture.proof import prove, small_run_of
    from cfsp.streaming.block_proof import prove_without_attentions, prove_without_blocks

    try:
        config = family.config()
    except Exception as error:  # anything may be wrong with a default config
        return dict.fromkeys(PARTS, f"no config could be made ({first_line(error)})")
    ffns = _tried(prove, config)
    attentions = _tried(prove, config, ("attention",))
    found: dict[Part, object] = dict.fromkeys(PARTS, ffns)
    found["kv"] = found["attention"] = attentions
    # An attention that goes whole was first tried with fewer KV groups.
    if isinstance(attentions, str) or all(unit.is_whole for unit in attentions.of_part("kv").units):
        found["kv"] = _tried(prove, config, ("kv",))
    if not isinstance(attentions, str):
        blocks = [unit.block for unit in attentions.of_part("kv").units]
        proof = partial(prove_without_attentions, config, attentions)
        found["attention"] = _tried(_one_goes, blocks, proof)
    if not isinstance(ffns, str):
        blocks = list(range(ffns.block_count))
        found["blocks"] = _tried(_one_goes, blocks, partial(prove_without_blocks, config))
        found["experts"] = _tried(lambda: with_experts(ffns, config, small_run_of(config)))
    return {part: reason if isinstance(reason, str) else None for part, reason in found.items()}


def _tried(proof: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return proof(*arguments)
    except CfspError as refusal:
        return str(refusal)
    except Exception as error:  # a bug of ours, or of the class
        return f"the proof did not end ({first_line(error)})"


def _one_goes(blocks: Sequence[int], proof: Callable[[Sequence[int]], None]) -> None:
    """Prove that one of some blocks can go: that in the middle, the last, or one of the first."""
    first: UnsupportedModelError | None = None
    for block in dict.fromkeys((blocks[len(blocks) // 2], blocks[-1], *blocks[:2])):
        try:
            proof([block])
            return
        except UnsupportedModelError as refusal:
            first = first or refusal
    assert first is not None
    raise first


def verdicts(families: Sequence[Family]) -> Iterator[Reasons]:
    """Yield what `why_not` says of each family, in order; several are worked on at a time."""
    with ThreadPoolExecutor(min(MOST_AT_A_TIME, os.cpu_count() or 1)) as executor:
        yield from executor.map(_verdict, families)


def _verdict(family: Family) -> Reasons:
    """Return the answer of a process; that it crashes, or has none in time, is one too."""
    words = (*PROGRAM, family.model_type, family.class_name)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        ended = subprocess.run(
            words, **pipes, text=True, errors="replace", timeout=PROOF_LIMIT, check=True
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(PARTS, f"no verdict after {PROOF_LIMIT:.0f} seconds")
    except subprocess.CalledProcessError as error:
        return dict.fromkeys(PARTS, f"its process ended with status {error.returncode}")
    _, found, answer = ended.stdout.rpartition(f"\n{_ANSWER}")
    if not found:
        return dict.fromkeys(PARTS, "its process gave no answer")
    reasons: Reasons = json.loads(answer.partition("\n")[0])
    return reasons


if __name__ == "__main__":
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.stdout.write(f"\n{_ANSWER}{json.dumps(why_not(Family(*sys.argv[1:])))}\n")
