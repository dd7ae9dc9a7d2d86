"""How many experts go beside other parts: as many as change the predictions least."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.stored_blocks import parameters_of_an_expert
from cfsp.cli import main
from cfsp.errors import UsageError
from cfsp.planning.numbers_to_try import experts_to_try
from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.removal_budget import RemovedWhole
from cfsp.settings import Budget, Part
from cfsp.whole_model import removal_trial
from cfsp.whole_model.divergence import dense_predictions, few_beginnings
from cfsp.whole_model.removal_trial import Trial, worth_a_repair
from family_contract import save_with_tokenizer
from tiny_decoders import tiny_model

SETTINGS: dict[str, Any] = {"samples": 6, "seqlen": 32, "device": "cpu", "multiple": 8}
STAYS = 0.6


@dataclass(frozen=True)
class Asked:
    """A type, what its config says besides, what may go, and the numbers that are tried."""

    model_type: str
    values: dict[str, Any]
    parts: str
    experts: list[int]


# With a shared expert; with a dense first block, groups of experts and latent attention.
CASES = {
    "mixtral": Asked("mixtral", {"num_hidden_layers": 4}, "blocks,experts", [0, 1, 2]),
    "qwen2_moe": Asked("qwen2_moe", {}, "ffn,experts", [0, 1, 2]),
    "deepseek_v3": Asked(
        "deepseek_v3",
        {"num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        "ffn,attention,blocks,experts",
        [0, 2, 4],
    ),
}


def saved(place: Path, asked: Asked, tokenizer: Any) -> Path:
    save_with_tokenizer(tiny_model(asked.model_type, **asked.values), tokenizer, place)
    return place


def command(source: Path, parts: str, text: Path, out: Path, *more: str) -> list[str]:
    flags = [f"--{name}={SETTINGS[name]}" for name in ("samples", "seqlen", "device")]
    size = ["--target-params", str(STAYS), "--set", "multiple=8", "--dtype", "float32"]
    where = ["--parts", parts, "--data", str(text), "--out", str(out)]
    return ["prune", str(source), *where, *flags, *size, *more]


@pytest.mark.parametrize("name", CASES)
def test_the_nearest_of_all_that_were_tried_is_chosen(
    name: str,
    tokenizer: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is masked is what is cut, and a number that was chosen is one that can be given."""
    asked = CASES[name]
    source = saved(tmp_path / "dense", asked, tokenizer)
    tried: list[Trial] = []
    seen: list[torch.Tensor] = []
    original = removal_trial.tried

    def note(*args: Any) -> list[Trial]:
        seen.append(few_beginnings(args[2]).tokens_NT)
        tried.extend(original(*args))
        return tried

    monkeypatch.setattr(removal_trial, "tried", note)
    out = tmp_path / "out"
    assert main(command(source, asked.parts, text_file, out, "--effort", "fast")) == 0
    told = re.findall(
        r"^(\d+) experts? of each block.*: divergence ([\d.]+)( \(chosen\))?$",
        capsys.readouterr().err,
        re.MULTILINE,
    )
    best = min(tried, key=lambda trial: trial.divergence)
    assert told == [
        (str(each.removed.experts), f"{each.divergence:.4f}", " (chosen)" if each is best else "")
        for each in tried
    ]
    assert list(dict.fromkeys(each.removed.experts for each in tried)) == asked.experts
    plan = PruningPlan.load(out / PLAN_FILE)
    assert len(plan.removed_blocks) + len(plan.removed_attentions) == best.count
    manifest = json.loads((out / MANIFEST_FILE).read_text())
    assert ("experts" in manifest) == bool(best.removed.experts)

    dense = cfsp.load(source)
    with torch.inference_mode():
        expected = [dense_predictions(dense, tokens_T[None]) for tokens_T in seen[0]]
    most = max(tried, key=lambda trial: trial.removed.experts)
    given = dict(zip(("remove_blocks", "remove_attentions"), _counts(asked, most), strict=False))
    report = cfsp.prune(
        source, out=tmp_path / "given", parts=asked.parts, remove_experts=most.removed.experts,
        sparsity=most.sparsity, repair="none", data=[str(text_file)], dtype="float32",
        **given, **SETTINGS,
    )  # fmt: skip
    experts = {unit.ffns for unit in report.plan.units if unit.ffns > 1}
    assert experts == {most.removed.experts + (report.plan.kept_experts or 0)}
    for trial, directory in ((best, out), (most, tmp_path / "given")):
        with torch.inference_mode():
            cut = cfsp.load(directory)
            found = sum(each.divergence(cut) for each in expected) / len(expected)
        assert found == pytest.approx(trial.divergence, abs=1e-5)
    assert main(["verify", str(out)]) == 0


def _counts(asked: Asked, trial: Trial) -> list[int]:
    """Return how many blocks and attentions go in a trial where all that goes is blocks."""
    if "blocks" not in asked.parts:
        return []
    return [trial.count, 0] if "attention" in asked.parts else [trial.count]


@pytest.fixture(scope="module")
def alike(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts are all the same, so that whole ones are not missed at all."""
    model = tiny_model("mixtral", num_hidden_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.copy_(parameter[:1].expand_as(parameter))
    place = tmp_path_factory.mktemp("alike") / "dense"
    save_with_tokenizer(model, tokenizer, place)
    return place


def test_experts_that_are_not_missed_go_and_a_killed_run_keeps_the_choice(
    alike: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = command(alike, "ffn,experts", text_file, tmp_path / "out")
    with monkeypatch.context() as killed:
        killed.setattr("cfsp.repair.ladder.choose_and_repair", _interrupted)
        assert main(asked) == 130
    monkeypatch.setattr(removal_trial, "tried", _never)
    monkeypatch.setattr("cfsp.repair.trial.repair_by_plan", _never)
    assert main(asked) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 2


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("it was tried again")


def test_a_sweep_chooses_as_prune_does(alike: Path, text_file: Path, tmp_path: Path) -> None:
    """Beside a method whose number is given, and one without experts."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        model = "{alike}"
        sparsity = [0.4]
        of = "model"
        multiple = 8
        data = ["{text_file}"]
        samples = 8
        seqlen = 32
        eval = ["{text_file}"]
        eval_windows = 1
        methods = [
            {{name = "chosen", parts = ["ffn", "experts"], repair = "none"}},
            {{name = "given", parts = ["ffn", "experts"], remove_experts = 1, repair = "none"}},
            {{name = "channels", parts = ["ffn"], repair = "none"}},
        ]
        """
    )
    out = tmp_path / "out"
    assert main(["sweep", "--recipe", str(recipe), "--device", "cpu", "--out", str(out)]) == 0
    kept = {
        name: json.loads((out / f"{name}-0.4" / "config.json").read_text())["num_local_experts"]
        for name in ("chosen", "given", "channels")
    }
    assert kept == {"chosen": 2, "given": 3, "channels": 4}


def test_none_eighths_and_as_many_as_are_to_go_are_tried(tmp_path: Path, tokenizer: Any) -> None:
    values = {"num_local_experts": 20, "num_hidden_layers": 1}
    parts: tuple[Part, ...] = ("experts",)
    place = saved(tmp_path / "dense", Asked("mixtral", values, "", []), tokenizer)
    source = Checkpoint(place, parts=parts)
    each = sum(parameters_of_an_expert(source).values())
    assert experts_to_try(source, 9.5 * each) == [0, 2, 5, 8, 9]
    assert experts_to_try(source, 0.5 * each) == [0]
    # The router chooses two.
    assert experts_to_try(source, 30 * each) == [0, 2, 5, 8, 10, 12, 15, 18]


def test_few_are_worth_a_repair_of_each_number_of_experts() -> None:
    divergences = {0: (0.9, 0.5), 1: (0.6, 0.4), 2: (0.7, 0.3, 0.35)}
    trials = [
        Trial(count, RemovedWhole(experts=experts), ("ffn",), 0.1, divergence)
        for experts, found in divergences.items()
        for count, divergence in enumerate(found)
    ]
    few = {(each.removed.experts, each.count) for each in worth_a_repair(trials)}
    assert few == {(0, 1), (1, 1), (2, 0), (2, 1)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": ("ffn", "blocks", "experts"), "remove_blocks": 1}, "requires --remove-experts"),
        ({"parts": ("attention", "experts"), "remove_attentions": 1}, "requires --remove-experts"),
    ],
)
def test_other_numbers_are_not_given_without_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(0.2, **values)
    Budget(0.2, **values, remove_experts=1)


@pytest.mark.parametrize(
    ("parts", "asked", "message"),
    [
        ("ffn,experts", ["--sparsity", "0.3"], "say how many with --set remove_experts=N"),
        ("blocks,experts", ["--sparsity", "0.3"], "say how many with --set remove_experts=N"),
        ("ffn,experts", ["--target-speedup", "1.1"], "--target-speedup is not for --parts experts"),
        ("kv,experts", ["--target-params", "0.1"], "cannot remove so much"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_any_work(
    alike: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    parts: str,
    asked: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("cfsp.whole_model.removal_order.fits", lambda *_: False)
    monkeypatch.setattr("cfsp.repair.ladder.calibrate_together", _never)
    out = tmp_path / "out"
    arguments = ["prune", str(alike), "--parts", parts, *asked, "--data", str(text_file)]
    arguments += ["--samples", "6", "--seqlen", "32", "--device", "cpu"]
    assert main([*arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
