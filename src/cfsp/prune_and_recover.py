"""Pruning with the best effort: then what is left is trained towards the dense model."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import before_training
from cfsp.checkpoint.reading import Checkpoint
from cfsp.decide import NOTHING_KNOWN, Known
from cfsp.errors import OutputError, ResumeError
from cfsp.pipeline import check_output, digest_of, prune_checkpoint, pruning_identity
from cfsp.processes import Team, process_count
from cfsp.quality.evaluate import evaluation_windows
from cfsp.recovery.data import read_text
from cfsp.recovery.prepare import lack_of_memory
from cfsp.recovery.settings import AUTO_TEACHER, RecoverSettings, Training
from cfsp.result.manifest import add_to_manifest, read_manifest
from cfsp.result.prune_report import PruneReport
from cfsp.selection.goal import held_out_windows
from cfsp.settings import MaxLossIncrease, PruneSettings
from cfsp.streaming.work_dir import directory_of_process, remove_finished_work, unfinished_in
from cfsp.text.drawing import draw_text
from cfsp.text.sources import name_of
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import digests_of

if TYPE_CHECKING:
    from cfsp.recovery.trainer import RecoverReport

log = logging.getLogger(__name__)

# So many of a text tell whether there is enough to learn from: of chats answers alone count.
_WINDOWS_TO_TRY = 512
# The digest of what a run was asked for, in the manifest of the pruned model that it trains.
_ASKED = "asked_digest"


def prune_and_recover(
    source: Checkpoint,
    out: Path,
    settings: PruneSettings,
    *,
    known: Known = NOTHING_KNOWN,
    command: str = "",
    team: Team | None = None,
) -> tuple[PruneReport, RecoverReport | None]:
    """Prune a checkpoint, then train the result once on the same texts towards the dense model.

    The pruned model stays in `OUT-pruned`. A call that was killed while it trained goes on there.
    Where one process has no memory for both models, it is not trained; people are told so.
    Perplexity is measured before and after each of the two.
    """
    compute, text = settings.compute, settings.text
    prune = partial(prune_checkpoint, source, command=command)
    # What training refuses is said before there is a pruned model.
    seqlen = min(text.seqlen, Training.seqlen)
    how = RecoverSettings(
        data=text.names,
        training=Training(seqlen=seqlen, seed=text.seed, bos=text.bos),
        teacher=AUTO_TEACHER,
        evaluation=settings.evaluation,
        # Training in float16 overflows.
        compute=replace(compute, dtype="auto") if compute.dtype == "float16" else compute,
    )
    step = "sequential repair" if settings.repairs else "no repair"
    pruned = before_training(out)
    if why := _why_not_trained(source, out, pruned, how):
        log.info("best effort: %s and no training, because %s", step, why)
        return prune(out, settings, known=known, team=team), None
    # It imports the Trainer, and with it much that pruning alone does without.
    from cfsp.recovery.recover import recover_checkpoint

    check_output(source, out)
    log.info("best effort: %s, then one pass of training towards the dense model", step)
    tokenizer, before = load_tokenizer(source.directory), _asked_of(pruned)
    if before is None:
        if _only_pruned(pruned):
            data = [word for name in map(name_of, text.names) for word in ("--data", name)]
            by = shlex.join(["cfsp", "recover", str(pruned), *data, "--out", str(out)])
            raise OutputError(
                f"{pruned} was pruned before, by another command: train it with `{by}`, or choose "
                "another --out"
            )
        check_output(source, pruned)
        most = _WINDOWS_TO_TRY * seqlen
        read_text(text.names, tokenizer, seqlen=seqlen, bos=text.bos, most=most)
    measured_on = evaluation_windows(settings.evaluation, source)
    if isinstance(settings.goal, MaxLossIncrease):
        measured_on[""] = held_out_windows(text, tokenizer)
    asked = digest_of(
        {
            "model": source.identity,
            "texts": digests_of(measured_on),  # the report asks for the perplexity of each by name
            "dtype": compute.dtype,
            "drawn": draw_text(text, tokenizer).digest,
            **pruning_identity(settings, known),
        }
    )
    if before not in (None, asked):
        left = [str(each) for each in (pruned, directory_of_process(out).parent) if each.is_dir()]
        raise ResumeError(
            f"{pruned} exists: another command, or another text, pruned it to train it; repeat "
            f"that command to train it, or start over with: {shlex.join(['rm', '-r', *left])}"
        )
    if before == asked:
        log.info("%s was pruned before by the same command; going on from it", pruned)
        remove_finished_work(pruned)
        report = PruneReport.of_checkpoint(pruned)
    else:
        report = prune(pruned, settings, known=replace(known, noted={_ASKED: asked}))
    if report.parameters_after == report.parameters_before:
        log.info("nothing was removed, so there is nothing to win back by training")
        add_to_manifest(pruned, {"out": str(out), _ASKED: None})
        pruned.rename(out)
        return replace(report, out=str(out)), None
    return report, recover_checkpoint(open_checkpoint(pruned), out, how, command=command)


def _only_pruned(pruned: Path) -> dict[str, Any] | None:
    """Return the manifest of a model that was pruned and not trained; None of anything else."""
    manifest = read_manifest(pruned) if pruned.is_dir() else None
    return manifest if manifest and manifest.get("operation") == "prune" else None


def _asked_of(pruned: Path) -> str | None:
    """Return what the run was asked for that pruned a model to train it; None if none did."""
    return (_only_pruned(pruned) or {}).get(_ASKED)


def _why_not_trained(source: Checkpoint, out: Path, pruned: Path, how: RecoverSettings) -> str:
    """Return why a pruned model is not trained; empty if it is.

    What memory decides stays as a killed run had it: another amount is free later.
    """
    if process_count() > 1:
        return "several processes prune together; cfsp recover trains what they give"
    work_dir, of_pruned = (directory_of_process(each).parent for each in (out, pruned))
    if _asked_of(pruned) is not None or unfinished_in(of_pruned):
        return ""
    if unfinished_in(work_dir):
        return f"{work_dir} holds unfinished work that was begun without"
    return lack_of_memory(source, source, how)
