"""The language model types of the installed transformers, and which of them can be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from cfsp.errors import CfspError

# Seconds. The proof of the slowest type takes a tenth of that.
TIME_LIMIT = 120.0
# What takes seconds to import; it is imported once for all processes.
_IMPORTED = (
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "cfsp.architecture.proof",
)


@dataclass(frozen=True)
class Family:
    """A model type and its class; multimodal types can have one with and one without pictures."""

    model_type: str
    class_name: str


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
    }
    return [Family(model_type, class_name) for model_type, class_name in sorted(pairs)]


def why_not(family: Family) -> str | None:
    """Prove a model type with a config of its own; return why it cannot be pruned, if so.

    It runs in a process of its own, because a class may crash or never end.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_verdict, args=(family, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIME_LIMIT):
            return f"no verdict after {TIME_LIMIT:.0f} seconds"
        verdict: str | None = receiver.recv()
        return verdict
    except EOFError:
        process.join()
        return f"its process ended with status {process.exitcode}"
    finally:
        receiver.close()
        process.kill()
        process.join()


def _send_verdict(family: Family, sender: Connection) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    sender.send(_verdict(family))


def _verdict(family: Family) -> str | None:
    import transformers

    from cfsp.architecture.default_configs import default_config
    from cfsp.architecture.model_classes import check_is_decoder
    from cfsp.architecture.proof import prove

    model_class = getattr(transformers, family.class_name)
    try:
        config = default_config(family.model_type)
        # A multimodal type's class for text alone is built from the config of its text decoder.
        if model_class.config_class is config.sub_configs.get("text_config"):
            config = config.get_text_config()
        check_is_decoder(config)
        prove(config, model_class)
    except CfspError as refusal:
        return str(refusal)
    except Exception as error:  # anything may be wrong with a default config
        first_line = str(error).strip().partition("\n")[0]
        return f"no config could be made ({type(error).__name__}: {first_line[:200]})"
    return None
