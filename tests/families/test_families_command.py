"""`cfsp families`: what it lists of all types, and the verdict of a process for each."""

import json
import sys
from functools import partial

from cfsp.architecture.model_classes import model_class_of
from cfsp.cli.families import OTHER_PARTS
from cfsp.families import catalogue
from cfsp.families.catalogue import Family, installed_families, verdicts, why_not
from cfsp.settings import PARTS


def test_the_command_lists_what_transformers_has_and_what_can_go(command):
    head, _, *rows = command("families").out.splitlines()
    assert head.split()[:5] == ["model", "type", "class", "FFN", "channels"]
    assert len(rows) == len(installed_families()) > 200
    llama = ["llama", "LlamaForCausalLM", "yes", "yes", "yes", "yes", "no"]
    assert llama in [row.split() for row in rows]


def test_what_was_proved_before_has_a_reason_for_every_no(command):
    listed = json.loads(command("families", "--json").out)["families"]
    proved = [row for row in listed if row["proved"]]
    assert len(proved) > 200
    assert all(row["reason"] for row in listed if row["proved"] is False)
    assert all(row[part] or row[f"{part}_reason"] for row in proved for part in OTHER_PARTS)
    (olmoe,) = [row for row in proved if row["model_type"] == "olmoe"]
    assert (olmoe["kv"], olmoe["experts"]) == (False, True)
    assert "failed the check cut" in olmoe["kv_reason"]


def test_what_nobody_tried_is_not_said(monkeypatch, command):
    monkeypatch.setattr("cfsp.cli.families.proved_before", lambda: ("1.0", {}))
    rows = [row.split() for row in command("families").out.splitlines()]
    assert ["llama", "LlamaForCausalLM", *5 * "?"] in rows


def test_named_types_are_proved_and_parts_by_themselves(command, monkeypatch):
    """In this process, which has imported torch: that each has one of its own is told below."""
    monkeypatch.setattr("cfsp.cli.families.verdicts", partial(map, why_not))
    monkeypatch.setitem(catalogue._VALUES, "olmoe", {"num_hidden_layers": 2, "num_experts": 16})
    told = command("families", "--prove", "olmoe", "bert", "--json").out
    bert, moe = json.loads(told)["families"]
    assert (bert["model_type"], bert["proved"]) == ("bert", False)
    assert "is an encoder" in bert["reason"]
    assert not any(bert[part] for part in OTHER_PARTS)
    assert (moe["class"], moe["proved"], moe["reason"]) == ("OlmoeForCausalLM", True, None)
    # Its norms are over all heads.
    assert "failed the check cut" in moe["kv_reason"]
    assert [part for part in OTHER_PARTS if not moe[part]] == ["kv"]


def test_a_type_has_all_its_classes():
    families = [each for each in installed_families() if each.model_type == "qwen3_5"]
    classes = ["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"]
    assert [each.class_name for each in families] == classes
    assert [model_class_of(each.config()).__name__ for each in families] == classes


def test_a_class_that_no_checkpoint_opens_is_not_proved():
    """It is in a mapping by a type whose config it does not save."""
    reasons = why_not(Family("emu3", "Emu3ForCausalLM"))
    assert all("'emu3_text_model' has no class" in str(reasons[part]) for part in PARTS)


def test_an_unknown_type_is_refused(command):
    error = command("families", "--prove", "lama", status=2).err
    assert "no language model type 'lama'; did you mean llama?" in error


STRANGE = """
import sys, time
match sys.argv[1]:
    case "talks":
        print("a", {!r}, "bye", sep="\\n")
    case "is silent":
        print("bye")
    case "crashes":
        sys.exit(3)
    case "never ends":
        time.sleep(60)
"""


def test_an_answer_is_found_among_what_classes_print(monkeypatch, tmp_path):
    """And no file of the current directory runs."""
    (tmp_path / "transformers.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    (found,) = verdicts([Family("llama", "NoSuchClass")])
    assert "no config could be made (AttributeError" in str(found["ffn"])
    program = STRANGE.format(catalogue._ANSWER + json.dumps(dict.fromkeys(PARTS, "talks")))
    monkeypatch.setattr(catalogue, "PROGRAM", (sys.executable, "-c", program))
    monkeypatch.setattr(catalogue, "PROOF_LIMIT", 2.0)
    reason_of = {
        "talks": "talks",
        "is silent": "its process gave no answer",
        "crashes": "its process ended with status 3",
        "never ends": "no verdict after 2 seconds",
    }
    found = verdicts([Family(name, "LlamaForCausalLM") for name in reason_of])
    assert list(found) == [dict.fromkeys(PARTS, reason) for reason in reason_of.values()]
