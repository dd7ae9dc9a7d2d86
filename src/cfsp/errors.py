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
    reason = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {reason}".rstrip(" :")


@contextmanager
def refusing_bad_json(path: Path, otherwise: str) -> Iterator[None]:
    """Turn what goes wrong while a JSON file of a model is read into one `CheckpointError`.

    `otherwise` says what the file is, and what to do, where it is read and is not as expected.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} {otherwise}") from error


# What earlier versions had, and what to do instead; for this release only. Names of texts have a
# table of their own: a file may be called as an option was.
GONE_TEXTS = {
    "self": "text that the model writes went: real text calibrates better; use mixed, or your own"
}
GONE = {
    "cache": "cfsp cache went: what .gguf files became is in $CFSP_CACHE, or in ~/.cache/cfsp",
    "plan": "cfsp plan went, and files of plans are for the command alone: cfsp prune --set "
    "statistics=FILE --dry-run writes one, cfsp prune --plan FILE prunes by it",
    "push": "cfsp push went: use hf upload OWNER/NAME DIR --private --delete '*.safetensors*'",
    "engine": "bench times transformers; time a .gguf file with llama.cpp's own llama-bench, "
    "and other exports with vllm bench latency --model DIR or OpenVINO's own tools",
    "epochs": "it went: recovery is one pass over the text, unless --steps or --max-minutes end it",
    "targets": "it went, because nothing was ever better than to train all projections",
    "shape": "bench --shape went: benchmarks/make_checkpoint.py --shape NAME writes such a model",
    "sglang": "the target sglang went, because nobody had run it; use --to vllm or --to gguf",
    "tensorrt-llm": "the target tensorrt-llm went, because nobody had run it; use --to gguf",
    "padded": "the padded copy went: prune with --widths equal, which stock classes run as it is",
    "recipe": "it went: a sweep is its command, which goes on with it; its methods have names",
    "png": "the charts are in the page as SVG; a browser saves or prints them",
    "dora": "DoRA went: nothing ever showed that it gains on LoRA; use --method lora, or full",
    "of": "a sparsity is the share of one part; --target-params 0.8 keeps 80% of all parameters",
    "revision": "--revision went: write it into the name, as in owner/model@v1",
    "resume": "--resume went: the same command goes on where a killed one was",
    "restore": "--restore went: it is --repair now",
    "eval-seqlen": "it went, because nobody set it: measure with cfsp eval --seqlen",
    **dict.fromkeys(
        ("scale", "warm-up", "weight-decay", "temperature"),
        "it went, because nothing was ever measured with another value than the default; --rank, "
        "--learning-rate and --set teacher_weight stay",
    ),
    **dict.fromkeys(
        ("remove-blocks", "remove-attentions", "remove-experts"),
        "it is --set remove=N now, of what --parts names",
    ),
    "accumulate": "it went, because nobody set it: --batch-windows says how much a step reads",
    "answer-tokens": "it went: an answer has 96 tokens at most",
    "local-blocks": "it went, because nobody set it: 3 blocks train together",
    "questions": "--questions went: give the file to --answers, as in --answers chats.jsonl",
    "results": "it went: name the file beside the runs, as in cfsp report smaller results.json",
    "sensitivity": "it went: prune's default measures it where the model fits into memory, and so "
    "does calibrate; --set block_metric=angular does without",
    "threads": "it went: set the variable OMP_NUM_THREADS",
    "clamp": "it went, because it follows from the block metric",
    "eval-windows": "it is --windows now, as cfsp eval has it",
    "held-out": "it went: the loss is bounded on windows of --data that calibration leaves over",
    "held-out-windows": "it went, because nobody set it: the loss is bounded on 12 windows",
    "keep-adapter": "it went: what is written has the adapters merged, as every server reads it",
    "agreement": "it went: a sweep always compares with the dense model's predictions",
    "keep-weights": "it went: cfsp prune --plan makes the model of a sweep's directory again",
    "process-timeout": "it went, because nobody set it: processes wait 30 minutes for each other",
    "local-text": "it went: the dense model alone teaches, which is nearer to it on other text",
    "recover": "it went: cfsp recover trains what cfsp prune gives, and --effort best does both",
    "stride": "it went, because nobody set it: windows do not overlap",
    "speed": "it went: cfsp bench times models, and cfsp prune --plan makes those of a sweep again",
    "task-limit": "it is --limit now, as cfsp eval has it",
    "warmups": "it went, because nobody set it: 2 runs come before those that are timed",
    **dict.fromkeys(
        ("cosine", "euclidean", "mse", "mae"),
        "no distance was better than the angular one everywhere (docs/STUDIES.md): use angular",
    ),
    "angular+sensitivity": "it went: sensitivity alone is the default where it can be measured",
    **dict.fromkeys(
        ("wanda", "magnitude", "random"),
        "it went, because it was worse (docs/STUDIES.md): use relative",
    ),
    "removal": "it went: blocks go by the predictions if the model fits into memory, else by runs",
    **dict.fromkeys(
        ("wanda-sp", "magnitude-sp", "blocks-alone"),
        "it went, because it was far worse (docs/STUDIES.md): use cfsp, or blocks",
    ),
    "processor": "calibration on images went, because no real model ever proved it: give its "
    "tokenizer (processor.tokenizer), and text",
    "sequential": "sequential went as a choice of its own: it is a step of --repair local",
}


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """Return `; did you mean X?` if something known is like what was found, else nothing.

    Of what an earlier version knew it says what became of that. Dashes before a flag count as no
    likeness.
    """
    name = str(found).lstrip("-")
    if (gone := GONE.get(name.lower().replace("_", "-"))) is not None:
        return f"; {gone}"
    by_name = {each.lstrip("-"): each for each in known}
    close = difflib.get_close_matches(name, by_name, n=1)
    return f"; did you mean {by_name[close[0]]}?" if close else ""
