"""Ridge repair: the Gram matrix and the solve against NumPy, never worse, the same in one pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import cfsp
from builders import (
    changed,
    draw_windows,
    edit_json,
    entries,
    job_of,
    never,
    plan_keeping,
    read_json,
    stop,
    stopped_at,
)
from cfsp.checkpoint.reading import Checkpoint
from cfsp.decide import Known
from cfsp.errors import ResumeError, TextError
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.candidate import Dropped
from cfsp.repair.result import PruningResult
from cfsp.repair.ridge import (
    PANEL,
    GramSums,
    add_to_diagonal,
    descend,
    factor,
    lower_panels,
    repair_down_projection,
    solve,
)
from cfsp.repair.ridge_pass import repair_by_plans
from cfsp.result.manifest import read_manifest
from cfsp.settings import Budget, Compute, PruneSettings
from cfsp.settings.pruning import prune_settings
from cfsp.streaming.work_dir import WorkDir


def correlated(rows: int, channels: int, seed: int) -> torch.Tensor:
    """Activations of which some can be predicted from others."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, channels // 2, generator=generator)
    mixing = torch.randn(channels // 2, channels, generator=generator)
    return hidden @ mixing + 0.3 * torch.randn(rows, channels, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 7, 50, 64])
def test_gram_is_the_mean_of_outer_products(dtype, channels):
    act_RF = torch.randn(40, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = GramSums()
    sums.add(act_RF[:13])
    sums.add(act_RF[13:])
    exact = act_RF.double().numpy()
    np.testing.assert_allclose(sums.mean().numpy(), exact.T @ exact / 40, rtol=1e-5, atol=1e-5)


def test_gram_leaves_the_global_precision_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    GramSums().add(torch.ones(4, 8, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@given(size=st.integers(1, 1100), seed=st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_panels_hold_the_lower_triangle_and_factor_and_solve_as_torch_does(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator)
    gram = root @ root.T / size
    gram = gram.triu() + gram.triu(1).T  # a product need not be symmetric to the last bit
    kept = torch.randperm(size, generator=generator)[: max(1, size * 2 // 3)].sort().values
    matrix = gram.double()[kept][:, kept] + 0.5 * torch.eye(len(kept), dtype=torch.float64)
    right = torch.randn(len(kept), 3, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, right)
    panels = lower_panels(gram, kept)
    add_to_diagonal(panels, 0.5)
    for start, panel in zip(range(0, len(kept), PANEL), panels, strict=True):
        torch.testing.assert_close(panel, matrix[start:, start : start + PANEL])
    assert factor(panels)
    expected = torch.linalg.cholesky(matrix)
    for start, panel in zip(range(0, len(kept), PANEL), panels, strict=True):
        lower = expected[start:, start : start + PANEL]
        torch.testing.assert_close(panel.tril(), lower, rtol=0, atol=1e-9)
    solve(panels, right)
    torch.testing.assert_close(right, solution, rtol=0, atol=1e-8)


def test_what_is_not_positive_definite_is_refused():
    assert not factor(lower_panels(torch.diag(torch.tensor([1.0, -1.0, 1.0])), torch.arange(3)))


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_solution_is_the_formula(ridge):
    act = correlated(400, 24, seed=1)
    down = torch.randn(10, 24, generator=torch.Generator().manual_seed(2))
    kept = list(range(0, 24, 2))
    gram = act.T @ act / len(act)
    solution = repair_down_projection(down, kept, gram, correlated(400, 24, 1), (ridge,))

    # W' = W_K + W_P G_PK (G_KK + lambda mean(diag G_KK) I)^-1, in NumPy
    g, w, k = gram.double().numpy(), down.double().numpy(), np.array(kept)
    p = np.setdiff1d(np.arange(24), k)
    system = g[np.ix_(k, k)]
    system = system + ridge * system.diagonal().mean() * np.eye(len(k))
    expected = w[:, k] + w[:, p] @ g[np.ix_(p, k)] @ np.linalg.inv(system)

    assert solution.ridge == ridge
    np.testing.assert_allclose(solution.down_DK.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert solution.error_after < 0.5 * solution.error_before


@pytest.mark.parametrize("best", range(5))
def test_the_best_strength_is_found_by_few_tries(best):
    tried = []

    def error_with(number: int) -> float:
        tried.append(number)
        return float(abs(number - best))

    descend(error_with, 5)
    assert tried[0] == 2
    assert best in tried
    # One more on each side at most; below the first, none when something above it was better.
    assert len(tried) == len(set(tried)) <= abs(best - 2) + (2 if best > 2 else 3)


def test_errors_are_relative_squared_errors_of_the_output():
    act, down = correlated(50, 12, seed=3), torch.randn(4, 12)
    kept = [0, 3, 4, 8, 11]
    solution = repair_down_projection(down, kept, act.T @ act / 50, act, (0.01,))
    target = act @ down.T
    for weights, error in (
        (down[:, kept], solution.error_before),
        (solution.down_DK, solution.error_after),
    ):
        lost = (act[:, kept] @ weights.T - target).square().sum() / target.square().sum()
        assert error == pytest.approx(float(lost), rel=1e-4)


@given(seed=st.integers(0, 1000), keep=st.integers(1, 16))
@settings(max_examples=30, deadline=None)
def test_never_worse_on_held_out_tokens(seed, keep):
    # Unrelated held-out activations: what was fitted cannot help there.
    fitted = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed))
    held_out = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed + 1))
    down = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed + 2)).bfloat16()
    kept = list(range(keep))  # in the end all, with nothing to repair
    solution = repair_down_projection(down, kept, fitted.T @ fitted / 20, held_out)
    assert solution.error_after <= solution.error_before
    assert solution.down_DK.dtype == down.dtype
    if solution.ridge is None:
        assert torch.equal(solution.down_DK, down[:, kept])
        assert solution.error_after == solution.error_before


@pytest.fixture
def by_plan(pruned, model, tmp_path, command) -> Callable[..., Path]:
    """Prunes by the plan of `pruned`, which the ridge repaired."""

    def prune(*options: object) -> Path:
        plan = ["--plan", pruned / "cfsp_plan.json", *options, "--out", tmp_path / "out"]
        command("prune", model, *plan)
        return tmp_path / "out"

    return prune


def test_only_down_projections_change(pruned, by_plan):
    repaired = changed(by_plan("--repair", "none"), pruned)
    assert repaired
    assert all(name.endswith("mlp.down_proj.weight") for name in repaired)
    (step,) = read_manifest(pruned)["repair"]["steps"]
    assert step["name"] == "ridge"
    blocks = step["blocks"]
    assert len(repaired) == sum(block["kept"] for block in blocks)
    assert all((block["strength"] is not None) == block["kept"] for block in blocks)
    assert all(block["error_after"] <= block["error_before"] for block in blocks)


def test_a_plan_made_before_is_repaired_by_a_pass_of_its_own(pruned, by_plan, text_file):
    found = by_plan("--data", text_file, "--samples", 8, "--seqlen", 32)
    assert not changed(pruned, found)


def test_one_pass_repairs_what_several_plans_leave(source, text_file, tokenizer, tmp_path):
    """Each as a pass for it alone does, and as a run that is resumed finds it."""
    windows = draw_windows([str(text_file)], tokenizer, samples=6, seqlen=32)
    asked = PruneSettings(Budget(), compute=Compute("cpu", "float32"))

    def ridged(name: str, *plans: cfsp.PruningPlan) -> list[PruningResult]:
        work_dir = WorkDir(tmp_path / name, identity={"command": "test"})
        job = job_of(source, asked, work_dir=work_dir)
        return repair_by_plans(job, [PruningResult(plan) for plan in plans], windows)

    plans = [
        plan_keeping(source, [tuple(range(0, u.width, every)) for u in source.units], dropped)
        for every, dropped in ((2, Dropped()), (3, Dropped()), (2, Dropped((1,))))
    ]
    together = ridged("together", *plans)
    for number, found in enumerate(together):
        (alone,) = ridged(str(number), plans[number])
        assert found.plan == alone.plan
        assert found.steps == alone.steps
        assert found.tensors.keys() == alone.tensors.keys() != set()
        for name, tensor in found.tensors.items():
            assert torch.equal(tensor.read(), alone.tensors[name].read())
    assert [step["blocks"][1] is None for (step,) in (each.steps for each in together)] == [
        False, False, True,
    ]  # fmt: skip
    assert ridged("together", *plans) == together


def test_one_window_is_too_little_which_is_said_before_any_pass(model, few, tmp_path, monkeypatch):
    both, one = "ffn,blocks", {**few, "samples": 1}
    made = cfsp.calibrate(model, parts=both, **few)
    monkeypatch.setattr("cfsp.streaming.block_pass.stream_blocks", never)
    for each in ({"sparsity": 0.4}, {"parts": "blocks", "remove": 1}):
        with pytest.raises(TextError, match="at least 2 windows"):
            cfsp.prune(model, out=tmp_path / "out", **each, **one)
    settings, known = prune_settings({"parts": both, "target_params": 0.8, **one}), Known(made)
    with pytest.raises(TextError, match="at least 2 windows"):
        prune_checkpoint(Checkpoint(model), tmp_path / "out", settings, known=known)


# Training after it.


@pytest.fixture(autouse=True)
def two_evaluations(monkeypatch) -> None:
    monkeypatch.setattr("cfsp.recovery.schedule._MOST_EVALUATIONS", 2)


@pytest.fixture
def arguments(model, text_file, tmp_path) -> list[str]:
    """Prune a model by a short text of the test's own."""
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    windows = ["--data", str(text), "--samples", "8", "--seqlen", "64"]
    out = ["--out", str(tmp_path / "out")]
    return ["prune", str(model), "--sparsity", "0.5", "--multiple", "4", *windows, *out]


def test_best_effort_trains_and_goes_on_after_a_kill(
    arguments, tiny_checkpoint, tmp_path, command, monkeypatch
):
    out, pruned, text = (tmp_path / name for name in ("an out", "an out-pruned", "a text.txt"))
    (tmp_path / "text.txt").rename(text)
    # The dense model that teaches is the revision that is pruned, not what the hub has now.
    revisions = {"v1/a": tiny_checkpoint("llama"), None: tiny_checkpoint("qwen2")}

    def download(name: str, revision: str | None, **_: object) -> str:
        assert name == "owner/tiny"
        return str(revisions[revision])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    arguments = ["prune", "owner/tiny@v1/a", *arguments[2:], "--effort", "best"]
    for flag, path in (("--data", text), ("--out", out)):
        arguments[arguments.index(flag) + 1] = str(path)
    with monkeypatch.context() as patch:
        patch.setattr("cfsp.recovery.recover.recover_checkpoint", stop)
        command(*arguments, status=130)
    assert not out.exists()
    before = (pruned / "model.safetensors").stat().st_mtime_ns
    Path(f"{out}.work").mkdir()  # of a run that was killed later
    # Another command does not take what this one left.
    assert f"{pruned} exists" in (told := command(*arguments, "--seed", 1, status=2).err)
    assert f"start over with: rm -r '{pruned}' '{out}.work'" in told
    # Nor does the same with another text in the file.
    content = text.read_bytes()
    text.write_bytes(content[1_000:])
    assert f"{pruned} exists" in command(*arguments, status=2).err
    text.write_bytes(content)
    # Nor one without what this version notes.
    whole = (pruned / "cfsp.json").read_text()
    edit_json(pruned / "cfsp.json", lambda fields: fields.pop("goal"))
    assert f"{pruned / 'cfsp.json'} is damaged" in command(*arguments, status=2).err
    # Nor one of another command, which noted nothing.
    edit_json(pruned / "cfsp.json", lambda fields: fields.pop("asked_digest"))
    said = f"train it with `cfsp recover '{pruned}' --data '{text}' --out '{out}'`"
    assert said in command(*arguments, status=2).err
    (pruned / "cfsp.json").write_text(whole)
    found = json.loads(command(*arguments, "--json").out)
    assert (pruned / "model.safetensors").stat().st_mtime_ns == before
    assert found["ffn_sparsity"] == 0.5 and found["out"] == str(out)
    first, *_, last = found["recovery"]["history"]
    assert last["held_out"] < first["held_out"]
    manifest, card = read_manifest(out), ModelCard.load(out / "README.md")
    steps = read_manifest(pruned)["repair"]["steps"]
    assert [step["name"] for step in steps] == ["ridge", "sequential"]
    assert manifest["recovery"]["adaptation"]["method"] == "lora"
    assert manifest["base_model"]["name"] == "owner/tiny@v1/a"
    assert manifest["recovery"]["teacher"]["name"] == "owner/tiny@v1/a"
    assert card.data.base_model == "owner/tiny"
    assert "[owner/tiny@v1/a](https://huggingface.co/owner/tiny/tree/v1/a)" in card.text


def test_best_effort_without_blocks_goes_on_after_a_kill(model, text_file, tmp_path):
    """The blocks are chosen from fewer windows than are drawn."""
    out, text = tmp_path / "out", cfsp.Text("some", text_file.read_text()[:4_000])
    asked: dict[str, Any] = {"parts": "blocks", "remove": 1, "data": text, "effort": "best"}
    asked |= {"samples": 12, "seqlen": 64, "eval": text, "windows": 2}
    stopped_at("cfsp.recovery.recover.recover_checkpoint", cfsp.prune, model, out=out, **asked)
    with pytest.raises(ResumeError, match="out-pruned exists"):  # a report is by the names of texts
        cfsp.prune(model, out=out, **asked | {"eval": cfsp.Text("another", text.documents)})
    report = cfsp.prune(model, out=out, **asked)
    assert report.out == str(out)  # what was trained, and not what was pruned before
    assert read_manifest(out)["recovery"]["steps"]
    manifest = read_manifest(out)
    of_pruning, of_training = (each["perplexity"] for each in (manifest, manifest["recovery"]))
    assert of_pruning["some"]["after"] == of_training["some"]["before"]
    after = {"after": of_training["some"]["after"]}  # also of what lies there
    assert report.perplexity["some"] == of_pruning["some"] | after != of_pruning["some"]


def test_best_effort_takes_no_finished_model_for_what_a_killed_run_left(
    arguments, tmp_path, command
):
    out, pruned, kept = tmp_path / "out", tmp_path / "out-pruned", tmp_path / "kept"
    arguments += ["--effort", "best"]
    command(*arguments)
    out.rename(kept)
    said = command(*arguments, "--seed", 1, status=2).err
    assert (
        f"to train it; repeat that command to train it, or start over with: rm -r {pruned}" in said
    )
    assert said.rstrip().endswith(str(pruned))  # and not of work that isn't there
    pruned.rename(tmp_path / "aside")
    kept.rename(pruned)  # as by `--out out-pruned`
    for more in ([], ["--seed", 1]):
        assert f"{pruned} exists and is not empty" in command(*arguments, *more, status=2).err


def test_best_effort_where_nothing_goes_trains_nothing(arguments, model, tmp_path, command):
    arguments[3] = "0"
    assert "recovery" not in json.loads(command(*arguments, "--effort", "best", "--json").out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}
    assert read_json(tmp_path / "out" / "cfsp.json")["out"] == "out"  # not out-pruned
    assert not changed(model, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out-pruned")
    assert "was pruned before, by another" in command(*arguments, "--effort", "best", status=2).err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seqlen", 7), "--seqlen must be at least 8"),
        (("--data", "short.txt"), "1 windows of 64 tokens to learn from"),
    ],
)
def test_best_effort_refuses_what_cannot_be_learnt_from_before_it_prunes(
    more, said, arguments, tokenizer, text_file, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    some = tokenizer(text_file.read_text()[:2_000])["input_ids"][:96]
    (tmp_path / "short.txt").write_text(tokenizer.decode(some))
    before = sorted(tmp_path.iterdir())
    assert said in command(*arguments, *more, "--effort", "best", status=2).err
    assert sorted(tmp_path.iterdir()) == before


def test_best_effort_reads_no_text_for_an_output_that_cannot_be(
    arguments, model, tmp_path, command, monkeypatch
):
    for reader in ("evaluation_windows", "draw_text", "held_out_windows"):
        monkeypatch.setattr(f"cfsp.prune_and_recover.{reader}", never)
    (tmp_path / "out-pruned").mkdir()
    (tmp_path / "out-pruned" / "notes.txt").write_text("mine")
    arguments += ["--effort", "best"]
    assert "out-pruned exists and is not empty" in command(*arguments, status=2).err
    arguments[-3] = f"{model}/new"
    assert f"{model}/new lies inside the source" in command(*arguments, status=2).err


def test_best_effort_without_room_is_not_trained(
    model, tiny_checkpoint, few, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    caplog.set_level("INFO", logger="cfsp")
    choices: Any = {"sparsity": 0.5, "multiple": 4, "effort": "best"}
    report = cfsp.prune(model, out=tmp_path / "out", **choices, **few)
    assert [step["name"] for step in report.repair["steps"]] == ["ridge", "sequential"]
    assert "sequential repair and no training, because training beside" in caplog.text
    mixtral = tiny_checkpoint("mixtral")
    choices = {"parts": "experts", "sparsity": 0.5, "effort": "best"}
    assert not cfsp.prune(mixtral, out=tmp_path / "fewer", **choices, **few).repair["steps"]
    assert "no repair and no training, because training beside" in caplog.text


@pytest.mark.parametrize(
    ("at_first", "killed_at", "later", "left"),
    [
        # As soon as it has pruned: its work directory is still there.
        ("", "cfsp.streaming.work_dir._remove", "too little", {"out", "out-pruned"}),
        ("too little", "cfsp.pipeline._write_checkpoint", "", {"out"}),
    ],
)
def test_best_effort_goes_on_as_memory_had_decided(
    model, few, text_file, tmp_path, monkeypatch, at_first, killed_at, later, left
):
    """Free memory is another one later: what was begun to train is trained, and nothing else."""
    text = cfsp.Text("some", text_file.read_text()[:4_000])
    asked: Any = {"sparsity": 0.5, "multiple": 4, "effort": "best", "out": tmp_path / "out"}
    asked |= few | {"data": text}
    monkeypatch.setattr("cfsp.prune_and_recover.lack_of_memory", lambda *_: at_first)
    stopped_at(killed_at, cfsp.prune, model, **asked)
    monkeypatch.setattr("cfsp.prune_and_recover.lack_of_memory", lambda *_: later)
    cfsp.prune(model, **asked)
    assert ("recovery" in (read_manifest(tmp_path / "out") or {})) == bool(later)
    assert entries(tmp_path) == left


def test_best_effort_says_of_each_number_how_it_was_computed(model, few, text_file, tmp_path):
    """Training in float16 overflows, so it takes another dtype than the pruning had."""
    text = cfsp.Text("some", text_file.read_text()[:4_000])
    asked: Any = {"sparsity": 0.5, "multiple": 4, "effort": "best", "out": tmp_path / "out"}
    asked |= few | {"data": text, "eval": text, "windows": 2}
    report = cfsp.prune(model, dtype="float16", **asked)
    assert report.perplexity["some"]["dtype"] == "float16, then float32"
