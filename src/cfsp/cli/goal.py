"""Arguments that say how much to remove by another measure than a fraction, and what was tried."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cfsp.cli.output import human_count, print_table
from cfsp.errors import UsageError

if TYPE_CHECKING:
    from cfsp.goals.goal import Goal

# Spelled out here, because their home is beside what imports torch; a test compares.
PHASES = ("decode", "prefill")

_NOUNS = {"max_loss_increase": "loss increase", "target_speedup": "predicted speed-up"}


def add_goals(parser: argparse.ArgumentParser, *, has_text: bool) -> None:
    """Add the goals that exclude --sparsity.

    Args:
        parser: of the command.
        has_text: whether the command has calibration text, of which some can be held out.
    """
    group = parser.add_argument_group("instead of --sparsity, one of")
    group.add_argument(
        "--target-params",
        type=float,
        metavar="F",
        help="fraction of all parameters that stays, in (0, 1]: 1 - P of --sparsity P --of model",
    )
    group.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="as little as is predicted to make the model X times faster on this machine, from "
        "latencies of several FFN widths; takes a quiet machine and a few times the model's memory",
    )
    group.add_argument(
        "--target-speedup-of",
        choices=PHASES,
        metavar="PHASE",
        help=f"what shall be faster, of {' or '.join(PHASES)} (default: decode)",
    )
    if not has_text:
        return
    group.add_argument(
        "--max-loss-increase",
        type=float,
        metavar="NATS",
        help="as much as keeps the loss per token on held-out text within so many nats of the "
        "dense model's; measured before restoration, which mostly lowers it further; needs the "
        "model in memory",
    )
    group.add_argument(
        "--held-out",
        action="append",
        metavar="TEXT",
        help="text for --max-loss-increase; repeatable (default: windows of --data that "
        "calibration leaves over)",
    )
    group.add_argument(
        "--held-out-windows",
        type=int,
        metavar="N",
        help="windows in all, or of each --held-out text (default: 12)",
    )


def given(args: argparse.Namespace) -> list[str]:
    """Return which of the options that say how much to remove were given."""
    options = ("sparsity", "target_params", "max_loss_increase", "target_speedup")
    named = [option for option in options if getattr(args, option, None) is not None]
    return [f"--{option.replace('_', '-')}" for option in named]


def check_goal(args: argparse.Namespace) -> None:
    """Check that exactly one option says how much to remove, and others belong to it.

    Raises:
        UsageError: none or several do, or one that belongs to another is given without it.
    """
    found = given(args)
    if len(found) != 1:
        raise UsageError(
            "exactly one of --sparsity, --target-params, --max-loss-increase and --target-speedup "
            f"says how much to remove (or --plan, a complete decision); found "
            f"{' and '.join(found) or 'none'}"
        )
    if args.of == "model" and found != ["--sparsity"]:
        raise UsageError(f"--of belongs to --sparsity, found it with {found[0]}")
    for option, owner in (
        ("target_speedup_of", "--target-speedup"),
        ("held_out", "--max-loss-increase"),
        ("held_out_windows", "--max-loss-increase"),
    ):
        if getattr(args, option, None) is not None and found != [owner]:
            raise UsageError(f"--{option.replace('_', '-')} belongs to {owner}")


def goal(args: argparse.Namespace) -> Goal | None:
    """Return the goal; None if a sparsity was given."""
    from cfsp.goals.goal import (
        DEFAULT_WINDOWS,
        MaxLossIncrease,
        TargetParameters,
        TargetSpeedup,
    )

    if args.target_params is not None:
        return TargetParameters(args.target_params)
    if args.target_speedup is not None:
        return TargetSpeedup(args.target_speedup, args.target_speedup_of or "decode")
    if getattr(args, "max_loss_increase", None) is not None:
        windows = DEFAULT_WINDOWS if args.held_out_windows is None else args.held_out_windows
        return MaxLossIncrease(args.max_loss_increase, tuple(args.held_out or ()), windows)
    return None


def print_goal(resolution: dict[str, Any]) -> None:
    """Print what was tried for a goal, as its JSON has it; nothing if nothing was."""
    if not resolution.get("tried"):
        return
    noun = _NOUNS[resolution["goal"]]
    rows = [
        (
            f"{entry['sparsity']:.1%}",
            human_count(entry["parameters"]),
            f"{entry['value']:.3f}",
            "yes" if entry["fits"] else "no",
        )
        for entry in sorted(resolution["tried"], key=lambda entry: entry["sparsity"])
    ]
    print_table(("sparsity", "parameters", noun, "fits"), rows)
    chosen = f"{resolution['budget']['sparsity']:.1%} of the FFN channels go"
    print(f"\n{_asked(resolution)}: {chosen}\n")


def _asked(resolution: dict[str, Any]) -> str:
    asked, conditions = resolution["asked"], resolution["conditions"]
    if resolution["goal"] == "target_speedup":
        return f"at least {asked:g} times faster in {conditions['phase']}"
    text = f"at most {asked:g} nats per token over {conditions['dense_loss']:.3f}, unrestored"
    if "result" in resolution:
        text += f" (the result: {resolution['result']:+.3f})"
    return text
