"""The names of cfsp's own files in a model directory, beside the weights.

None may look like weights: loaders such as vLLM's read every *.safetensors that they find, some in
folders too, and *.bin, *.pt and *.npz are weights to others. So the statistics, though they are
stored as safetensors, have an ending of their own.
"""

from __future__ import annotations

MANIFEST_FILE = "cfsp.json"
PLAN_FILE = "cfsp_plan.json"
STATISTICS_FILE = "cfsp.statistics"
CARD_FILE = "README.md"
MODELING_FILE = "modeling_cfsp.py"
# In the directory of a sweep, beside those of its models.
SWEEP_FILE = "sweep.json"
