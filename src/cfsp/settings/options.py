"""A field that is a command-line option, and what is made of such fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from inspect import Parameter, signature
from math import inf
from numbers import Integral, Real
from operator import ge, gt, le
from typing import Any, TypeVar

from cfsp.errors import UsageError, did_you_mean

T = TypeVar("T")

_BOUNDS = (("above", "above", gt), ("least", "at least", ge), ("most", "at most", le))


@dataclass(frozen=True)
class Option:
    """How a field is set on a command line."""

    help: str
    kind: Callable[[str], Any] = str  # of all values that were typed, where it repeats
    flag: str = ""  # what follows the dashes; none for the field's name
    choices: tuple[str, ...] = ()
    above: float | None = None
    least: float | None = None
    most: float | None = None
    metavar: str | None = None
    default: str | None = None  # in words, where the value does not say it; empty for none
    repeats: bool = False  # whether it is given once for each of several values
    switch: bool = False
    advanced: bool = False  # whether only a researcher sets it

    @property
    def name(self) -> str:
        """What it is called in Python and by `--set`."""
        return self.flag.replace("-", "_")

    @property
    def typed(self) -> str:
        """What it is called on a command line."""
        return f"--{self.flag}"


def option(value: Any, help: str, **facts: Any) -> Any:
    """Return a dataclass field that is an option; see `Option`."""
    return field(default=value, metadata={"option": Option(help, **facts)})


# Of what only a researcher sets.
advanced_option = partial(option, advanced=True)


def options_of(settings: type[Any]) -> dict[str, Option]:
    """Return the options of a class of settings, by field, each with its default in words."""
    found = {}
    for each in fields(settings):
        if (known := each.metadata.get("option")) is not None:
            usual = "" if each.default in (None, ()) else str(each.default)
            default = usual if known.default is None else known.default
            metavar = known.metavar or ("N" if known.kind is int else None)
            flag = known.flag or each.name.replace("_", "-")
            found[each.name] = replace(known, flag=flag, default=default, metavar=metavar)
    return found


class Declared:
    """Settings that refuse what is no value of their options; see `check_value`.

    None is one where the annotation says so.
    """

    def __post_init__(self) -> None:
        own: Any = type(self)
        may_be_none = {each.name for each in fields(own) if "None" in str(each.type)}
        for name, known in options_of(own).items():
            value = getattr(self, name)
            if value is not None or name not in may_be_none:
                object.__setattr__(self, name, check_value(value, known))


def check_value(value: Any, known: Option) -> Any:
    """Refuse a value that is none of an option's choices, of another type, or beyond its bounds.

    Return it; a number of numpy's, say, as one of Python's own, which JSON has.
    """
    flag = known.typed
    # By their names, because nothing here imports torch.
    if type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype"):
        value = str(value).removeprefix("torch.")
    if known.choices and value not in known.choices:
        raise UsageError(
            f"{flag} must be one of {', '.join(known.choices)}, found {value!r}"
            f"{did_you_mean(value, known.choices)}"
        )
    wanted, what = _TYPE_OF.get(bool if known.switch else known.kind, (object, ""))
    # To Python True is a number, too.
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted in (Integral, Real)):
        raise UsageError(f"{flag} must be {what}, found {value!r}")
    every = ((words, getattr(known, field), holds) for field, words, holds in _BOUNDS)
    bounds = [bound for bound in every if bound[1] is not None]
    if bounds and not (value < inf and all(holds(value, b) for _, b, holds in bounds)):
        said = [f"{words} {b}" for words, b, _ in bounds]
        raise UsageError(f"{flag} must be {' and '.join(said)}, found {value}")
    if isinstance(value, Real) and not isinstance(value, int | float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def from_names(settings: type[T], values: Mapping[str, Any], **others: Any) -> T:
    """Return settings with some values by the names of their options, read as on a command line."""
    found: dict[str, Any] = {}
    for each, known in options_of(settings).items():
        if each in others or known.name in values:
            value = others[each] if each in others else values[known.name]
            is_typed = isinstance(value, str) or (known.repeats and value is not None)
            try:
                found[each] = known.kind(value) if is_typed else value
            except ValueError:
                raise UsageError(f"{known.name} must be a number, found {value!r}") from None
    return settings(**{**others, **found})


def by_flag(settings: Any) -> dict[str, Any]:
    """Return the values of settings by what their options are called on a command line."""
    known = options_of(type(settings))
    values = asdict(settings).items()
    return {known[name].typed if name in known else name: value for name, value in values}


def given_of(settings: type[Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Return the flags of a class of settings whose options are among some values, by field."""
    return {
        each: known.typed
        for each, known in options_of(settings).items()
        if values.get(known.name) is not None
    }


def check_names(function: Callable[..., Any], given: Iterable[str], *known: type[Any]) -> None:
    """Refuse a keyword of a call that is no option of some classes of settings."""
    own = signature(function).parameters.values()
    names = [each.name for each in own if each.kind is Parameter.KEYWORD_ONLY]
    names += [option.name for cls in known for option in options_of(cls).values()]
    names = list(dict.fromkeys(names))
    for name in given:
        if name not in names:
            raise UsageError(
                f"unknown argument {name}{did_you_mean(name, names)}; known are: {', '.join(names)}"
            )


def one_or_several(given: Any) -> tuple[Any, ...]:
    """Return what a call gives as one value or as several; a text is one."""
    # An array without an axis says that it has parts, and has none.
    has_parts = isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
    return tuple(given) if has_parts and not isinstance(given, str) else (given,)


def names_in(text: str) -> tuple[str, ...]:
    """Return what a text like `piqa,arc_easy` names, which is something."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError(f"expected one name or several, as in a,b, found {text!r}")
    return names


def fraction(text: str) -> float:
    """Return the number that `0.2` or `20%` means."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UsageError(f"expected a fraction such as 0.2 or 20%, found {text!r}") from None


def _number_or(word: str, text: str) -> int | None:
    """Return the number, or None for a word."""
    if text == word:
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"expected a number or {word}, found {text!r}") from None


number_or_auto, number_or_all = (partial(_number_or, word) for word in ("auto", "all"))


def parse_size(text: str) -> int:
    """Return the number of bytes that a text like 2GB, 512MiB or 1e9 means."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    try:
        if match is None or (match[3] and not match[2]):
            raise ValueError
        unit = 1024 if match[3] else 1000
        return int(float(match[1]) * unit ** " kmgt".index(match[2] or " "))
    except (ValueError, OverflowError):
        raise UsageError(f"expected a size such as 2GB or 512MiB, found {text!r}") from None


# What a call may give for an option that a command line reads so.
_TYPE_OF: dict[Callable[[str], Any], tuple[Any, str]] = {
    str: (str, "text"),
    bool: (bool, "True or False"),
    **dict.fromkeys((int, number_or_auto, number_or_all), (Integral, "a whole number")),
    # A size too, which is often written 2e9.
    **dict.fromkeys((float, fraction, parse_size), (Real, "a number")),
}
