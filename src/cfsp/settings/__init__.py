"""Every choice that a user has, with its default and its help, once; the CLI is made from it.

    PruneSettings(Budget(0.2), text=CalibrationText(("wikitext2", "c4")))

A field that is declared with `option` is a command-line option: its flag, its type, its default and
its help are written here and nowhere else. Advanced ones are what only a researcher sets: the CLI
takes them as `--set name=value`. Importing this module does not import torch.
"""

from __future__ import annotations

from cfsp.settings.budget import DEFAULT_PARTS as DEFAULT_PARTS
from cfsp.settings.budget import PARTS as PARTS
from cfsp.settings.budget import PROVED_PARTS as PROVED_PARTS
from cfsp.settings.budget import UNIT_PARTS as UNIT_PARTS
from cfsp.settings.budget import WHOLE_PARTS as WHOLE_PARTS
from cfsp.settings.budget import Budget as Budget
from cfsp.settings.budget import Part as Part
from cfsp.settings.budget import WholePart as WholePart
from cfsp.settings.budget import multiple_in_words as multiple_in_words
from cfsp.settings.budget import parse_parts as parse_parts
from cfsp.settings.budget import unit_parts as unit_parts
from cfsp.settings.criterion import ANGULAR as ANGULAR
from cfsp.settings.criterion import AUTO_METRIC as AUTO_METRIC
from cfsp.settings.criterion import BLOCK_METRICS as BLOCK_METRICS
from cfsp.settings.criterion import CHANNEL_METRICS as CHANNEL_METRICS
from cfsp.settings.criterion import DEFAULT_CLAMP as DEFAULT_CLAMP
from cfsp.settings.criterion import DIVERGENCE as DIVERGENCE
from cfsp.settings.criterion import RUNS as RUNS
from cfsp.settings.criterion import SENSITIVITY as SENSITIVITY
from cfsp.settings.criterion import UNIFORM as UNIFORM
from cfsp.settings.criterion import Clamp as Clamp
from cfsp.settings.criterion import Criterion as Criterion
from cfsp.settings.criterion import removal_in_words as removal_in_words
from cfsp.settings.criterion import worth_in_words as worth_in_words
from cfsp.settings.goals import GOALS as GOALS
from cfsp.settings.goals import PHASES as PHASES
from cfsp.settings.goals import Goal as Goal
from cfsp.settings.goals import MaxLossIncrease as MaxLossIncrease
from cfsp.settings.goals import Phase as Phase
from cfsp.settings.goals import TargetKVCache as TargetKVCache
from cfsp.settings.goals import TargetParameters as TargetParameters
from cfsp.settings.goals import TargetSpeedup as TargetSpeedup
from cfsp.settings.options import Option as Option
from cfsp.settings.options import check_declared as check_declared
from cfsp.settings.options import check_names as check_names
from cfsp.settings.options import fraction as fraction
from cfsp.settings.options import from_names as from_names
from cfsp.settings.options import option as option
from cfsp.settings.options import options_of as options_of
from cfsp.settings.pruning import BEST_EFFORT as BEST_EFFORT
from cfsp.settings.pruning import BEST_WITHOUT_TRAINING as BEST_WITHOUT_TRAINING
from cfsp.settings.pruning import DEFAULT_REPAIR as DEFAULT_REPAIR
from cfsp.settings.pruning import DTYPES as DTYPES
from cfsp.settings.pruning import EFFORTS as EFFORTS
from cfsp.settings.pruning import OF_PRUNE as OF_PRUNE
from cfsp.settings.pruning import REPAIRS as REPAIRS
from cfsp.settings.pruning import Compute as Compute
from cfsp.settings.pruning import LocalTraining as LocalTraining
from cfsp.settings.pruning import PruneSettings as PruneSettings
from cfsp.settings.pruning import Repair as Repair
from cfsp.settings.pruning import asked as asked
from cfsp.settings.pruning import prune_settings as prune_settings
from cfsp.settings.text import BOS as BOS
from cfsp.settings.text import BOS_HELP as BOS_HELP
from cfsp.settings.text import DEFAULT_ANSWER_TOKENS as DEFAULT_ANSWER_TOKENS
from cfsp.settings.text import DEFAULT_QUESTIONS as DEFAULT_QUESTIONS
from cfsp.settings.text import DEFAULT_SAMPLES as DEFAULT_SAMPLES
from cfsp.settings.text import DEFAULT_SEQLEN as DEFAULT_SEQLEN
from cfsp.settings.text import DEFAULT_TEXT as DEFAULT_TEXT
from cfsp.settings.text import Bos as Bos
from cfsp.settings.text import CalibrationText as CalibrationText
from cfsp.settings.text import Data as Data
from cfsp.settings.text import EvaluationText as EvaluationText
from cfsp.settings.text import Text as Text
from cfsp.settings.text import texts_of as texts_of
