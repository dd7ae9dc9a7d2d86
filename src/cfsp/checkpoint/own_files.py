"""The names of the files that cfsp puts beside the weights of a checkpoint."""

MANIFEST_FILE = "cfsp.json"
PLAN_FILE = "cfsp_plan.json"
STATISTICS_FILE = "cfsp_statistics.safetensors"
