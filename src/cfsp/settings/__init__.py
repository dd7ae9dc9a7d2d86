"""Every choice that a user has, with its default and its help, once; the CLI is made from it.

    PruneSettings(Budget(0.2), text=CalibrationText(("wikitext2", "c4")))

A field that is declared with `option` is a command-line option: its flag, its type, its default and
its help are written here and nowhere else. Advanced ones are what only a researcher sets: the CLI
takes them as `--set name=value`. Importing this module does not import torch.
"""

from __future__ import annotations

# fmt: off
# isort: off
from cfsp.settings.budget import (
    COUNTED, DEFAULT_PARTS, GOALS, LEAST_WIDTH, PART_NOUNS, PARTS, PROVED_PARTS, UNIT_PARTS,
    WHOLE_PARTS, Budget, Goal, MaxLossIncrease, Part, Phase, TargetKVCache, TargetParameters,
    TargetSpeedup, WholePart, parts_in_words, unit_parts,
)
from cfsp.settings.options import (
    Declared, by_flag, check_names, fraction, from_names, given_of, names_in,
    one_or_several, option, options_of,
)
from cfsp.settings.pruning import (
    ANGULAR, AUTO_METRIC, BEST_EFFORT, BLOCK_METRICS, CHANNEL_METRICS,
    DEFAULT_CLAMP, DIVERGENCE, DTYPES, EFFORTS, OF_PRUNE, REPAIRS, RUNS, SENSITIVITY, UNIFORM,
    Clamp, Compute, Criterion, PruneSettings, Repair, asked, prune_settings,
    removal_in_words, worth_in_words,
)
from cfsp.settings.speed import TimingConditions, Workload
from cfsp.settings.text import (
    BOS, BOS_HELP, DEFAULT_QUESTIONS, DEFAULT_SAMPLES, DEFAULT_SEQLEN, DEFAULT_TEXT,
    LONGEST_WINDOW, MOST_WINDOWS, Bos, CalibrationText, Data, EvaluationText, Text, check_encodes,
    texts_of,
)
