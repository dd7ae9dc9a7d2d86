"""Options that say how much to remove, of which a command takes one; and what a goal came to."""

from __future__ import annotations

import argparse
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.cli import arguments
from cfsp.cli.options import Parser, add_options, given, settings_from
from cfsp.cli.output import human_count, print_table
from cfsp.errors import UsageError
from cfsp.planning.allocation import channels_in_words
from cfsp.settings import (
    GOALS,
    NUMBERS,
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
    if not found and arguments.budget(args).is_said_in_numbers:
        numbers = [name for name in given(args, Budget) if name in NUMBERS.values()]
        options = options_of(Budget)
        found.append(" and ".join(flag_of(name, options[name]) for name in numbers))
    return found


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
            "says how much to remove (or --plan, a complete decision; or, where only whole blocks, "
            f"attentions or experts go, their numbers); found {' and '.join(found) or 'none'}"
        )
    if args.of is not None and found != ["--sparsity"]:
        raise UsageError(f"--of belongs to --sparsity, found it with {found[0]}")
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
    print(f"\n{_in_words(resolution)}: {_chosen_in_words(resolution['budget'])}\n")


def _chosen_in_words(budget: dict[str, Any]) -> str:
    """Return what goes by a budget, as its JSON has it."""
    counts = {"remove_blocks": "blocks", "remove_attentions": "attentions"}
    words = [counted(budget[key], noun) for key, noun in counts.items() if budget[key] is not None]
    others = " of the others" if words else ""
    if channels := channels_in_words(budget["parts"]):
        words.append(f"{budget['sparsity']:.1%} of the {channels}{others}")
    goes = words == ["1 block"] or words == ["1 attention"]
    return f"{' and '.join(words)} {'goes' if goes else 'go'}"


def _in_words(resolution: dict[str, Any]) -> str:
    asked, conditions = resolution["asked"], resolution["conditions"]
    if resolution["goal"] == "target_speedup":
        return f"at least {asked:g} times faster in {conditions['phase']}"
    text = f"at most {asked:g} nats per token over {conditions['dense_loss']:.3f}, before repair"
    if "result" in resolution:
        text += f" (the result: {resolution['result']:+.3f})"
    return text
