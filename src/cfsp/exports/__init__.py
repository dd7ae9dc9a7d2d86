"""Pruned checkpoints in the layouts that other software reads.

One module a target: `padded`, `gguf`, `vllm`, `openvino`; `registry` lists them.
"""
