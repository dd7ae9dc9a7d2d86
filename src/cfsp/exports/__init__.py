"""Pruned checkpoints in the layouts that other software reads.

One module a target: `padded`, `uniform`, `gguf`, `vllm`, `openvino`; `registry` lists them.
"""
