"""Python that loads a checkpoint, as text to copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cfsp.architecture.model_classes import auto_class_of_type
from cfsp.checkpoint.own_files import MODELING_FILE


def needs_code(manifest: Mapping[str, Any]) -> bool:
    """Return whether transformers needs the modelling file beside the weights."""
    return MODELING_FILE in manifest.get("files", {})


def auto_class_of(manifest: Mapping[str, Any]) -> str:
    """Return the Auto class of a checkpoint's model."""
    return auto_class_of_type(manifest.get("base_model", {}).get("model_type", ""))


def load_code(manifest: Mapping[str, Any], where: str) -> str:
    """Return the lines that load a model and its tokenizer or processor from a place."""
    model = auto_class_of(manifest)
    name, reader = ("tokenizer", "AutoTokenizer")
    if model != "AutoModelForCausalLM":
        name, reader = ("processor", "AutoProcessor")
    trust = ", trust_remote_code=True" if needs_code(manifest) else ""
    place = json.dumps(where, ensure_ascii=False)
    return (
        f"from transformers import {model}, {reader}\n\n"
        f"model = {model}.from_pretrained({place}{trust})\n"
        f"{name} = {reader}.from_pretrained({place})"
    )
