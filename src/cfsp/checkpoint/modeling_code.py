"""The modelling file that travels with a checkpoint whose blocks have different widths.

Stock transformers reads `per_layer_config` but builds every block with the same width. The
file builds the stock model and then replaces only each block's FFN with one of the right
width. Decoder layers keep the very config object of the model: with copies,
`set_attn_implementation` would not reach them. When all widths are equal no file is needed.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.families import FAMILIES, Family
from cfsp.checkpoint.output import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELING_FILE = "modeling_cfsp.py"

_ABOUT_EXPERTS = """
# The experts of the stock class are decorated with @use_experts_implementation: transformers
# looks for that word in the file of a class to learn whether it may choose how experts run.
"""


@cache
def modeling_code(family: Family) -> str:
    """Return the text of the modelling file for one family."""
    template = resources.files("cfsp.checkpoint").joinpath("modeling_template.txt").read_text()
    for key, value in {
        "MODEL_TYPE": family.model_type,
        "CAUSAL_LM": family.causal_lm,
        "BASE_MODEL": family.base_model,
        "BLOCKS_IN_BASE": family.blocks_in_base_model,
        "BLOCKS": family.blocks,
        "REPLACE_FFN": _replacement(family),
        "WIDTH_KEY": family.width_key,
        "EXPERTS": _ABOUT_EXPERTS if family.experts else "",
    }.items():
        template = template.replace(f"@{key}@", value)
    return template


def _replacement(family: Family) -> str:
    """Return the statement that gives a block an FFN of the width that the config names."""
    if family.mlp is None:
        # The FFN has no module of its own, so the block is built anew.
        return "layers[index] = type(layers[index])(config, index)"
    return f"layers[index].{family.mlp} = type(layers[index].{family.mlp})({family.ffn_arguments})"


def auto_map(family: Family) -> dict[str, str]:
    """Return the `auto_map` of config.json that points at the modelling file."""
    module = MODELING_FILE.removesuffix(".py")
    return {
        "AutoModel": f"{module}.Pruned{family.base_model}",
        "AutoModelForCausalLM": f"{module}.Pruned{family.causal_lm}",
    }


def code_digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of a checkpoint's modelling file by its name; empty if it needs none."""
    path = directory / MODELING_FILE
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else {}


def is_our_modeling_code(directory: Path) -> bool:
    """Return whether the directory's only code is a modelling file exactly as we write it."""
    sources = [path for path in directory.glob("*.py") if path.is_file()]
    if [path.name for path in sources] != [MODELING_FILE]:
        return False
    found = hashlib.sha256(sources[0].read_bytes()).digest()
    return any(
        hashlib.sha256(modeling_code(family).encode()).digest() == found
        for family in FAMILIES.values()
    )


def pruned_class(family: Family) -> type[PreTrainedModel]:
    """Return the class of a causal LM whose blocks have the widths of `per_layer_config`.

    It is imported in the same way as transformers imports it from a checkpoint, so a model of
    this class saves its modelling file with `save_pretrained`.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.utils import HF_MODULES_CACHE

    # Kept in the cache that it is imported through; a temporary place would outlive a kill.
    name = f"cfsp_{family.model_type}"
    path = Path(HF_MODULES_CACHE) / "cfsp_sources" / name / MODELING_FILE
    code = modeling_code(family).encode()
    if not path.is_file() or path.read_bytes() != code:
        write_atomically(path, code)
    reference = auto_map(family)["AutoModelForCausalLM"]
    loaded: Any = get_class_from_dynamic_module(reference, str(path.parent))
    loaded.register_for_auto_class("AutoModelForCausalLM")
    return loaded  # type: ignore[no-any-return]
