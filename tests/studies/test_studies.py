"""Study 9's smallest version runs on a tiny model, and prints what is published."""

import pytest

import run as study
from builders import edit_json, never, read_json
from cfsp.errors import OutputError
from conftest import REPOSITORY


@pytest.mark.usefixtures("models_start_quickly")
def test_parts(copied, text_file, other_text_file, tmp_path, capsys):
    edit_json(copied / "config.json", lambda fields: fields.update(max_position_embeddings=1024))
    out = tmp_path / "rows.json"
    texts = ("--data", text_file, "--eval", text_file, "--eval", other_text_file)
    size = ("--seqlen", 32, "--windows", 2, "--samples", 4, "--stays", 0.6, "--rounds", 1)
    model = ("--model", copied)
    command = (9, *model, *texts, *size, "--choices", "ffn", "all", "--out", out)
    assert study.main([*map(str, command)]) == 0
    rows, printed = read_json(out)["rows"], capsys.readouterr().out
    rows, timed = rows[:4], rows[4:]
    assert [(row["parts"], row["state"]) for row in rows] == [
        (choice, state) for choice in ("ffn", "all") for state in ("unrepaired", "repaired")
    ]
    assert max(row["parameters"] for row in rows) < 1.1 * min(row["parameters"] for row in rows)
    assert [row["KL - ffn"][0] for row in rows[:2]] == [0, 0]
    for row in rows[2:]:
        alone = rows[row["state"] == "repaired"]
        assert row["KL - ffn"][0] == pytest.approx(row["KL"][0] - alone["KL"][0], abs=2e-3)
    assert all(row["worst"] >= row["mean"] > 0.9 and "%" in row["what goes"] for row in rows)
    assert "| 60.0% | ffn | unrepaired |" in printed
    assert [row["parts"] for row in timed] == ["ffn", "all"]
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in timed)
    assert timed[0]["KV cache"] == "100%"
    assert "| 60.0% | ffn | 1 rounds | 100% |" in printed


def test_it_prints_what_is_published(tmp_path, monkeypatch, capsys):
    command = ["9", "--texts", str(tmp_path)]
    assert study.main(command) == 2
    shown = capsys.readouterr()
    assert "wikitext2/test.parquet is not there; --texts is a directory" in shown.err
    assert shown.err.count("\n") == 1 and not shown.out
    for path in (tmp_path / name for name in study.TEXTS):  # nobody reads them
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr(study, "step", never)  # no published row is missing
    assert study.main(command) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    published = (REPOSITORY / "docs/STUDIES.md").read_text()
    table = published.split("python studies/run.py 9 --texts DIR")[1].split("\n\n")[1]
    assert len(table.splitlines()) > 10
    assert not set(table.splitlines()) - set(printed)
    assert study.main([*command, "--stays", "0.9"]) == 2
    assert "ffn,attention can't be measured anew" in capsys.readouterr().err
    gone = {*study.usual_choices(study.PUBLISHED)} - {*study.usual_choices(tmp_path)}
    assert gone == {"blocks by influence", "ffn,attention"}


def test_results_are_measured_once(tmp_path, text_file):
    path = tmp_path / "rows.json"
    results = study.Results(path, {"windows": 2})
    results.add({"seed": 0}, {"value": 1.0})
    results.add({"seed": 1}, {"value": 2.0})
    again = study.Results(path, {"windows": 2})
    assert again.known([{"seed": 1}]) == [{"seed": 1, "value": 2.0}]
    assert again.known([{"seed": 1}, {"seed": 2}]) == []
    with pytest.raises(OutputError, match="other conditions"):
        study.Results(path, {"windows": 3})
    # Conditions do not name this machine's places.
    assert study.label(str(text_file)) == f"{text_file.parent.name}/prose"
    assert study.label("wikitext2") == "wikitext2"


def test_the_help_tells_no_default_that_is_none(capsys):
    with pytest.raises(SystemExit):
        study.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "calibration text (default: mixed) --eval" in told and "(default: None)" not in told
