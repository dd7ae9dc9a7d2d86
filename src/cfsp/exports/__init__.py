"""Pruned checkpoints in the layouts that other software reads.

One module a layout: `gguf`, `decilm` (for vLLM and mlx-lm), `openvino`; `registry` lists
the targets.
"""
