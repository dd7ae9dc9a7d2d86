"""The metadata of a model card, which the hub reads: base model, license, evaluation results."""

from __future__ import annotations

import re
from typing import Any

from cfsp.result.conditions import Conditions
from cfsp.result.loading import auto_class_of
from cfsp.result.names import public_name
from cfsp.result.origin import Origin


def card_metadata(manifest: dict[str, Any], origin: Origin, name: str) -> str:
    """Return the YAML at the head of a model card.

    Args:
        manifest: of version 2.
        origin: the model that the checkpoint was made from; its metadata stay.
        name: what that model is called.
    """
    from huggingface_hub import ModelCardData

    metadata = dict(origin.metadata)
    tags = ["cfsp", *(["pruned"] if "criterion" in manifest else [])]
    theirs = metadata.pop("tags", [])
    tags += [str(tag) for tag in (theirs if isinstance(theirs, list) else [theirs])]
    results = _results(manifest)
    data = ModelCardData(
        base_model=origin.base_model,
        library_name="transformers",
        pipeline_tag=metadata.pop("pipeline_tag", _task(manifest)),
        tags=list(dict.fromkeys(tags)),
        # The name belongs to the results: without them it is no key that the hub knows.
        model_name=f"{_plain(name.rpartition('/')[2])}-pruned" if results else None,
        eval_results=results or None,
        **metadata,
    )
    return str(data.to_yaml())


def _results(manifest: dict[str, Any]) -> list[Any]:
    """Return the perplexities of the finished model, each with its conditions."""
    from huggingface_hub import EvalResult

    recovery = manifest.get("recovery")
    table = (recovery or manifest).get("perplexity") or {}
    results = []
    for text, value in table.items():
        conditions = Conditions.of(text, value)
        name = _plain(public_name(text))
        how = {
            "windows": conditions.windows,
            "seqlen": conditions.seqlen,
            "stride": conditions.stride,
            "bos": conditions.bos,
            "predicted_tokens": conditions.tokens,
        }
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=name,
                dataset_args=how,
                metric_type="perplexity",
                metric_name=f"perplexity, {conditions.beside({'the model': manifest})}",
                metric_value=value["after"],
            )
        )
    return results


def _task(manifest: dict[str, Any]) -> str:
    """Return what the hub calls what the model does."""
    is_causal = auto_class_of(manifest) == "AutoModelForCausalLM"
    return "text-generation" if is_causal else "image-text-to-text"


def _plain(name: str) -> str:
    """Return a name with only such characters as names on the hub have."""
    return re.sub(r"[^\w./:-]+", "_", name)
