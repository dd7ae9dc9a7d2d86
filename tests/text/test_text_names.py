"""Every text is opened before any work; texts themselves; a hub that is not there."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import cfsp
from builders import draw_windows, never, raising
from cfsp.checkpoint.locating import hub_is_reachable, locate_model
from cfsp.errors import CheckpointError, TextError, UsageError
from cfsp.pipeline import prune_checkpoint
from cfsp.quality.evaluate import Exam, evaluate_models
from cfsp.recovery.recover import recover_checkpoint
from cfsp.recovery.settings import Limit, RecoverSettings, Training
from cfsp.settings import Budget, Compute, EvaluationText, PruneSettings, Text, texts_of
from cfsp.text import records as of_data
from cfsp.text import sources
from cfsp.text.records import Record
from cfsp.text.sources import TextSource, check_texts

ABSENT = "nothing.txt"


def refused(name: str, purpose: Any = "calibration") -> str:
    with pytest.raises(TextError) as caught:
        check_texts(**{purpose: [name]})
    return str(caught.value)


def test_a_text_that_is_not_there_says_which_is_meant(tmp_path):
    message = refused(ABSENT)
    assert message == (
        "nothing.txt is neither a file nor a known text; known are: mixed, python-docs, "
        "python-source, wikitext2, c4, mixed/KIND, or NAME:CONFIG:SPLIT:COLUMN on the hub"
    )
    for text in ("a river " * 100, "a river and/or a sea " * 100):
        assert "a text itself is Text(name, documents)" in refused(text)
    assert "~nobody-has-this-name/a.txt is neither" in refused("~nobody-has-this-name/a.txt")
    assert "did you mean wikitext2?" in refused("wikitext")
    assert "did you mean python-docs?" in refused("python_docs", "evaluation")
    assert "did you mean mixed/books?" in refused("mixed/book")
    (tmp_path / "prose.txt").write_text("a river")
    assert f"did you mean {tmp_path / 'prose.txt'}?" in refused(str(tmp_path / "prosa.txt"))
    (tmp_path / "link to a file.txt").symlink_to(tmp_path / "elsewhere")
    assert "did you mean" not in refused(str(tmp_path / "link to a file.txt"))


def test_texts_are_opened_but_not_read_to_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("a river")
    (tmp_path / "late.jsonl").write_text('{"text": "fine"}\n{"text": ')
    good = [tmp_path / "a.txt", tmp_path / "late.jsonl", "python-docs", "python-source"]
    check_texts([*map(str, good), Text("mine", "a river")])
    (tmp_path / "late.jsonl").write_bytes(b'{"text": "fine"}\n' * 99 + b"\xff")
    with pytest.raises(TextError, match=r"late.jsonl, line 100 is not UTF-8 text: byte 0"):
        list(TextSource(str(tmp_path / "late.jsonl"), "calibration").documents())
    (tmp_path / "bad.jsonl").write_text("[1]")
    assert "line 1: no column 'text'" in (said := refused(str(tmp_path / "bad.jsonl")))
    assert "name one as FILE:COLUMN" in said
    chat = tmp_path / "chat.jsonl"
    for messages in ('"hello"', '[{"role": "user"}]', "null"):
        chat.write_text(f'{{"messages": {messages}}}')
        assert "line 1: column 'messages' must be a list of messages" in refused(str(chat))


def test_a_text_on_the_hub_is_opened_once(monkeypatch):
    opened = []

    def records(*place: str) -> Iterator[Record]:
        opened.append(place)
        yield {"text": "a river", "body": "a river"}, "there"

    sources._open_on_hub.cache_clear()
    monkeypatch.setattr(sources, "hub_records", records)
    for _ in range(2):
        check_texts(["c4", "someone/texts:default:train:body"])
    check_texts(evaluation=["c4"])
    sources._open_on_hub.cache_clear()
    c4, own = ("allenai/c4", "en"), ("someone/texts", "default", "train")
    assert opened == [(*c4, "train"), own, (*c4, "validation")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "MODEL", "--sparsity", "0.2", "--out", "OUT", "--eval", ABSENT],
        ["prune", "MODEL", "--sparsity", "0.2", "--out", "OUT", "--data", ABSENT],
        ["calibrate", "MODEL", "--out", "OUT", "--data", ABSENT],
        ["eval", "MODEL", "--data", ABSENT],
        ["sweep", "MODEL", "--sparsity", "0.2", "--eval", ABSENT, "--out", "OUT"],
        ["sweep", "MODEL", "--sparsity", "0.2", "--eval", "c4", "--data", ABSENT, "--out", "OUT"],
        ["recover", "MODEL", "--steps", "1", "--data", ABSENT, "--out", "OUT"],
        ["recover", "MODEL", "--steps", "1", "--data", "c4", "--eval", ABSENT, "--out", "OUT"],
    ],
)
def test_commands_refuse_a_text_before_a_model(arguments, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sources, "hub_records", lambda *_: iter([({"text": "a river"}, "there")]))
    places = {"MODEL": tmp_path / "no-model", "OUT": tmp_path / "out"}
    argv = [places.get(word, word) for word in arguments]
    assert f"{ABSENT} is neither a file nor a known text" in command(*argv, status=2).err
    assert not list(tmp_path.iterdir())
    sources._open_on_hub.cache_clear()


def test_functions_refuse_a_text_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("too late"))
    out = tmp_path / "out"
    evaluation = EvaluationText((ABSENT,))
    training = Training(Limit(steps=1), seqlen=32)
    refusals: list[Callable[[], object]] = [
        lambda: cfsp.prune("no-model", out=out, sparsity=0.2, data=[ABSENT]),
        lambda: cfsp.calibrate("no-model", data=[ABSENT]),
        lambda: cfsp.recover("no-model", out=out, steps=1, data=[ABSENT]),
        lambda: cfsp.evaluate(["no-model"], [ABSENT]),
        lambda: prune_checkpoint(source, out, PruneSettings(Budget(0.2), evaluation=evaluation)),
        lambda: recover_checkpoint(
            source, out, RecoverSettings(("python-docs",), training, evaluation=evaluation)
        ),
        lambda: evaluate_models(["no-model"], Exam(evaluation, Compute())),
    ]
    for refusal in refusals:
        with pytest.raises(TextError, match=f"{ABSENT} is neither"):
            refusal()
        assert not out.exists()


# Texts themselves.


def test_a_text_itself_is_a_source(tokenizer, text_file):
    text = Text("mine", [text_file.read_text()])
    drawn = draw_windows([text], tokenizer, samples=6, seqlen=16)
    assert drawn.sources == {"mine": 6}
    from_file = draw_windows([str(text_file)], tokenizer, samples=6, seqlen=16)
    assert torch.equal(drawn.tokens_NT, from_file.tokens_NT)
    assert list(TextSource(Text("mine", "one"), "evaluation").documents()) == ["one"]
    assert not TextSource(Text("a:messages", "one"), "calibration").is_chat
    once: Any = (document for document in ("one", "two"))
    assert Text("mine", once).documents == ("one", "two")


def test_no_text_is_no_text():
    for documents in ((), "", "  \n", ["", " "]):
        with pytest.raises(TextError, match="the text 'mine' is empty"):
            Text("mine", documents)
    with pytest.raises(TextError, match="the text 'mine': half of a surrogate pair at character 1"):
        Text("mine", ["whole", "a\ud800"])
    for name in ("mixed", "mixed/books"):  # of which held-out windows would not be told apart
        with pytest.raises(TextError, match=f"'{name}' is the name of a text of cfsp; call yours"):
            Text(name, "a river")
    with pytest.raises(TextError, match="needs a name and strings, found '' and"):
        Text("", "a river")
    for wrong in (3, [3], {"text": ["a river"]}):  # the last as rows of a data set are
        with pytest.raises(TextError, match="needs a name and strings, found 'mine' and"):
            Text("mine", wrong)  # type: ignore[arg-type]


def test_two_texts_with_one_name_are_told_apart_by_nothing(tmp_path):
    one, other = Text("mine", "a river"), Text("mine", "a stone")
    assert texts_of([one, Text("mine", "a river"), "c4", "c4"]) == (one, one, "c4", "c4")
    for data in ([one, "c4", other], [one, "mine"]):
        with pytest.raises(UsageError, match="two texts are called 'mine'; give each a name"):
            cfsp.prune("no-model", out=tmp_path / "out", sparsity=0.2, data=data)
        with pytest.raises(UsageError, match="two texts are called 'mine'"):
            cfsp.evaluate(["no-model"], data)


def test_functions_take_a_text_itself(model, text_file):
    text = Text("mine", text_file.read_text())
    for data, name in ((text, "mine"), (str(text_file), str(text_file))):  # one may stand alone
        statistics = cfsp.calibrate(model, data=data, samples=4, seqlen=16)
        assert statistics.record.sources == {name: 4}
        (measured,) = cfsp.evaluate([model], data, windows=2, seqlen=32)
        assert list(measured["perplexity"]) == [name]


def test_all_windows_are_called_as_by_the_command(model, text_file):
    (one,), (other,) = (
        cfsp.evaluate(model, str(text_file), windows=all_of_them, seqlen=128)
        for all_of_them in ("all", None)
    )
    assert one == other
    with pytest.raises(UsageError, match="--windows must be a whole number, found 'many'"):
        cfsp.evaluate("no-model", str(text_file), windows="many")


def test_none_and_an_empty_list_are_no_text_wherever_one_is_asked_for(tmp_path):
    assert texts_of(None) == ()
    with pytest.raises(UsageError, match="no text to calibrate on; give one or several: wikitext2"):
        cfsp.prune("no-model", out=tmp_path / "out", sparsity=0.2, data=[])
    with pytest.raises(UsageError, match="no text to calibrate on"):
        cfsp.calibrate("no-model", data=[])
    none: Any
    for none in (None, []):
        with pytest.raises(UsageError, match="there is no text to measure on"):
            cfsp.evaluate(["no-model"], none)


# The hub.


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    datasets = SimpleNamespace(load_dataset=never)
    monkeypatch.setattr(of_data, "import_datasets", lambda: datasets)
    assert not hub_is_reachable()
    message = refused("wikitext2")
    assert message.startswith("the hub, which has Salesforce/wikitext, cannot be reached from here")
    with pytest.raises(CheckpointError, match="and the hub cannot be reached from here"):
        locate_model("no-one/nothing")


def test_whoever_stays_offline_reads_the_cache(monkeypatch):
    datasets = SimpleNamespace(load_dataset=lambda *_, **__: [{"text": "from the cache"}])
    monkeypatch.setattr(of_data, "import_datasets", lambda: datasets)
    assert list(TextSource("wikitext2", "evaluation").documents()) == ["from the cache"]
    with pytest.raises(CheckpointError, match="its cache has no copy either"):
        locate_model("no-one/nothing")


def test_whoever_stays_offline_is_told_what_the_cache_lacks(monkeypatch):
    """And not to look at the network, which was not asked."""
    datasets = SimpleNamespace(load_dataset=raising(ConnectionError("Couldn't reach the hub")))
    monkeypatch.setattr(of_data, "import_datasets", lambda: datasets)
    message = refused("wikitext2")
    assert message.startswith("HF_HUB_OFFLINE is set, and the cache of datasets has no copy of Sal")
    monkeypatch.setattr(of_data, "is_offline", lambda: False)
    monkeypatch.setattr(of_data, "hub_is_missed", lambda: False)
    assert refused("wikitext2").startswith("the hub does not serve Salesforce/wikitext")


def test_a_hub_that_answers_anything_is_there(monkeypatch):
    # Its answer is that it knows no such request.
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        try:
            assert hub_is_reachable()
        finally:
            server.shutdown()
            thread.join()
