"""Options and values that earlier versions had, and what to do instead; for this release only."""

GONE = {
    "dora": "DoRA went: nothing ever showed that it gains on LoRA; use --method lora, or full",
    "--png": "the charts are in the page as SVG; a browser saves or prints them",
}
