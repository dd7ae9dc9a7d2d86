"""A pruned checkpoint under stock software: the half of the contract that knows nothing of cfsp.

    loads      its Auto class gives the class of the original, by the modelling file or without
    logits     they are those of the original with the removed channels masked
    base       AutoModel gives the model without its head, with the same hidden states
    cache      what it generates with its cache is what the masked original does
    attention  every attention takes another implementation, and the logits are again those
    saved      `save_pretrained` writes it, and what is read again gives the same logits bit for bit
    adapters   LoRA by PEFT on every FFN matrix; a step of training lowers the loss

This file imports nothing of cfsp, so that it also runs where there is none.

Shapes: B windows, T tokens.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

TOLERANCE = 1e-5
PROMPT_TOKENS = 8
NEW_TOKENS = 10
RANK = 4
# By which steps of training lower the loss, where that is a plane. The first may send a token to
# other experts.
SHARES_OF_LOSS = (1e-4, 1e-3, 1e-2)

# Llama 4's own forward asks it of what its text decoder returns, which in 5.24 does not have it.
MoeCausalLMOutputWithPast.image_outputs = None


@dataclass(frozen=True)
class Question:
    """What to ask of a checkpoint; `expected` and `failed` are of the masked original."""

    checkpoint: str
    auto_class: str
    class_name: str
    tokens_BT: Tensor
    expected: dict[str, Tensor]
    failed: dict[str, str]
    matrices: list[str]


@dataclass
class Answer:
    """What was found; problems by check, tensors by the names of `computed`."""

    problems: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def check(directory: str) -> None:
    """Read question.pt in a directory, write answer.pt there: called in a fork without cfsp.

    It is as on a machine that has none, and that knows no modelling file yet.
    """
    from transformers import dynamic_module_utils

    assert not any(name.partition(".")[0] == "cfsp" for name in sys.modules)
    sys.modules["cfsp"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    work = Path(directory)
    dynamic_module_utils.HF_MODULES_CACHE = str(work / "modules")
    answer = ask(Question(**torch.load(work / "question.pt")), work)
    torch.save(vars(answer), work / "answer.pt")


def ask(question: Question, work: Path) -> Answer:
    """Go through all checks in an empty directory; one that does not hold stops no other."""
    torch.manual_seed(0)
    answer = Answer()
    loaded: list[Any] = []
    checks: dict[str, Callable[[], str | None]] = {
        "loads": lambda: _loads(question, answer, loaded),
        "logits": lambda: _agrees("logits", logits_of, loaded, question, answer),
        "base": lambda: _base(loaded[0], question, answer),
        "cache": lambda: _agrees("generated", generated_with_cache, loaded, question, answer),
        "saved": lambda: _saved(loaded, question, answer, work),
        # They change the model, and the one that was saved.
        "attention": lambda: _agrees("eager_logits", eager_logits_of, loaded, question, answer),
        "adapters": lambda: _adapters(loaded[-1], question, answer),
    }
    for name, check in checks.items():
        try:
            problem = check()
        except Exception as error:  # whatever a class or a library does
            problem = first_line(error)
        if problem is not None:
            answer.problems[name] = problem
        if not loaded:
            break
    return answer


def first_line(error: Exception) -> str:
    """Return what is wrong, in one line of bounded length."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def computed(model: Any, tokens_BT: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a model computes, and why it does not where it cannot; changes its attention."""
    tensors, problems = {}, {}
    for name, compute in (
        ("logits", logits_of),
        ("generated", generated_with_cache),
        ("eager_logits", eager_logits_of),
    ):
        try:
            tensors[name] = compute(model, tokens_BT)
        except Exception as error:  # whatever a class does
            problems[name] = first_line(error)
    return tensors, problems


def logits_of(model: Any, tokens_BT: Tensor) -> Tensor:
    """Return the logits without a cache."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens_BT).logits
    return logits


def generated(model: Any, tokens_BT: Tensor, **options: Any) -> Tensor:
    """Return what a model writes after a prompt, the likeliest token each time."""
    of: dict[str, Any] = {"attention_mask": torch.ones_like(tokens_BT), **options}
    of |= {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": None}
    with torch.inference_mode():
        found: Tensor = model.generate(tokens_BT, do_sample=False, **of)
    return found


def generated_with_cache(model: Any, tokens_BT: Tensor) -> Tensor:
    """Return what a model writes after a short prompt."""
    return generated(model, tokens_BT[:, :PROMPT_TOKENS])


def eager_logits_of(model: Any, tokens_BT: Tensor) -> Tensor:
    """Return the logits with the eager attention; some types leave out parts of it in SDPA."""
    model.set_attn_implementation("eager")
    return logits_of(model, tokens_BT)


def attention_of_layers(model: Any) -> list[str]:
    """Return the implementation that every attention of a model reads in its config."""
    return [
        module.config._attn_implementation
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "config")
    ]


def _load(question: Question, place: str | Path) -> Any:
    import transformers

    auto = getattr(transformers, question.auto_class)
    return auto.from_pretrained(place, trust_remote_code=True)


def _loads(question: Question, answer: Answer, loaded: list[Any]) -> str | None:
    model = _load(question, question.checkpoint)
    loaded.append(model)
    classes = [kind.__name__ for kind in type(model).__mro__]
    stored = {id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}
    answer.facts |= {"classes": classes, "elements": sum(stored.values())}
    stock = question.class_name
    needs_code = bool(getattr(model.config, "auto_map", None))
    if needs_code and (found := _loads_without_code(question.checkpoint)):
        said = f"expected that nothing is loaded without the code, found {found}"
        return f"{said}: docs/UPSTREAM.md says what then"
    expected = f"Pruned{stock}" if needs_code else stock
    if classes[0] != expected or stock not in classes:
        return f"expected the class {expected}, found {classes[0]}"
    return None


def _loads_without_code(place: str) -> list[str]:
    """Return the Auto classes by which stock classes take the weights of a model that needs code.

    The code has none for the last two: that it may run makes no difference there. Not tried is
    question answering, whose classes read no weight of a dense checkpoint of a causal model either.
    """
    import transformers

    found = []
    for of, may_run in (
        ("CausalLM", False),
        ("ImageTextToText", False),
        ("SequenceClassification", True),
        ("TokenClassification", True),
    ):
        auto = getattr(transformers, f"AutoModelFor{of}")
        try:
            auto.from_pretrained(place, trust_remote_code=may_run)
        except Exception:  # whatever a class does with weights or numbers that do not fit
            continue
        found.append(of)
    return found


def _agrees(
    name: str,
    compute: Callable[[Any, Tensor], Tensor],
    loaded: list[Any],
    question: Question,
    answer: Answer,
) -> str | None:
    """Compute one of the tensors of `computed` and compare it with what is expected."""
    found = answer.tensors[name] = compute(loaded[0], question.tokens_BT)
    if compute is eager_logits_of:
        of_layers = answer.facts["attention_of_layers"] = attention_of_layers(loaded[0])
        if not set(of_layers) <= {"eager"}:
            return f"expected eager attention in all layers, found {sorted(set(of_layers))}"
    if name in question.failed:  # this one does better than the stock model
        return None
    return _difference(found, question.expected[name])


def _difference(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"expected the shape {list(expected.shape)}, found {list(found.shape)}"
    if found.is_floating_point():
        if torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
            return None
        largest = float((found - expected).abs().max())
        return f"expected what the masked original computes, found a difference of {largest:.1e}"
    if torch.equal(found, expected):
        return None
    return "expected the tokens that the masked original generates, found others"


def _base(model: Any, question: Question, answer: Answer) -> str | None:
    import transformers

    named = getattr(model.config, "auto_map", None)
    known: Any = transformers.AutoModel._model_mapping if named is None else named
    if (type(model.config) if named is None else "AutoModel") not in known:
        return None
    base = transformers.AutoModel.from_pretrained(question.checkpoint, trust_remote_code=True)
    within = model if type(base) is type(model) else model.base_model
    with torch.inference_mode():
        found, expected = (part(input_ids=question.tokens_BT)[0] for part in (base, within))
    answer.tensors["hidden"] = found
    if not torch.equal(found, expected):
        return "expected the hidden states of the model with its head, found others"
    return None


def _saved(loaded: list[Any], question: Question, answer: Answer, work: Path) -> str | None:
    loaded[0].save_pretrained(work / "saved")
    again = _load(question, work / "saved")
    found = answer.tensors["saved_logits"] = logits_of(again, question.tokens_BT)
    # Only now: adapters go on it where it is the same model.
    loaded.append(again)
    if torch.equal(found, logits_of(loaded[0], question.tokens_BT)):
        return None
    return "expected the same logits of the model that was saved and read again, found others"


def _adapters(model: Any, question: Question, answer: Answer) -> str | None:
    import peft

    # Experts are parameters of one module, everything else is a module.
    modules = [n.removesuffix(".weight") for n in question.matrices if n.endswith(".weight")]
    parameters = [name for name in question.matrices if not name.endswith(".weight")]
    config = peft.LoraConfig(r=RANK, target_modules=modules, target_parameters=parameters)
    lora = peft.get_peft_model(model, config)
    trained = [p for p in lora.parameters() if p.requires_grad]
    # Of some types PEFT makes other targets than it was given.
    answer.facts["lora_targets"] = sorted(lora.peft_config["default"].target_modules)
    answer.facts["lora_parameters"] = sum(p.numel() for p in trained)
    tokens_BT = question.tokens_BT
    before = _loss(lora, tokens_BT)
    lora.train()(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
    adapted = [p for p in trained if p.grad is not None]
    slope = sum(float(p.grad.square().sum()) for p in adapted)
    if not slope > 0:
        return f"expected gradients of the adapters, found a slope of {slope}"
    for share in SHARES_OF_LOSS:
        with torch.no_grad():
            for parameter in adapted:
                parameter.sub_(share * before / slope * parameter.grad)
        after = _loss(lora, tokens_BT)
        if after < before:
            return None
    return f"expected a smaller loss than {before:.4f} after a step, found {after:.4f}"


def _loss(model: Any, tokens_BT: Tensor) -> float:
    """Return the loss without dropout."""
    with torch.inference_mode():
        loss: float = model.eval()(input_ids=tokens_BT, labels=tokens_BT).loss.item()
    return loss
