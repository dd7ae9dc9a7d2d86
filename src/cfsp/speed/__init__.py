"""How fast models are, relative to each other and to what their size promises.

subjects (checkpoints or true shapes) -> one process each -> interleaved rounds -> Comparison
"""

from cfsp.speed.bench import Comparison, ModelSpeed, Speed, compare_speed
from cfsp.speed.work import Conditions, Workload

__all__ = ["Comparison", "Conditions", "ModelSpeed", "Speed", "Workload", "compare_speed"]
