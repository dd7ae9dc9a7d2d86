"""Zero-shot and few-shot tasks, scored by lm-evaluation-harness."""
