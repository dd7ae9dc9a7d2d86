"""The engine `openvino`, on a directory that `cfsp export --to openvino` wrote.

The runtime is used without optimum: the model keeps its cache as a state, which is reset before
every prefill.

Shapes: B sequences, T tokens in a step, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from cfsp.errors import MissingExtraError
from cfsp.exports.openvino import MODEL_FILE, OWN_CONFIG
from cfsp.speed.subjects import Footprint, Subject
from cfsp.speed.workload import Conditions, Timing, Workload


class OpenVinoEngine:
    """Greedy generation with the OpenVINO runtime on the CPU.

    Args:
        subject: a directory with `openvino_model.xml`, `.bin` and `config.json`.
        conditions: threads; the dtype is the runtime's choice.
    """

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError("the engine openvino", "openvino") from error
        directory = Path(str(subject.model))
        self.footprint = _footprint(directory, head=subject.head)
        self._version = str(openvino.__version__)
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if conditions.threads is not None:
            options["INFERENCE_NUM_THREADS"] = conditions.threads
        compiled = openvino.Core().compile_model(directory / MODEL_FILE, "CPU", options)
        self._precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self._threads = compiled.get_property("INFERENCE_NUM_THREADS")
        self._inputs = {name for each in compiled.inputs for name in each.get_names()}
        self._request = compiled.create_infer_request()
        self._vocabulary = int(compiled.output("logits").partial_shape[-1].get_length())
        self.tokens_BN: np.ndarray | None = None

    footprint: Footprint

    def facts(self) -> dict[str, Any]:
        """Return what the timings hold for."""
        return {
            "engine": "openvino",
            "openvino": self._version,
            "dtype": self._precision,
            "threads": self._threads,
        }

    def run(self, workload: Workload) -> Timing:
        """Time one prefill and the decoding after it."""
        prompt_BP = np.random.default_rng(0).integers(
            self._vocabulary, size=(workload.batch, workload.prompt), dtype=np.int64
        )
        self._request.reset_state()
        start = time.perf_counter()
        steps = [self._step(prompt_BP, 0)]
        first = time.perf_counter()
        for step in range(workload.new_tokens):
            steps.append(self._step(steps[-1], workload.prompt + step))
        end = time.perf_counter()
        self.tokens_BN = np.concatenate(steps, axis=1)
        return Timing(first - start, end - first)

    def peak_device_bytes(self) -> int:
        """Return 0: this engine runs on the CPU."""
        return 0

    def _step(self, tokens_BT: np.ndarray, position: int) -> np.ndarray:
        """Return the next token of every sequence, [B, 1]."""
        batch, length = tokens_BT.shape
        inputs = {
            "input_ids": tokens_BT,
            "attention_mask": np.ones((batch, position + length), dtype=np.int64),
            "position_ids": np.tile(np.arange(position, position + length), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self._request.infer({k: v for k, v in inputs.items() if k in self._inputs})
        logits_BTV = self._request.get_tensor("logits").data
        return logits_BTV[:, -1:].argmax(-1).astype(np.int64)  # type: ignore[no-any-return]


def _footprint(directory: Path, *, head: bool) -> Footprint:
    """Return the work of the model that was exported, in the bytes that are stored."""
    import torch

    from cfsp.checkpoint.config_file import read_config
    from cfsp.checkpoint.reading import LoadedModel, parameter_count
    from cfsp.checkpoint.skeleton import build_skeleton
    from cfsp.speed.work import work_of

    # Other software's exports, and those of a dense model, have the one config that says it all.
    own = directory / OWN_CONFIG
    config, _ = read_config(own if own.is_dir() else directory)
    source = LoadedModel(build_skeleton(config, torch.float16))
    size = (directory / MODEL_FILE).with_suffix(".bin").stat().st_size
    parameters = parameter_count(source)
    work = work_of(source, head=head, itemsize=size / parameters)
    return Footprint(parameters, size, work)
