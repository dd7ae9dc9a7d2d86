"""Study 10: where a trained mixture of experts shrinks, do whole experts go or channels of each?

    python studies/run.py 10 --texts DIR --out rows.json

Trains a small mixture of experts on the calibration texts (`training.py` says what it is), and then
does what study 9 does, with experts among the parts that may go. Models are kept, and not trained
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from conditions import parser_of_texts
from parts import add_options, study
from training import ARCHITECTURES, MODELS, Size, place_of, trained

CHOICES = ["ffn", "experts", "ffn,experts", "ffn,blocks", "blocks,experts"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, prune, measure, print."""
    found = parser_of_texts("experts", __doc__.splitlines()[0])
    found.add_argument("--architecture", choices=ARCHITECTURES, default="mixtral", help="to train")
    found.add_argument("--tokens", type=int, default=Size.tokens, help="to train on")
    found.add_argument("--trained", type=Path, default=MODELS, help="where trained models are kept")
    add_options(found, CHOICES)
    args = found.parse_args(arguments)
    named = (args.architecture, args.seed, Size(tokens=args.tokens), args.trained)
    args.model = str(place_of(*named))
    study(args, partial(trained, *named, texts=args.data))


if __name__ == "__main__":
    main()
