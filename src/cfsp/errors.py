"""Every error that a user can cause, as a tree whose root is `CfspError`.

A message says in one sentence, without a traceback, what was expected, what was found, and what to
do. Anything that is not a `CfspError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class CfspError(Exception):
    """Base of all errors that a user can cause and cure."""

    exit_status = 2  # of the command
    keeps_work = False  # whether the same command could get further

    def __str__(self) -> str:
        """Return one line; what a file made us quote can't break it or speak to the terminal."""
        return "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode()
            for char in super().__str__()
        )


class UsageError(CfspError):
    """An argument is outside its range, or contradicts another one."""


class ShortOfMemoryError(UsageError):
    """What was asked for takes more memory than there is now."""

    keeps_work = True


class CheckpointError(CfspError):
    """A model directory is missing, truncated, or contradicts its own config."""


class ChangedFileError(CheckpointError):
    """A file of a model was changed while it was read; it may hold what it held."""

    keeps_work = True

    @classmethod
    def gone(cls, path: object, error: OSError) -> ChangedFileError:
        """Return that of a file, or a model, which can't be read any more."""
        why = error.strerror or first_line(error)
        return cls(f"{path} could be read before and now cannot: {why}; start again when it can")


class UnsupportedModelError(CheckpointError):
    """The model cannot be pruned: a module, a class or a way to store it is not supported."""


class UnknownModelError(UnsupportedModelError):
    """The model is built in a way that cfsp does not know, which is worth a report."""

    def __str__(self) -> str:
        """Return the message, which is itself without it, and the call to report it."""
        return f"{super().__str__()}; please report the model type with this sentence"


class TextError(CfspError):
    """A text is missing, unreadable, or too short."""


class TaskError(CfspError):
    """An evaluation task is unknown, or its data is missing or damaged."""

    keeps_work = True


class CalibrationError(CfspError):
    """A weight or an activation is NaN or infinite."""


class StatisticsError(CfspError):
    """A statistics file is damaged, of another version, or of another model."""


class PlanError(CfspError):
    """A plan is damaged, of another version, or was made for another model."""


class BudgetError(CfspError):
    """No plan can reach the requested sparsity."""


class ExportError(CfspError):
    """The target format cannot express this model, or what was written computes something else."""


class CannotSayError(ExportError):
    """The target format cannot express this model; `export` adds which other targets can."""

    def __init__(self, reason: str, instead: str = "") -> None:
        super().__init__(f"{reason}; {instead}" if instead else reason)
        self.reason, self.instead = reason, instead


class RecoveryError(CfspError):
    """Training diverged, cannot be resumed, or its teacher does not fit the model."""


class ReportError(CfspError):
    """A directory is not a run of cfsp, or its files do not belong together."""


class OutputError(CfspError):
    """The output directory exists already, or cannot be written to."""

    keeps_work = True


class ResumeError(CfspError):
    """A work directory holds unfinished work of another command, model or text."""

    keeps_work = True


class ProcessError(CfspError):
    """The processes of a job cannot reach each other, or one of them died."""

    keeps_work = True


class MissingExtraError(CfspError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs packages that are not installed; "
            f"install them with: pip install '.[{extra}]' in the clone of cfsp"
        )
        self._made_of = feature, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Let it pass from a process to another."""
        return type(self), self._made_of


def first_line(error: Exception) -> str:
    """Return what is wrong, in one line of bounded length; some errors have only a name."""
    reason = str(error).strip().partition("\n")[0]
    reason = f"{reason[:200]}..." if len(reason) > 200 else reason
    return f"{type(error).__name__}: {reason}".rstrip(" :")


def why_unread(error: Exception) -> str:
    """Return why a file was not read: the system's own words, without its number and the path."""
    if isinstance(error, IsADirectoryError):
        return "it is a directory, expected a file in it"
    return str(getattr(error, "strerror", None) or error)


# What comes of JSON in which something is missing, or of another type than expected.
OF_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


@contextmanager
def damage_as(kind: type[CfspError], where: object, instead: str) -> Iterator[None]:
    """Turn what is missing in a file of ours, or of another type, into one error of a kind."""
    try:
        yield
    except OF_DAMAGE as error:
        raise kind(f"{where} is damaged ({repr(error)[:200]}); {instead}") from error


@contextmanager
def refusing_bad_json(path: Path, otherwise: str) -> Iterator[None]:
    """Turn what goes wrong while a JSON file of a model is read into one `CheckpointError`.

    `otherwise` says what the file is, and what to do, where it is read and is not as expected.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {why_unread(error)}") from error
    except (*OF_DAMAGE, RecursionError) as error:
        raise CheckpointError(f"{path} {otherwise}") from error


# Names that other tools, papers or hubs have and cfsp has not, and what to do instead.
_INSTEAD = {
    "push": "use hf upload OWNER/NAME DIR --private --delete '*.safetensors*'",
    "revision": "write it into the name, as in owner/model@v1",
    "resume": "give the same command again: it goes on where a killed one was",
    "threads": "set the variable OMP_NUM_THREADS",
    "stride": "windows do not overlap: set their length by --seqlen",
    "epochs": "recovery is one pass over the text, unless --steps or --max-minutes end it",
    "auto": "leave it out: then it is what suits most models",
    "dora": "nothing ever showed that DoRA gains on LoRA: use --method lora, or full",
    "targets target-modules": "all projections are trained, because nothing was ever better",
    "scale warm-up weight-decay temperature": "nothing was ever measured with another value than "
    "what recovery uses; set --rank, --learning-rate or --set teacher_weight",
    "sglang": "nobody has run a copy in SGLang: use --to vllm or --to gguf",
    # The type of a copy for vLLM.
    "nemotron-nas": "give the checkpoint that was exported for vLLM, or time the copy with vllm "
    "bench latency --trust-remote-code",
    # llama.cpp's names of what it alone runs, such as our exports with widths of their own.
    "deci openelm": "give the checkpoint that it was made of",
    "tensorrt-llm": "nobody has run a copy in TensorRT-LLM: use --to gguf",
    "cosine euclidean mse mae": "no distance was better than the angular one everywhere "
    "(docs/STUDIES.md): use angular",
    "wanda magnitude random": "relative was better (docs/STUDIES.md): use that",
    "processor": "calibration is by text alone: give its tokenizer (processor.tokenizer)",
}
ELSEWHERE = {name: instead for names, instead in _INSTEAD.items() for name in names.split()}


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """Return `; did you mean X?` if something known is like what was found, else nothing.

    Of a name that other tools have it says what to do instead. Dashes before a flag count as no
    likeness.
    """
    name = str(found).lstrip("-")
    if (instead := ELSEWHERE.get(name.lower().replace("_", "-"))) is not None:
        return f"; {instead}"
    by_name = {each.lstrip("-"): each for each in known}
    close = difflib.get_close_matches(name, by_name, n=1)
    return f"; did you mean {by_name[close[0]]}?" if close else ""
