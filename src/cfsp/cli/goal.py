"""Options that say how much to remove, of which a command takes one; and what a goal came to."""

from __future__ import annotations

import argparse
from typing import Any

from cfsp.cli.options import Parser, add_options, given, settings_from
from cfsp.cli.output import human_count, print_table
from cfsp.errors import UsageError
from cfsp.settings import (
    COUNTS,
    GOALS,
    Budget,
    Criterion,
    Goal,
    MaxLossIncrease,
    field_of_goal,
    flag_of,
    flag_of_goal,
    options_of,
)

_NOUNS = {"max_loss_increase": "loss increase", "target_speedup": "predicted speed-up"}


def add_goals(parser: Parser, *, has_text: bool) -> Any:
    """Add what says how much to remove and by which criterion; return the help's group.

    Args:
        parser: of the command.
        has_text: whether the command has calibration text, of which some can be held out.
    """
    group = parser.add_argument_group("what to remove (one of these, of what --parts names)")
    add_options(parser, group, Budget)
    for goal in GOALS:
        if has_text or goal is not MaxLossIncrease:
            add_options(parser, group, goal)
    add_options(parser, group, Criterion)
    return group


def asked(args: argparse.Namespace) -> list[str]:
    """Return which of the options that say how much to remove were given."""
    found = ["--sparsity"] if args.sparsity is not None else []
    found += [flag_of_goal(goal) for goal in GOALS if field_of_goal(goal) in given(args, goal)]
    counts = [name for name in given(args, Budget) if name in COUNTS.values()]
    return found + [flag_of(name, options_of(Budget)[name]) for name in counts]


def check_goal(args: argparse.Namespace) -> None:
    """Check that exactly one option says how much to remove, and others belong to it.

    Raises:
        UsageError: none or several do, or one that belongs to another is given without it.
    """
    found = asked(args)
    if len(found) != 1:
        raise UsageError(
            "exactly one of --sparsity, --target-params, --target-kv-cache, --max-loss-increase "
            "and --target-speedup "
            "says how much to remove (or --plan, a complete decision; or, where blocks, attention "
            f"layers or experts go, their number); found {' and '.join(found) or 'none'}"
        )
    for goal in GOALS:
        options, owner = options_of(goal), flag_of_goal(goal)
        for other in given(args, goal):
            if other != field_of_goal(goal) and found != [owner]:
                raise UsageError(f"{flag_of(other, options[other])} belongs to {owner}")


def goal(args: argparse.Namespace) -> Goal | None:
    """Return the goal; None if a sparsity was given."""
    asked = (kind for kind in GOALS if field_of_goal(kind) in given(args, kind))
    return next((settings_from(args, kind) for kind in asked), None)


def print_goal(resolution: dict[str, Any]) -> None:
    """Print what was tried for a goal, as its JSON has it; nothing if nothing was."""
    if not resolution.get("tried"):
        return

    from cfsp.planning.candidate import Candidate

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
    chosen = Candidate.from_json(resolution["chosen"]).in_words
    print(f"\n{_in_words(resolution)}: {chosen} go\n")


def _in_words(resolution: dict[str, Any]) -> str:
    asked, conditions = resolution["asked"], resolution["conditions"]
    if resolution["goal"] == "target_speedup":
        return f"at least {asked:g} times faster in {conditions['phase']}"
    text = f"at most {asked:g} nats per token over {conditions['dense_loss']:.3f}, before repair"
    if "result" in resolution:
        text += f" (the result: {resolution['result']:+.3f})"
    return text
