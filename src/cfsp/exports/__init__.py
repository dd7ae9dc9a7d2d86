"""Pruned checkpoints in the layouts that other software reads.

One module a layout: `gguf`, `decilm` (for four servers), `openvino`; `registry` lists
the targets.
"""
