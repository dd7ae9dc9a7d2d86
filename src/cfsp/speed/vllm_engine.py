"""The engine `vllm`, on a directory that vLLM loads.

vLLM generates whole sequences only, so decoding is the difference of two generations: one of a
single token and one of all.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from cfsp.errors import MissingExtraError
from cfsp.speed.subjects import Subject
from cfsp.speed.work import work_of
from cfsp.speed.workload import Conditions, Timing, Workload


class VllmEngine:
    """Greedy generation with vLLM.

    Args:
        subject: a model directory or hub id.
        conditions: dtype; the device is the one that vLLM was built for.
    """

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        # In this process, so that its memory and its processor time are seen as ours.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise MissingExtraError("the engine vllm", "vllm") from error
        from cfsp.checkpoint.config_widths import modeling_file
        from cfsp.checkpoint.loading import compute_dtype
        from cfsp.checkpoint.locating import open_checkpoint
        from cfsp.checkpoint.modeling_code import is_only_code
        from cfsp.checkpoint.reading import parameter_count
        from cfsp.checkpoint.text_config import vocabulary_of
        from cfsp.speed.subjects import Footprint

        checkpoint = open_checkpoint(str(subject.model))
        dtype = compute_dtype(checkpoint, conditions.dtype)
        nbytes = sum(spec.nbytes for spec in checkpoint.specs.values())
        work = work_of(checkpoint, head=subject.head, itemsize=dtype.itemsize)
        self.footprint = Footprint(parameter_count(checkpoint), nbytes, work)
        self._dtype = str(dtype).removeprefix("torch.")
        self._vocabulary = vocabulary_of(checkpoint.config)
        self._sampling = SamplingParams
        file = modeling_file(checkpoint.config, checkpoint.architecture)
        self._llm: Any = LLM(
            model=str(checkpoint.directory),
            dtype=self._dtype,
            trust_remote_code=file is not None and is_only_code(checkpoint.directory, file),
            # The same prompt comes again and again; it shall be computed every time.
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
        )

    def facts(self) -> dict[str, Any]:
        """Return what the timings hold for."""
        # The builds for the CPU go by other distribution names.
        import vllm

        return {"engine": "vllm", "vllm": vllm.__version__, "dtype": self._dtype}

    def run(self, workload: Workload) -> Timing:
        """Time one prefill and the decoding after it."""
        prefill = self._generate(workload, 1)
        whole = self._generate(workload, 1 + workload.new_tokens)
        return Timing(prefill, max(whole - prefill, 1e-9))

    def peak_device_bytes(self) -> int:
        """Return 0: vLLM takes a fixed share of the device for itself, which tells nothing."""
        return 0

    def _generate(self, workload: Workload, tokens: int) -> float:
        generator = torch.Generator().manual_seed(0)
        shape = (workload.batch, workload.prompt)
        prompt_BP = torch.randint(self._vocabulary, shape, generator=generator).tolist()
        sampling = self._sampling(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True
        )
        start = time.perf_counter()
        self._llm.generate(
            [{"prompt_token_ids": prompt_P} for prompt_P in prompt_BP], sampling, use_tqdm=False
        )
        return time.perf_counter() - start
