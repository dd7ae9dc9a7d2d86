"""The engine `vllm`, on a directory that vLLM loads.

vLLM generates whole sequences only, so decoding is the difference of two generations: one of a
single token and one of all.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfsp.checkpoint.config_file import read_plain_fields
from cfsp.checkpoint.config_widths import modeling_file
from cfsp.checkpoint.loading import compute_dtype
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.modeling_code import is_only_code
from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.tensor_file import TensorFile
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import CheckpointError, MissingExtraError
from cfsp.exports.decilm import has_only_our_code, is_decilm
from cfsp.speed.subjects import Subject, random_prompt
from cfsp.speed.work import Conditions, Footprint, ModelWork, Timing, Workload, work_of


@dataclass(frozen=True)
class Loadable:
    """A directory that vLLM is given."""

    directory: Path
    footprint: Footprint
    dtype: str
    vocabulary: int
    has_our_code: bool  # its only code is as cfsp writes it, which may run


def readable_by_vllm(subject: Subject, dtype_name: str) -> Loadable:
    """Return what vLLM is given: a model of transformers, or an export for its DeciLM class."""
    directory = Path(str(subject.model))
    if is_decilm(directory):
        try:
            fields = read_plain_fields(directory)
            dtype = fields["dtype"] if dtype_name == "auto" else dtype_name
            footprint = decilm_footprint(directory, getattr(torch, dtype).itemsize)
            vocabulary = int(fields["vocab_size"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{directory} is damaged ({error}); export the model again"
            ) from error
        return Loadable(directory, footprint, dtype, vocabulary, has_only_our_code(directory))
    checkpoint = open_checkpoint(str(subject.model))
    computed_in = compute_dtype(checkpoint, dtype_name)
    nbytes = sum(spec.nbytes for spec in checkpoint.specs.values())
    work = work_of(checkpoint, head=True, itemsize=computed_in.itemsize)
    file = modeling_file(checkpoint.config, checkpoint.architecture)
    return Loadable(
        checkpoint.directory,
        Footprint(parameter_count(checkpoint), nbytes, work),
        str(computed_in).removeprefix("torch."),
        vocabulary_of(checkpoint.config),
        file is not None and is_only_code(checkpoint.directory, MODELING_FILE, file.text),
    )


def decilm_footprint(directory: Path, itemsize: int) -> Footprint:
    """Return parameters, size and work of an export for vLLM's DeciLM class, from its headers.

    An element has `itemsize` bytes, in weights and cache.
    """
    files = sorted(directory.glob("*.safetensors"))
    specs = {name: spec for file in files for name, spec in TensorFile(file).specs.items()}
    matrices = {
        name: spec
        for name, spec in specs.items()
        if name.startswith("model.layers.") and len(spec.shape) == 2
    }

    def rows(*projections: str) -> int:
        endings = tuple(f"{name}_proj.weight" for name in projections)
        return sum(spec.shape[0] for name, spec in matrices.items() if name.endswith(endings))

    in_blocks = sum(spec.elements for spec in matrices.values())
    in_head = specs["model.embed_tokens.weight"].elements
    work = ModelWork(
        block_parameters=in_blocks,
        block_bytes=in_blocks * itemsize,
        head_parameters=in_head,
        head_bytes=in_head * itemsize,
        attention_width=rows("q"),
        cache_bytes=rows("k", "v") * itemsize,
    )
    parameters = sum(spec.elements for spec in specs.values())
    return Footprint(parameters, sum(spec.nbytes for spec in specs.values()), work)


class VllmEngine:
    """Greedy generation with vLLM, on the device that it was built for."""

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        # In this process, so that its memory and its processor time are seen as ours.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if conditions.threads is not None:
            # Otherwise vLLM takes every processor and binds its threads to them.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            torch.set_num_threads(conditions.threads)
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform
        except ImportError as error:
            raise MissingExtraError("the engine vllm", "vllm") from error
        loadable = readable_by_vllm(subject, conditions.dtype)
        self.footprint = loadable.footprint
        self._dtype = loadable.dtype
        self._vocabulary = loadable.vocabulary
        self._sampling = SamplingParams
        self._llm: Any = LLM(
            model=str(loadable.directory),
            dtype=self._dtype,
            trust_remote_code=loadable.has_our_code,
            # The same prompt comes again and again; it shall be computed every time.
            enable_prefix_caching=False,
            # On the CPU, compiling each model takes longer than all rounds.
            enforce_eager=current_platform.is_cpu(),
            disable_log_stats=True,
            seed=0,
        )

    def facts(self) -> dict[str, Any]:
        """Return what the timings hold for."""
        # The builds for the CPU go by other distribution names.
        import vllm

        return {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "dtype": self._dtype,
            "threads": torch.get_num_threads(),
        }

    def run(self, workload: Workload) -> Timing:
        """Time one prefill and the decoding after it."""
        prefill = self._generate(workload, 1)
        whole = self._generate(workload, 1 + workload.new_tokens)
        return Timing(prefill, max(whole - prefill, 1e-9))

    def peak_device_bytes(self) -> int:
        """Return 0: vLLM takes a fixed share of the device for itself, which tells nothing."""
        return 0

    def _generate(self, workload: Workload, tokens: int) -> float:
        prompt_BP = random_prompt(self._vocabulary, workload).tolist()
        sampling = self._sampling(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True
        )
        start = time.perf_counter()
        self._llm.generate(
            [{"prompt_token_ids": prompt_P} for prompt_P in prompt_BP], sampling, use_tqdm=False
        )
        return time.perf_counter() - start
