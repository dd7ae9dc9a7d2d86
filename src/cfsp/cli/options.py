"""A thin layer over argparse: options are made from settings, and settings from what was typed.

    add_options(parser, parser.add_argument_group("text"), CalibrationText)
    ...
    text = settings_from(args, CalibrationText)

An option that only a researcher sets is not in `--help`; `--help-all` lists it, and
`--set name=value` sets it.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from cfsp.errors import CfspError, UsageError, did_you_mean
from cfsp.settings import Compute, from_names, options_of

T = TypeVar("T")

_NUMBER_OF: dict[object, str] = {"+": "{} ...", "*": "[{} ...]", "?": "[{}]"}


class Parser(argparse.ArgumentParser):
    """Refuses arguments with one sentence, and shows advanced options only if asked to."""

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self._advanced: list[tuple[argparse.Action, str]] = []

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where to look, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see: {self.prog} --help\n")

    def hide(self, action: argparse.Action) -> None:
        """Make an option an advanced one."""
        self._advanced.append((action, action.help or ""))
        action.help = argparse.SUPPRESS

    def format_listed(self) -> str:
        """Return the help without the advanced options."""
        words = [
            _NUMBER_OF.get(action.nargs, "{}").format(action.metavar or action.dest)
            for action in self._get_positional_actions()
        ]
        # argparse would name every option there, too.
        self.usage = " ".join([self.prog, "[options]", *words])
        return super().format_help()

    def format_help(self) -> str:
        """Return the help, with a line on how to reach the rest."""
        rest = "\n--set NAME=VALUE sets what else there is; --help-all lists it\n"
        return self.format_listed() + (rest if self._advanced else "")

    def format_advanced(self) -> str:
        """Return the help of the advanced options, as `--set` takes them; nothing without any."""
        if not self._advanced:
            return ""
        formatter = self._get_formatter()
        for action, help_text in self._advanced:
            name = action.dest
            values = f"={{{','.join(map(str, action.choices))}}}" if action.choices else "=..."
            shown = argparse.Action([], dest=name, metavar=f"{name}{values}", help=help_text)
            formatter.add_argument(shown)
        title = "\nwhat only a researcher sets (--set NAME=VALUE):\n"
        return title + formatter.format_help()

    def known_flags(self) -> list[str]:
        """Return all flags, the advanced ones too."""
        return [flag for action in self._actions for flag in action.option_strings]

    def how_to_repeat(self, argv: Sequence[str], word: str) -> str:
        """Return how the option before a word too many takes several values; nothing if it can't.

        `--data a.txt b.txt` and `--parts ffn kv` are what other commands take.
        """
        flags = [each.partition("=")[0] for each in argv[: argv.index(word)] if each[:2] == "--"]
        flag = flags[-1] if flags else ""
        action = self._option_string_actions.get(flag)
        if action is not None and "," in str(action.metavar):
            return f"; {flag} takes several with commas between and no spaces"
        if isinstance(action, argparse._AppendAction):
            return f"; give {flag} before each: {flag} {word}"
        return ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = None if action.choices is None else list(map(str, action.choices))
        if choices is not None and str(value) not in choices:
            raise argparse.ArgumentError(
                action,
                f"expected one of {', '.join(choices)}, found {value!r}"
                + did_you_mean(value, choices),
            )


class HelpAll(argparse.Action):
    """Print all options and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print them."""
        assert isinstance(parser, Parser)
        print(parser.format_listed() + parser.format_advanced(), end="")
        parser.exit()


def add_command(subparsers: Any, name: str, command: ModuleType) -> None:
    """Add a command: a module whose docstring is its help, with `add_options_to` and `run`."""
    assert command.__doc__ is not None
    summary, _, example = command.__doc__.strip().partition("\n\n")
    parser: Parser = subparsers.add_parser(
        name,
        help=summary[0].lower() + summary[1:].removesuffix("."),
        description=summary,
        # Python 3.13 takes the indentation of docstrings away.
        epilog=f"example:\n{re.sub('^ *cfsp', '  cfsp', example, flags=re.MULTILINE)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, run=command.run)
    parser.add_argument("--help-all", nargs=0, action=HelpAll, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_options_to(parser)


def add_options(
    parser: Parser,
    group: Any,
    settings: type[Any],
    *,
    fields: Sequence[str] | None = None,
    nargs: str | None = None,
    hides: bool = True,
) -> None:
    """Add the options of a class of settings, or of some of its fields, to a group of a parser.

    `nargs` is argparse's; it `hides` those that only a researcher sets.
    """
    for name, option in options_of(settings).items():
        if fields is not None and name not in fields:
            continue
        default = f" (default: {option.default})" if option.default else ""
        facts: dict[str, Any] = {"help": f"{option.help}{default}".replace("%", "%%")}
        if option.metavar:
            facts["metavar"] = option.metavar
        if option.choices:
            facts["choices"] = option.choices
        if option.switch:
            facts |= {"action": "store_true", "default": None}
        elif option.repeats:
            facts["action"] = "append"
        elif not option.choices:
            facts |= {"type": kind_of(option.kind), "nargs": nargs}
        action = group.add_argument(option.typed, **facts)
        if option.advanced and hides:
            parser.hide(action)


def add_advanced(parser: Parser, *flags: str, **facts: Any) -> None:
    """Add an option of a command itself that only `--help-all` shows."""
    parser.hide(parser.add_argument(*flags, **facts))


def typed(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was typed, by the names of options."""
    return {name: value for name, value in vars(args).items() if value is not None}


def settings_from(args: argparse.Namespace, settings: type[T]) -> T:
    """Return settings as they were typed; what was not typed has its default."""
    return from_names(settings, typed(args))


def expand_sets(argv: Sequence[str]) -> list[str]:
    """Return arguments with `--name=value` for `--set name=value`; refuse empty ones."""
    expanded: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--set":
            word = f"--set={rest.pop(0) if rest else ''}"
        if word.startswith("--set="):
            name, equals, value = word.removeprefix("--set=").partition("=")
            if not name or not equals:
                raise UsageError(
                    f"--set needs NAME=VALUE, found {name!r}; `cfsp COMMAND --help-all` lists the "
                    "names"
                )
            word = f"--{name.replace('_', '-')}={value}"
        flag, equals, value = word.partition("=")
        # Of two dashes argparse would make a list.
        if not word or (flag.startswith("--") and equals and value in ("", "--")):
            before = flag or (expanded[-1] if expanded else "cfsp")
            raise UsageError(
                f"expected a value after {before}, found nothing; is a variable of the shell empty?"
            )
        expanded.append(word)
    return expanded


def kind_of(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type of argparse whose mistakes are those of a function that reads text."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except CfspError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text if value is None else value  # None is what was not typed

    parse.__name__ = getattr(kind, "__name__", "value")
    return parse


def add_model(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="directory, hub id (or ID@REVISION), .gguf file, or `demo`"
    )


def add_compute(parser: Parser) -> None:
    """Add where to compute and in what."""
    add_options(parser, parser, Compute, fields=("device", "dtype", "batch_windows"))


def typed_command(args: argparse.Namespace) -> str:
    """Return the command line as the user could type it again."""
    return shlex.join(["cfsp", *args.argv])
