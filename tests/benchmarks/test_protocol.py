"""The field's protocol, on a tiny model with made-up texts and tasks."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from cfsp.checkpoint.reading import Checkpoint

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

import protocol


@pytest.fixture
def local(tmp_path, text_file) -> Path:
    """A directory of local texts and of a few tasks."""
    directory = tmp_path / "local"
    prose = text_file.read_text()
    for name in ("c4/train.jsonl", "c4/validation.jsonl"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": prose}) + "\n")
    (directory / "wikitext2").mkdir()
    rows = pyarrow.table({"text": [prose]})
    pyarrow.parquet.write_table(rows, directory / "wikitext2/test.parquet")
    (directory / "tasks").mkdir()
    for task in ("piqa", "mmlu"):
        lines = [
            {"query": f"{word} {number}", "choices": ["stone", "river"], "gold": number % 2}
            for number, word in enumerate(("green", "small", "light", "under") * 3)
        ]
        (directory / f"tasks/{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory


def test_it_prints_a_row_for_each_model_and_goes_on(model, local, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = [str(model), "--out", str(out), "--local", str(local), "--size", "quick"]
    argv += ["--of-blocks", "0.25", "--of-channels", "0.5", "--prune=--multiple 4"]
    protocol.main(argv)
    lines = capsys.readouterr().out
    shown = lines[lines.index("| model |") :].splitlines()
    assert "piqa acc/acc_norm | mmlu acc | tasks - dense | answers kept |" in shown[0]
    names = [line.split("|")[1].strip() for line in shown[2:5]]
    assert names == ["dense", "25% of block parameters", "50% of FFN channels"]
    assert (out / "table.md").read_text().strip() == "\n".join(shown).strip()
    stored = Checkpoint(model).stored.within("model.layers.")
    blocks = [
        sum(Checkpoint(directory).specs[name].elements for name in stored)
        for directory in (model, out / "models/blocks-25")
    ]
    assert blocks[1] / blocks[0] == pytest.approx(0.75, abs=0.03)
    # Nothing is pruned or measured again.
    for name in ("cfsp.pipeline.decide", "cfsp.quality.evaluate.streamed_sums"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("again"))
    protocol.main(argv)
    assert "25% of block parameters" in capsys.readouterr().out
