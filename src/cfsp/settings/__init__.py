"""Every choice that a user has, with its default and its help, once; the CLI is made from it.

    PruneSettings(Budget(0.2), text=CalibrationText(("wikitext2", "c4")))

A field that is declared with `option` is a command-line option: its flag, its type, its default and
its help are written here and nowhere else. Advanced ones are what only a researcher sets: the CLI
takes them as `--set name=value`. Importing this module does not import torch.
"""

from __future__ import annotations

from cfsp.settings.budget import *
from cfsp.settings.options import *
from cfsp.settings.pruning import *
from cfsp.settings.text import *
