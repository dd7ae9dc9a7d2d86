"""Recovery: training wins back quality, in the same layout.

pruned checkpoint + text -> windows -> ATTACH -> TRAIN -> MERGE -> checkpoint of the same layout
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import PreTrainedModel

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.config_file import read_plain_fields
from cfsp.checkpoint.loading import compute_device, torch_as_it_starts
from cfsp.checkpoint.locating import check_is_name, open_checkpoint
from cfsp.checkpoint.output import check_output_is_free, output_path, staged_directory
from cfsp.checkpoint.own_files import (
    CONFIG_FILE,
    MODELING_FILE,
    PLAN_FILE,
    copy_travelling_files,
    digests_beside_weights,
)
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.tensor_file import write_shards
from cfsp.errors import RecoveryError, UsageError
from cfsp.processes import is_first_process, joined, take_own_accelerator
from cfsp.quality.evaluate import perplexity_by_text
from cfsp.quality.perplexity import before_and_after
from cfsp.recovery.adaptation import attach, load_to_train, merge, size_of_weights
from cfsp.recovery.loss import loss_inside
from cfsp.recovery.own_chats import with_own_chats
from cfsp.recovery.prepare import Prepared, prepare
from cfsp.recovery.schedule import BYTES_PER_SECOND, MARGIN, schedule_of
from cfsp.recovery.settings import (
    AUTO_TEACHER,
    NO_TEACHER,
    RELATIVE_RATES,
    Adaptation,
    Limit,
    Method,
    RecoverSettings,
    Training,
)
from cfsp.recovery.trainer import WHOLE, RecoverReport, shard, train
from cfsp.result.card import write_record
from cfsp.result.facts import recoveries, was_pruned
from cfsp.result.manifest import facts_about, plan_beside
from cfsp.result.prune_report import dequantisation
from cfsp.settings import (
    DEFAULT_TEXT,
    Compute,
    Data,
    EvaluationText,
    check_names,
    from_names,
    given_of,
    texts_of,
)
from cfsp.streaming.memory import peak_rss_bytes
from cfsp.streaming.runtime import versions
from cfsp.streaming.work_dir import WorkDir, load_or_compute, output_work_dir, remove_finished_work
from cfsp.text.sources import check_texts

logger = logging.getLogger(__name__)


@torch_as_it_starts()
def recover(
    model: str | Path,
    *,
    out: str | Path,
    data: Data = DEFAULT_TEXT,
    max_minutes: float | None = None,
    steps: int | None = None,
    method: Method = "lora",
    learning_rate: float | None = None,
    teacher: str | Path | None = AUTO_TEACHER,
    eval: Data = (),
    seqlen: int = Training.seqlen,
    device: str = "auto",
    command: str | None = None,
    started: float | None = None,
    **advanced: Any,
) -> RecoverReport:
    """Train a pruned checkpoint into a new directory of the same layout.

    A call that was killed left its work beside `out`; the same call goes on from it.

    Args:
        model: a directory that `prune` wrote; also a hub id or any other model.
        out: the new directory.
        data: texts and conversations to train on (see `cfsp.text.sources`).
        max_minutes: of the whole recovery, evaluations and writing included; without this and
            without steps it is one pass over the text.
        steps: of the optimizer.
        method: `lora`, or `full` (the projections and experts themselves).
        learning_rate: at its peak; None for what suits the method and the size of the weights.
        teacher: a dense model to distil from; `auto` is the one that was pruned, if it is still
            where its manifest says and there is memory for both; None trains on the text alone.
        eval: texts to measure perplexity on, before and after.
        seqlen: tokens in a window to train on.
        device: where to train; `auto` is an accelerator if there is one.
        command: what the manifest gives as the command; None for this call.
        started: when `max_minutes` began, in seconds of `time.monotonic()`; None for now.
        **advanced: what else `cfsp recover --help` and `--help-all` list, by the same names.

    Returns:
        What training did and what it brought.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    started = time.monotonic() if started is None else started
    take_own_accelerator(str(device))
    new = output_path(out)
    if teacher is not None:
        check_is_name(teacher)
    check_names(recover, advanced, Adaptation, Training, EvaluationText, Compute)
    others = {name: value for name, value in advanced.items() if name != "batch_windows"}
    how = {"learning_rate": learning_rate, "seqlen": seqlen, **advanced}
    limit = from_names(Limit, {"max_minutes": max_minutes, "steps": steps})
    settings = RecoverSettings(
        data=texts_of(data),
        training=from_names(Training, how, limit=limit),
        adaptation=from_names(Adaptation, advanced, method=method),
        teacher=NO_TEACHER if teacher is None else str(teacher),
        evaluation=from_names(EvaluationText, advanced, names=texts_of(eval), seqlen=None),
        compute=from_names(Compute, others, device=device),
    )
    if method == "full" and (of_adapters := given_of(Adaptation, advanced)):
        raise UsageError(f"{next(iter(of_adapters.values()))} belongs to --method lora")
    if settings.teacher == NO_TEACHER and advanced.get("teacher_weight") is not None:
        raise UsageError("--teacher-weight needs a teacher, found --teacher none")
    # Before the model: it may have to be downloaded or converted.
    check_texts(settings.data, settings.evaluation.names)
    return recover_checkpoint(
        open_checkpoint(model),
        new,
        settings,
        command=f"cfsp.recover({str(model)!r}, ...)" if command is None else command,
        started=started,
    )


def recover_checkpoint(
    source: Checkpoint,
    out: Path,
    settings: RecoverSettings,
    *,
    command: str = "",
    started: float | None = None,
) -> RecoverReport:
    """Train a pruned checkpoint and write the result as a plain checkpoint of the same layout.

    Under torchrun every process calls this with the same arguments; the first one writes.
    `started` is as for `recover`.
    """
    started = time.monotonic() if started is None else started
    if is_first_process():
        remove_finished_work(out)
    ready = prepare(source, out, settings, started)
    with ExitStack() as own:
        report = _recover(ready, own, command)
    if not is_first_process():
        return report
    limit = settings.training.limit.minutes
    # Of a killed run the stages have its time too.
    took = max(time.monotonic() - started, sum(report.seconds.values()))
    if limit is not None and (over := ceil(took - 60 * limit)) > 0:
        logger.warning(
            f"recovery took {counted(over, 'second')} more than --max-minutes {limit:g}; it "
            f"made {report.steps} training steps: give it more, or smaller --batch-windows"
        )
    return report


def _recover(ready: Prepared, own: ExitStack, command: str) -> RecoverReport:
    """Do the work; only the first process has a work directory, as long as `own`, and writes."""
    watch, windows = ready.watch, ready.windows
    work_dir: WorkDir | None = None

    def begin() -> tuple[dict[str, Any], float]:
        nonlocal work_dir
        budget = ready.settings.compute.memory_budget
        work_dir = own.enter_context(output_work_dir(ready.out, ready.identity, budget))
        check_output_is_free(ready.out)  # another run may have been at work meanwhile
        return measured_before(ready, work_dir)

    with joined(compute_device(ready.settings.compute.device)) as team:
        # The others wait in the team as long as it takes, and are refused with the first; a group
        # that opens later gives up.
        team.check_same({name: str(value) for name, value in ready.identity.items()})
        before, seconds = team.from_first(begin)
        adapted, ready, report = _train(ready, work_dir, seconds)
    if not report.best_step:
        raise _nothing_gained(report, ready)
    if work_dir is None:
        return report
    with staged_directory(ready.out) as staging:
        with watch.stage("write"):
            merged = merge(adapted)
            digests = write_recovered_weights(ready.source, merged, ready.trained, staging)
            copy_everything_else(ready.source, staging)
        del adapted, merged
        if windows:
            with watch.stage("evaluate"):
                found, compute = Checkpoint(staging, "the recovered model"), ready.settings.compute
                after = perplexity_by_text(found, windows, compute, work_dir, "recovered")
            report = replace(report, perplexity=before_and_after(before, after))
        report = replace(report, seconds=watch.seconds, peak_rss_bytes=peak_rss_bytes())
        _write_record(ready, report, staging, digests, command)
    return report


def measured_before(ready: Prepared, work_dir: WorkDir) -> tuple[dict[str, Any], float]:
    """Return the perplexities before training and the seconds that they took.

    They take them again when all is trained: that is no time to train in. So what a killed run left
    of a text is measured from its beginning, and timed whole.
    """
    found: dict[str, Any] = {}
    seconds, whole = 0.0, replace(work_dir, identity=None)

    def measure(text: str) -> dict[str, Any]:
        begin, one = time.monotonic(), {text: ready.windows[text]}
        with ready.watch.stage("evaluate"):
            values = perplexity_by_text(ready.source, one, ready.settings.compute, whole, "pruned")
        return {"perplexity": values, "seconds": time.monotonic() - begin}

    for number, text in enumerate(ready.windows):
        kept = load_or_compute(work_dir, f"before-{number}", partial(measure, text))
        found |= kept["perplexity"]
        seconds += kept["seconds"]
    return found, seconds


def _train(
    ready: Prepared, work_dir: WorkDir | None, seconds_to_measure: float
) -> tuple[nn.Module, Prepared, RecoverReport]:
    """Train; return the model, the settings with the rate it had, and what there is to report."""
    source, settings, watch = ready.source, ready.settings, ready.watch
    device = compute_device(settings.compute.device)
    sharded = settings.training.shard

    def load(which: Checkpoint) -> PreTrainedModel:
        with watch.stage("load"):
            return load_to_train(which, device, settings.compute.dtype, stays_on_cpu=sharded)

    model = load(source)
    dense = None if ready.teacher is None else load(ready.teacher)
    ready = with_own_chats(ready, dense, work_dir)
    usual = RELATIVE_RATES[settings.adaptation.method] * size_of_weights(model, ready.trained)
    rate = settings.training.learning_rate or float(f"{usual:.3g}")
    torch.manual_seed(settings.training.seed)
    adapted = attach(model, source.architecture, ready.trained, ready.rank_L)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if is_first_process():
        ranks = sorted({rank for rank in ready.rank_L if rank is not None})
        span = " to ".join(map(str, dict.fromkeys((*ranks[:1], *ranks[-1:]))))
        of_rank = f" of rank {span}" if span else ""
        taught = f", taught by {ready.teacher.label}" if ready.teacher is not None else ""
        blocks = counted(len(ready.rank_L), "blocks")
        logger.info(f"training {trainable:,d} parameters{of_rank} in {blocks}{taught}")

    # What merging, writing and loading again may take, by what loading took.
    later = watch.seconds["load"] + source.nbytes / BYTES_PER_SECOND + seconds_to_measure
    with watch.stage("train"), loss_inside(model, dense, settings.training.teacher_weight) as loss:
        if sharded:
            shard(adapted, model, source.architecture, device)
            if ready.teacher is not None and dense is not None:
                shard(dense, dense, ready.teacher.architecture, device)
        # What is trained is in float32.
        schedule = schedule_of(
            ready, 4 * trainable, MARGIN * later, thinks_once=loss.teacher_thinks_once
        )
        report = train(adapted, ready.at_rate(rate), schedule, loss)
        # Whole, on the CPU of the first process; all must ask.
        tensors = get_model_state_dict(adapted, options=WHOLE) if sharded else {}
    # A run that was killed had begun so much earlier.
    watch.add("train", ready.started - schedule.started)
    if tensors:
        # The parts of this process are not all: what was trained goes into the model as it was.
        del adapted, model
        adapted = attach(load(source), source.architecture, ready.trained, ready.rank_L)
        adapted.load_state_dict(tensors, strict=False)
    return adapted, ready.at_rate(schedule.rate_scale * rate), report


def _nothing_gained(report: RecoverReport, ready: Prepared) -> RecoveryError:
    before, *after = (entry["held_out"] for entry in report.history)
    rate = ready.settings.training.learning_rate
    return RecoveryError(
        f"training did not make the loss on held-out text lower ({before:.4f} before, "
        f"{min(after):.4f} at best in {counted(report.steps, 'steps')}), so nothing is written, "
        f"and {ready.source.label} is the best there is; give it a lower --learning-rate (it was "
        f"{rate:.3g}), more steps or minutes, or other text"
    )


def write_recovered_weights(
    source: Checkpoint, model: PreTrainedModel, trained: Collection[str], directory: Path
) -> dict[str, str]:
    """Write the trained weights of the model and all others byte for byte; return digests."""

    def value(name: str) -> torch.Tensor:
        tensor: torch.Tensor = model.get_parameter(name).detach()
        return tensor.to("cpu", source.parameters[name].dtype)

    changed = {name: source.parameters[name] for name in trained}
    outgoing = source.stored.outgoing(changed, value, source.config)
    assert outgoing.keys() == source.specs.keys()
    return write_shards(directory, outgoing)


def copy_everything_else(source: Checkpoint, directory: Path) -> None:
    """Copy config, modelling file, plan, tokenizer and the like."""
    copy_travelling_files(source.directory, directory)
    for name in (MODELING_FILE, PLAN_FILE):
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, directory / name)
    fields = read_plain_fields(source.directory)
    (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_record(
    ready: Prepared, report: RecoverReport, directory: Path, digests: dict[str, str], command: str
) -> None:
    """Write the manifest and the model card: those of the pruned model and how it was recovered."""
    settings, teacher = ready.settings, ready.teacher
    now = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), **{name: version(name) for name in ("accelerate", "peft")}},
    }
    recovery = {
        "adaptation": asdict(settings.adaptation),
        "training": asdict(settings.training),
        "teacher": teacher and {"name": teacher.label, "weight": settings.training.teacher_weight},
        "data": {
            "sources": ready.text.sources,
            "tokens_digest": ready.text.train.digest,
            "bos": ready.text.bos,
        },
        "device": str(compute_device(settings.compute.device)),
        "threads": torch.get_num_threads(),
        **asdict(report),
    }
    manifest = facts_about(ready.source)
    pruned = {key: manifest[key] for key in (*now, "files", "perplexity") if key in manifest}
    if not was_pruned(manifest):
        manifest = {
            "model_type": ready.source.config.model_type,
            "dequantised": dequantisation(ready.source),
            **manifest,
        }
    if earlier := recoveries(manifest):
        recovery["earlier"] = earlier
        pruned = manifest.get("pruned") or {}
    manifest |= {
        **now,
        "operation": "recover",
        "files": digests | digests_beside_weights(directory),
        "pruned": pruned,
        "recovery": recovery,
    }
    write_record(directory, manifest, plan_beside(directory), ready.source)
