"""Options and values that earlier versions had, and what to do instead; for this release only."""

GONE = {
    "openvino": "bench by OpenVINO went; its export stays: time that with OpenVINO's own tools",
    "sglang": "the target sglang went, because nobody had run it; use --to vllm or --to gguf",
    "tensorrt-llm": "the target tensorrt-llm went, because nobody had run it; use --to gguf",
    "padded": "the padded copy went: prune with --widths equal, which stock classes run as it is",
    "dora": "DoRA went: nothing ever showed that it gains on LoRA; use --method lora, or full",
}
