"""Recovery end to end, on a tiny pruned model."""

import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from transformers.utils import logging

import cfsp
from builders import changed, edit_json, edit_tensors, entries, random_tokens, tensors
from cfsp.checkpoint.loading import torch_as_it_starts
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.cli import main
from cfsp.errors import RecoveryError, UsageError
from cfsp.quality.perplexity import loss_in_memory
from cfsp.recovery.adaptation import allocate_ranks, load_to_train
from cfsp.recovery.data import RecoveryText, WindowData, read_text
from cfsp.recovery.loss import IGNORED, loss_inside, multiplies_only
from cfsp.recovery.prepare import teacher_of, training_bytes
from cfsp.recovery.schedule import Schedule
from cfsp.recovery.settings import Adaptation, Limit, Method, RecoverSettings, Training
from cfsp.recovery.trainer import RecoveryTrainer, train
from cfsp.result.facts import perplexities, texts_that_made
from cfsp.result.making import making
from cfsp.result.manifest import history_of, read_manifest
from cfsp.settings import EvaluationText
from cfsp.text.drawing import consecutive_windows
from family_contract import save_with_tokenizer
from recovery.conftest import recover, training
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model, dense_configs

CPU = torch.device("cpu")


def size_of_projections(directory: Path) -> float:
    stored = tensors(directory).items()
    trained = [t.double().flatten() for name, t in stored if name.endswith("_proj.weight")]
    return float(torch.cat(trained).square().mean().sqrt())


@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-2), ("full", 4e-3)])
def test_training_helps_and_the_result_has_the_same_layout(
    pruned, recovered, text_file, tokenizer, tmp_path, out, method, rate
):
    report = recovered(
        training=training(16, learning_rate=rate),
        adaptation=Adaptation(method, rank=4),
        evaluation=EvaluationText((str(text_file),), 4, 64),
    )
    kept = entries(pruned) - {"cfsp.statistics"}
    assert entries(out) == kept
    for name in ("config.json", "modeling_cfsp.py", PLAN_FILE, "tokenizer.json"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes()
    measured = report.perplexity[str(text_file)]
    assert measured["after"] < 0.9 * measured["before"]
    windows = consecutive_windows(str(text_file), tokenizer, count=4, seqlen=64)
    found = math.exp(loss_in_memory(cfsp.load(out), windows))
    assert found == pytest.approx(measured["after"], rel=1e-4)
    conditions = {"windows": 4, "seqlen": 64, "tokens": 4 * 63, "bos": False}
    assert measured == measured | conditions
    assert entries(tmp_path) == {"out"}


def test_manifest_and_card_say_how_it_was_recovered(pruned, plain):
    manifest, before = (read_manifest(directory) for directory in (plain, pruned))
    assert (manifest["operation"], manifest["command"]) == ("recover", "cfsp recover pruned")
    assert manifest["pruned"]["command"] == before["command"]
    assert manifest["criterion"] == before["criterion"]
    recovery = manifest["recovery"]
    assert recovery["adaptation"]["allocation"] == "uniform"
    rate = pytest.approx(0.01 * size_of_projections(pruned), rel=0.01)
    assert recovery["training"]["learning_rate"] == rate
    assert [entry["step"] for entry in recovery["history"]] == [0, 3, 6]
    card = (plain / "README.md").read_text()
    assert f"{recovery['trainable_parameters']:,} parameters" in card


def test_what_was_pruned_in_memory_is_recovered_as_such(
    model, tokenizer, few, text_file, tmp_path, command
):
    saved, out = tmp_path / "saved", tmp_path / "out"
    pruned = cfsp.prune(cfsp.load(model), tokenizer, sparsity=0.5, multiple=4, **few)
    save_with_tokenizer(pruned, tokenizer, saved)
    recover(saved, out, text_file, teacher="auto", training=training(2, evaluations=1))
    manifest = read_manifest(out)
    assert manifest["recovery"]["teacher"]["name"] == str(model)
    assert [stage.verb for stage in making(manifest)] == ["pruned", "recovered"]
    assert "without 50.0% of FFN channels" in (out / "README.md").read_text()
    said = f"50.0% of FFN channels, 24.0% of parameters, from {model}"
    assert said in command("inspect", out).out


def test_what_was_recovered_before_stays_on_record(
    plain, recovered, text_file, other_text_file, out
):
    """The model stays pruned as it was, and the text of each recovery made it."""
    measured = EvaluationText((str(text_file),), 2, 32)
    recovered(plain, data=(str(other_text_file),), training=training(2), evaluation=measured)
    first, manifest = read_manifest(plain), read_manifest(out)
    assert manifest["pruned"] == first["pruned"]
    stages = making(manifest)
    assert [stage.verb for stage in stages] == ["pruned", "recovered", "recovered"]
    assert stages[:2] == making(first)
    assert texts_that_made(manifest) == {str(text_file), str(other_text_file)}
    (found,) = perplexities(manifest).values()  # that of the pruned model was not measured
    assert found == {"recovered": manifest["recovery"]["perplexity"][str(text_file)]["after"]}
    assert ", then on 8 windows, drawn from other.txt" in (out / "README.md").read_text()


def test_a_step_has_no_more_windows_than_the_text(recovered, plain):
    (text,) = read_manifest(plain)["recovery"]["data"]["sources"].values()
    report = recovered(training=training(1, batch_windows=10**6))
    assert report.tokens_in_step == text * 32


def test_one_process_trains_on_one_accelerator_of_several(recovered, noted, monkeypatch):
    """The Trainer would give each of them a batch of its own."""
    made = cfsp.recovery.trainer.training_arguments

    def of_two(*given: Any, **how: Any) -> Any:
        arguments = made(*given, **how)
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr(cfsp.recovery.trainer, "training_arguments", of_two)
    seen = noted(RecoveryTrainer, "training_step", lambda *given: len(given[2]["input_ids"]))
    recovered(training=training(1, evaluations=1))
    assert seen == [4]


def test_the_last_step_of_a_pass_counts_what_it_has(recovered, plain, noted, out):
    (windows,) = read_manifest(plain)["recovery"]["data"]["sources"].values()
    how = training(4, batch_windows=windows * 2 // 3)
    seen = noted(RecoveryTrainer, "training_step", lambda *given: given[2]["input_ids"].numel())
    report = recovered(training=how)
    assert report.tokens == sum(seen) == 2 * windows * 32 < 4 * seen[0]
    assert f"trained on {2 * windows:,} windows, drawn from" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_projections_change_and_ranks_follow_the_plan(pruned, recovered, out, method):
    names = {f"self_attn.{x}_proj" for x in "qkvo"}
    names |= {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    how = Adaptation(method, rank=5, allocation="importance")
    report = recovered(training=training(1, evaluations=1), adaptation=how)
    assert changed(pruned, out) == {
        f"model.layers.{block}.{name}.weight" for block in range(3) for name in names
    }
    units = cfsp.PruningPlan.load(pruned / PLAN_FILE).units
    ranks = allocate_ranks([unit.importance for unit in units], 5)
    assert report.ranks == (ranks if method == "lora" else [None] * 3)


@pytest.mark.parametrize(("dtype", "method"), [(torch.bfloat16, "lora"), (torch.float16, "full")])
def test_a_model_of_16_bits_is_trained_and_keeps_them(
    pruned, recovered, tmp_path, out, monkeypatch, dtype, method
):
    # As on a machine that multiplies bfloat16 natively.
    monkeypatch.setattr("cfsp.checkpoint.loading.is_native", lambda dtype, device: True)
    source = tmp_path / "source"
    shutil.copytree(pruned, source)
    halves = {k: v.to(dtype) for k, v in tensors(pruned).items()}
    edit_tensors(source / "model.safetensors", lambda found: found.update(halves))
    named = str(dtype).removeprefix("torch.")
    edit_json(source / "config.json", lambda fields: fields.update(dtype=named))
    # Every function for users is called so; autocast keeps cast weights up to its outermost end.
    with torch.autocast("cpu", torch.bfloat16), torch_as_it_starts():
        report = recovered(
            source,
            adaptation=Adaptation(method, rank=2),
            training=training(4, learning_rate=1e-2, evaluations=1),
        )
    assert {v.dtype for v in tensors(out).values()} == {dtype}
    assert changed(source, out)
    assert report.history[-1]["held_out"] < report.history[0]["held_out"]


def test_another_seed_gives_other_weights(recovered, out, plain):
    recovered(training=training(seed=1))
    assert changed(plain, out)


def test_checkpointing_changes_nothing_nor_what_others_set_of_a_trainer(recovered, plain):
    shown = logging.get_verbosity()
    AcceleratorState._reset_state(reset_partial_state=True)  # of the harness, where it came first
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        other = recovered(training=training(gradient_checkpointing=True))
        assert accelerator.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert logging.get_verbosity() == shown
    for a, b in zip(read_manifest(plain)["recovery"]["history"], other.history, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


# Capped and scaled logits, transposed matrices, biases and tied embeddings, and projections around
# the blocks. Of Llama's kind are all other tests.
KINDS = dense_configs("gemma2", "granite", "gpt2", "opt-projected")


@pytest.mark.parametrize("name", [*KINDS, "qwen2_moe"])
def test_every_kind_of_model_recovers_by_its_stock_loss(
    tiny_checkpoint, recovered, text_file, tokenizer, out, name
):
    dense = tiny_checkpoint(name)
    held_NT = read_text([str(text_file)], tokenizer, seqlen=32).held_out.token_NT
    with torch.inference_mode():
        stock = float(cfsp.load(dense)(input_ids=held_NT, labels=held_NT).loss.exp())
    how = training(3, evaluations=1, learning_rate=6e-3, teacher_weight=0.1)
    report = recovered(dense, training=how, teacher=str(dense))
    before, after = report.history
    # The teacher is the model itself: there is nothing to learn from it yet.
    assert before["held_out"] == pytest.approx(0.9 * math.log(stock), rel=1e-4)
    assert after["held_out"] < before["held_out"]
    assert changed(dense, out)
    assert cfsp.load(out)(input_ids=held_NT[:1]).logits.isfinite().all()
    card = (out / "README.md").read_text()  # of a checkpoint that cfsp did not prune
    assert "## How it was recovered" in card and "removed" not in card


@pytest.mark.parametrize("name", ["gpt2", "opt-projected", "falcon"])
def test_training_computes_without_dropout(tiny_checkpoint, save, name):
    # Falcon's usually has none, and it is read from the config in every step.
    of = save(tiny_model(name, hidden_dropout=0.1)) if name == "falcon" else tiny_checkpoint(name)
    source, tokens_BT = Checkpoint(of), torch.arange(2, 42)[None]
    usual = cfsp.load(source.directory).train()
    model = load_to_train(source, CPU, "auto", stays_on_cpu=True)
    expected = model(tokens_BT).logits
    assert torch.equal(model.train()(tokens_BT).logits, expected)
    assert not torch.equal(usual(tokens_BT).logits, expected)


def test_only_models_whose_logits_are_a_product_are_sliced(tiny_checkpoint):
    assert multiplies_only(cfsp.load(tiny_checkpoint("llama")))
    capped = cfsp.load(tiny_checkpoint("gemma2"))
    assert not multiplies_only(capped)
    # Asking leaves the model as it was.
    assert capped(input_ids=torch.tensor([[0, 1]])).logits.shape[-1] == 320


def test_the_less_there_is_to_learn_the_lower_the_rate(recovered, pruned, model, out):
    """A KL grows with the square of the way, and the way of Adam is its rate's."""
    full, teacher = Adaptation("full"), str(model)
    report = recovered(adaptation=full, teacher=teacher, training=training(2, evaluations=1))
    assert report.history[-1]["held_out"] < report.history[0]["held_out"]
    weights, manifest = tensors(out), read_manifest(out)
    assert manifest["recovery"]["teacher"] == {"name": teacher, "weight": 1}
    lost = report.history[0]["held_out"]
    assert 0 < lost < 1
    rate = manifest["recovery"]["training"]["learning_rate"]
    expected = 0.001 * size_of_projections(pruned) * math.sqrt(lost)
    assert rate == pytest.approx(expected, rel=0.01)
    shutil.rmtree(out)
    how = training(2, evaluations=1, learning_rate=rate)
    recovered(adaptation=full, teacher=teacher, training=how)
    again = tensors(out)
    assert all(torch.allclose(again[name], weights[name], atol=1e-7) for name in weights)


def name_of_teacher(given: str, source: Path, tokenizer: Any) -> str | None:
    settings = RecoverSettings((), training(1), Adaptation("full"), given)
    found = teacher_of(settings, open_checkpoint(source), tokenizer, None)
    return found and found.label


def test_the_dense_model_teaches_where_it_is_at_hand(
    pruned, tiny_checkpoint, tokenizer, tmp_path, monkeypatch, caplog, noted
):
    dense, other = str(tiny_checkpoint("llama")), str(tiny_checkpoint("qwen2"))
    opened = noted(cfsp.recovery.prepare, "open_checkpoint", lambda name: name)
    assert name_of_teacher("auto", pruned, tokenizer) == dense
    assert name_of_teacher(str(pruned), pruned, tokenizer) == str(pruned)
    assert name_of_teacher("none", pruned, tokenizer) is None
    assert caplog.messages == []
    # A model that was not pruned has none, which may be a mistake.
    assert name_of_teacher("auto", Path(dense), tokenizer) is None
    (told,) = caplog.messages
    assert told == (
        f"training on the text alone, because nothing says what {dense} was pruned from: give the "
        "dense model to --teacher, or none"
    )
    # Another model is in its place, or none.
    moved = tmp_path / "moved"
    shutil.copytree(pruned, moved)
    for name, reason in ((other, "is another model"), ("/no/such", "/no/such does not exist")):
        named = {"name": name}
        edit_json(moved / MANIFEST_FILE, lambda fields, of=named: fields["base_model"].update(of))
        assert name_of_teacher("auto", moved, tokenizer) is None
        assert reason in caplog.text
    assert opened.count(other) == opened.count("/no/such") == 1
    # Its path was typed in another directory, and the directory of this one has another model.
    (tmp_path / "near").symlink_to(dense)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("near").symlink_to(other)
    edit_json(moved / MANIFEST_FILE, lambda fields: fields["base_model"].update(name="near"))
    assert name_of_teacher("auto", moved, tokenizer) == str(tmp_path / "near")
    # Of one that was pruned twice it is the first; else what was pruned between.
    again = {"base_model": {"name": str(pruned), "fingerprint": Checkpoint(pruned).fingerprint}}
    history = history_of(Checkpoint(pruned))
    assert history["made_from"]["name"] == dense
    again["base_model"] |= history
    edit_json(moved / MANIFEST_FILE, lambda of: of.update(again))
    assert name_of_teacher("auto", moved, tokenizer) == dense
    edit_json(moved / MANIFEST_FILE, lambda of: of["base_model"]["made_from"].update(name=other))
    assert name_of_teacher("auto", moved, tokenizer) == str(pruned)
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    assert name_of_teacher("auto", pruned, tokenizer) is None
    assert "1e-06 GB are available" in caplog.text


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_dense_model_teaches_where_there_is_memory_for_it(
    pruned, tokenizer, model, monkeypatch, caplog, method
):
    source, dense = open_checkpoint(pruned), open_checkpoint(model)
    settings = RecoverSettings((), training(1), Adaptation(method), teacher="auto")
    needed = training_bytes(source, dense, settings, CPU)
    for free, teaches in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda free=free: free)
        found = teacher_of(settings, source, tokenizer, None)
        assert (found is not None) == teaches
    assert f"training beside {dense.label} takes about" in caplog.text


def test_what_training_takes_follows_from_shapes(pruned, model):
    """Weights, 16 bytes for each that is trained itself, and what a step keeps of each token."""
    source, dense = open_checkpoint(pruned), open_checkpoint(model)
    blocks, hidden = source.architecture.block_count, source.config.hidden_size
    widths = sum(unit.width for unit in source.units)

    def taken(method: Method = "lora", **how: Any) -> float:
        settings = RecoverSettings((), training(1, **how), Adaptation(method))
        return training_bytes(source, dense, settings, CPU)

    weights = 4 * (source.parameter_count + dense.parameter_count)
    step = 4 * 32 * (14 * hidden * blocks + 5.5 * widths)
    per_window = training(1).batch_windows * step
    assert taken() == pytest.approx(1e9 + weights + per_window)
    assert taken("full") - taken() == 12 * sum(parameters_of_blocks(source))
    assert taken(batch_windows=1) == pytest.approx(1e9 + weights + step)
    assert taken(gradient_checkpointing=True) < taken()
    alone = training_bytes(source, None, RecoverSettings((), training(1)), CPU)
    assert taken() - alone == 4 * dense.parameter_count


@pytest.mark.parametrize("batch_windows", [1, 7])
def test_held_out_loss_is_the_mean_over_labels(tmp_path, batch_windows):
    model = build_tiny_model("llama")
    token_NT = random_tokens(6, 32)
    label_NT = token_NT.clone()
    # As in conversations: of some windows few labels count.
    label_NT[0, 2:] = label_NT[3, 3:] = label_NT[4, 2:] = IGNORED
    held_out = WindowData(token_NT, label_NT)
    logit_NTV = model(token_NT).logits.detach()
    expected = cross_entropy(logit_NTV[:, :-1].flatten(0, 1), held_out.label_NT[:, 1:].flatten())
    text = RecoveryText(WindowData(token_NT, token_NT), held_out, {}, bos=False)
    how = training(1, batch_windows=batch_windows, learning_rate=1e-3)
    with loss_inside(model) as loss:
        place = {"out": tmp_path / "o", "identity": {}, "rank_L": []}
        settings = SimpleNamespace(training=how)
        ready: Any = SimpleNamespace(text=text, settings=settings, **place)
        found = train(model, ready, Schedule(1, 2, time.monotonic()), loss)
    assert found.history[0]["held_out"] == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_thinks_once_of_windows_that_come_again():
    model, teacher = build_tiny_model("llama"), build_tiny_model("llama")
    token_BT = random_tokens(2, 16)
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    with loss_inside(model, teacher, 1.0) as loss:
        calls.clear()
        # Twice in one evaluation: another process may have had other windows. Then a step.
        order = (True, True, False, True, True)
        asked: list[Any] = [loss.ask(token_BT, again=again) for again in order]
        assert len(calls) == 3
        assert all(torch.equal(each.output_ND, asked[0].output_ND) for each in asked)
        other: Any = loss.ask(token_BT.flip(0), again=True)
        assert not torch.equal(other.output_ND, asked[0].output_ND)
        assert len(calls) == 4


def test_a_checkpoint_that_cfsp_did_not_prune_has_no_importance(model, recovered):
    by_importance = Adaptation(rank=2, allocation="importance")
    with pytest.raises(RecoveryError, match="recover it with --rank-allocation uniform"):
        recovered(model, adaptation=by_importance)


def test_what_is_typed_reaches_recovery(pruned, text_file, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}

    def note(source: Any, out: Any, settings: RecoverSettings, **_: Any) -> SimpleNamespace:
        seen.update(vars(settings), trains=torch.is_grad_enabled())
        return SimpleNamespace()

    monkeypatch.setattr("cfsp.recovery.recover.recover_checkpoint", note)
    argv = ["recover", str(pruned), "--out", str(tmp_path / "o"), "--data", str(text_file)]
    argv += ["--steps", "3", "--rank", "4", "--gradient-checkpointing", "--set", "seed=2"]
    argv += ["--eval", str(text_file), "--set", "bos=no"]
    monkeypatch.setattr("cfsp.cli.recover.print_report", lambda report: None)
    assert main(argv) == 0
    assert seen["adaptation"] == Adaptation(rank=4)
    limit = Limit(steps=3)
    assert seen["training"] == Training(limit, seed=2, gradient_checkpointing=True, bos="no")
    assert seen["evaluation"] == EvaluationText((str(text_file),), bos="no")  # as by cfsp prune
    seen.clear()
    with torch.no_grad():  # as evaluation code has it around much
        cfsp.recover(pruned, out="o", data=[text_file], steps=3, rank=4, seed=2)
    assert seen["training"] == Training(limit, seed=2) and seen["trains"]
    with pytest.raises(UsageError, match="unknown argument sed; did you mean seed"):
        cfsp.recover(pruned, out="o", data=[text_file], steps=3, sed=2)
