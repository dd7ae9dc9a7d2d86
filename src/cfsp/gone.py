"""Options and values that earlier versions had, and what to do instead; for this release only."""

GONE = {
    "padded": "the padded copy went: prune with --widths equal, which stock classes run as it is",
    "dora": "DoRA went: nothing ever showed that it gains on LoRA; use --method lora, or full",
}
