"""Quantise a dense and a pruned checkpoint with libraries and compare what each loses.

    python benchmarks/quantisers.py DENSE PRUNED --method torchao-int8 --data TEXT --out losses.json

loads each model as it is and quantised, in float32 otherwise, reads the same windows with both, and
prints the loss per token of each, the divergence (KL, nats per token) of the quantised predictions
from those of the same model before, and what the quantised model writes. Only torch, transformers
and the library are needed, so it runs in an environment of the library's own; OpenVINO's and
llama.cpp's methods need cfsp as well. What each needs: docs/quantise.md.

Shapes: N windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 8

# Gives logits_TV of a window.
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """What quantising one model did; losses and divergence are in nats per token."""

    method: str
    model: str  # dense or pruned
    nbytes: int  # of the weights that the quantised model holds, or of its file
    before: float  # loss of the model as it is
    after: float  # of the quantised one
    divergence: float  # of the quantised predictions from those before
    error: float | None  # standard error of the divergence over windows; None of one window
    generated: str  # what the quantised model writes after the first tokens of the text


def main() -> int:
    """Measure both models with every method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--method", choices=tuple(METHODS), action="append", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a .txt, .jsonl or .parquet file")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    losses = [
        loss
        for name, directory in (("dense", args.dense), ("pruned", args.pruned))
        for loss in _losses(name, directory, args)
    ]
    for method in args.method:
        dense, pruned = (loss for loss in losses if loss.method == method)
        print(
            f"{method}: divergence {dense.divergence:.5f} on the dense model, "
            f"{pruned.divergence:.5f} on the pruned one; loss {dense.after - dense.before:+.4f} "
            f"and {pruned.after - pruned.before:+.4f}; {dense.nbytes / 1e6:.0f} and "
            f"{pruned.nbytes / 1e6:.0f} MB"
        )
    if args.out:
        conditions = {"windows": args.windows, "seqlen": args.seqlen}
        found = {**conditions, "losses": [asdict(loss) for loss in losses]}
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _losses(name: str, directory: Path, args: argparse.Namespace) -> Iterator[Loss]:
    """Yield what every method does to one model."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    windows_NT = _windows(tokenizer, args.data, args.windows, args.seqlen)
    predict = _predict(_load(directory))
    before_NTV = [predict(tokens_T) for tokens_T in windows_NT]
    for method in args.method:
        with tempfile.TemporaryDirectory() as folder:
            quantised, nbytes = METHODS[method](directory, Path(folder))
            after_NTV = [quantised(tokens_T) for tokens_T in windows_NT]
            written = _continued(quantised, windows_NT[0][:32])
        found_N = torch.tensor(list(map(_divergence, before_NTV, after_NTV)))
        loss = Loss(
            method,
            name,
            nbytes,
            _mean_loss(before_NTV, windows_NT),
            _mean_loss(after_NTV, windows_NT),
            float(found_N.mean()),
            float(found_N.std() / len(found_N) ** 0.5) if len(found_N) > 1 else None,
            tokenizer.decode(written),
        )
        print(loss, flush=True)
        yield loss


def _mean_loss(logits_NTV: list[Tensor], windows_NT: Tensor) -> float:
    losses = [
        float(cross_entropy(logits_TV[:-1], tokens_T[1:]))
        for logits_TV, tokens_T in zip(logits_NTV, windows_NT, strict=True)
    ]
    return sum(losses) / len(losses)


def _divergence(before_TV: Tensor, after_TV: Tensor) -> float:
    before_TV, after_TV = log_softmax(before_TV, dim=-1), log_softmax(after_TV, dim=-1)
    return float(kl_div(after_TV, before_TV, log_target=True, reduction="batchmean"))


def _windows(tokenizer: Any, file: Path, count: int, seqlen: int) -> Tensor:
    """Return the first windows_NT of a text."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        documents = pyarrow.parquet.read_table(file).column("text").to_pylist()
    elif file.suffix == ".jsonl":
        documents = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]
    else:
        documents = [file.read_text(encoding="utf-8")]
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document, add_special_tokens=False).input_ids
        if len(tokens) >= count * seqlen:
            return torch.tensor(tokens[: count * seqlen]).reshape(count, seqlen)
    sys.exit(f"{file} has {len(tokens)} tokens, expected {count * seqlen}")


def _load(directory: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, **{"dtype": torch.float32, **options}
    )
    return model.eval()


def _predict(model: Any) -> Predict:
    def predict(tokens_T: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens_T[None]).logits[0].float()

    return predict


def _continued(predict: Predict, tokens_T: Tensor) -> list[int]:
    """Return the greedy continuation; reading all again for each token needs no cache."""
    for _ in range(NEW_TOKENS):
        logits_TV = predict(tokens_T)
        if not bool(logits_TV.isfinite().all()):
            sys.exit("the quantised model computes no finite logits")
        tokens_T = torch.cat([tokens_T, logits_TV[-1:].argmax(dim=-1)])
    return tokens_T[-NEW_TOKENS:].tolist()


def _nbytes(model: Any) -> int:
    """Return the bytes of all tensors, those within quantised ones included."""
    with tempfile.TemporaryFile() as file:
        torch.save(model.state_dict(), file)
        return file.tell()


def _torchao(config: str, **options: Any) -> Callable[[Path, Path], tuple[Predict, int]]:
    def quantise(directory: Path, work: Path) -> tuple[Predict, int]:
        import torchao.quantization

        model = _load(directory)
        torchao.quantization.quantize_(model, getattr(torchao.quantization, config)(**options))
        return _predict(model), _nbytes(model)

    return quantise


def _bitsandbytes(**options: Any) -> Callable[[Path, Path], tuple[Predict, int]]:
    def quantise(directory: Path, work: Path) -> tuple[Predict, int]:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(**options)
        model = _load(directory, quantization_config=config, device_map="cpu")
        return _predict(model), _nbytes(model)

    return quantise


def _llm_compressor(**how: Any) -> Callable[[Path, Path], tuple[Predict, int]]:
    def quantise(directory: Path, work: Path) -> tuple[Predict, int]:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        model = _load(directory)
        oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **how))
        model.save_pretrained(work, save_compressed=True)
        nbytes = sum(file.stat().st_size for file in work.glob("*.safetensors"))
        # What was written is what others load.
        return _predict(_load(work)), nbytes

    return quantise


# As the scheme W4A16, whose groups of 128 do not divide a hidden size such as 576.
_GROUPS_OF_64 = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64},
}


def _openvino(mode: str, **how: Any) -> Callable[[Path, Path], tuple[Predict, int]]:
    def quantise(directory: Path, work: Path) -> tuple[Predict, int]:
        import nncf
        import openvino

        import cfsp

        cfsp.export(directory, "openvino", work / "ov", verify=False)
        core = openvino.Core()
        model = core.read_model(work / "ov" / "openvino_model.xml")
        model = nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), **how)
        openvino.save_model(model, work / "compressed.xml", compress_to_fp16=False)
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        compiled = core.compile_model(work / "compressed.xml", "CPU", exact)

        def predict(tokens_T: Tensor) -> Tensor:
            request = compiled.create_infer_request()
            ones_T = torch.ones_like(tokens_T)
            values = {
                "input_ids": tokens_T[None].numpy(),
                "attention_mask": ones_T[None].numpy(),
                "position_ids": torch.arange(len(tokens_T))[None].numpy(),
                "beam_idx": torch.zeros(1, dtype=torch.int32).numpy(),
            }
            names = {name for port in compiled.inputs for name in port.names}
            found = request.infer({k: v for k, v in values.items() if k in names})
            return torch.from_numpy(found[compiled.output(0)].copy())[0]

        return predict, (work / "compressed.bin").stat().st_size

    return quantise


def _gguf(weight_type: str) -> Callable[[Path, Path], tuple[Predict, int]]:
    def quantise(directory: Path, work: Path) -> tuple[Predict, int]:
        import cfsp
        from cfsp.checkpoint.llama_cpp import LlamaCpp

        file = work / "model.gguf"
        cfsp.export(directory, "gguf", file, weight_type=weight_type, verify=False)
        model = LlamaCpp(file, context=1024)

        def predict(tokens_T: Tensor) -> Tensor:
            model.rewind()
            return model.feed(tokens_T.tolist())

        return predict, file.stat().st_size

    return quantise


METHODS: dict[str, Callable[[Path, Path], tuple[Predict, int]]] = {
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int4": _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "bitsandbytes-nf4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-int8": _bitsandbytes(load_in_8bit=True),
    "llm-compressor-w8a8": _llm_compressor(targets="Linear", scheme="W8A8"),
    "llm-compressor-w4a16": _llm_compressor(targets="Linear", scheme="W4A16"),
    "llm-compressor-w4a16-g64": _llm_compressor(config_groups={"group_0": _GROUPS_OF_64}),
    "openvino-int8": _openvino("INT8_ASYM"),
    "openvino-int4": _openvino("INT4_SYM", group_size=64),
    "gguf-q8_0": _gguf("q8_0"),
    "gguf-q4_k_m": _gguf("q4_k_m"),
    "gguf-q4_0": _gguf("q4_0"),
}


if __name__ == "__main__":
    sys.exit(main())
