"""The lesson: with any command line a command does its work, or prints one line of error and writes nothing.

hypothesis makes the command lines: any combination of flags, with values that fit, nearly fit, or are odd.
"""
import argparse
import importlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import grasp
from tests.conftest import ROOT, outcome
from data import corpus
from data.checkpoint import load_checkpoint
from data.corpus import random_windows
from runtime import cli

EXTRAS = [*sorted(f"extras.{file.stem}" for file in (ROOT / "extras").glob("[a-z]*.py")),
          *sorted(f"extras.{file.parent.name}.__main__" for file in (ROOT / "extras").glob("*/__main__.py")),
          "extras.baselines.lorap", "tests.robustness.faults", "tests.robustness.crashes"]
COUNT = int(os.environ.get("GRASP_EXAMPLES", 60))  # command lines of each command

odd = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=20),  # what a shell can pass
    st.sampled_from(["", "-", "--", "-1", "0", "1e3", "nan", "inf", "1e400", "0x10", "1_000", "٣", "½",
                     "9" * 5000, "/", ".", "..", "~", "/dev/null", "a\nb", "\udcff", "\x1b[2J", "é" * 130,
                     "x" * 300, "loop", "file", "binary", "@file", "{}", "%s", "*"]),
    st.integers().map(str), st.floats().map(str))


def small(action, texts):
    """Values that fit a flag and make the work short."""
    name = action.option_strings[-1] if action.option_strings else action.dest
    known = {"--samples": "123", "--batch-size": "123", "--windows": "12", "--layers": "128",
             "--layer-ids": "0257", "--seed": "07", "--seq-len": ["2", "16", "256"],
             "--ratio": ["0.1", "1", "1e-9"], "--threshold": ["0.5", "1", "1e-9"],
             "--out": ["out", "sub/out", "loop"], "--device": ["cpu", "auto"],
             "--ckpt": [str(cli.TINY), str(cli.TINY), "loop"], "--calibration": texts, "--eval": texts,
             "--data": texts, "--json": ["results.json", "sub/results.json"], "--data-dir": ["sub", "."]}
    return st.sampled_from(list(action.choices or known.get(name, ["1", "a"])))


def command_lines(parser, texts=("embedded", "none", "short")):
    """Lists of words for a command: some of its flags with values that fit, and often one odd value."""
    def words(action, value):
        most = {"+": 3, "*": 3, None: 1, 0: 0, "?": 1}[action.nargs]
        values = st.lists(value, min_size=min(most, 1), max_size=most) if most else st.just([])
        return values.map(lambda values: [*action.option_strings[-1:], *values])

    actions = parser._actions[1:]  # without --help
    fitting = st.lists(st.one_of(*(words(action, small(action, texts)) for action in actions)), max_size=6)
    wrong = st.lists(st.one_of(*(words(action, odd) for action in actions), st.lists(odd, max_size=1)),
                     max_size=1)
    return st.tuples(fitting, wrong).flatmap(lambda parts: st.permutations(parts[0] + parts[1])).map(
        lambda parts: sum(parts, []))


class Stop(Exception):
    pass


def parser_of(main, monkeypatch):
    """The parser that a command makes."""
    def stop(self, *_):
        raise Stop(self)

    with monkeypatch.context() as m:
        m.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Stop) as made:
            main()
    return made.value.args[0]


def tree(folder):
    return {path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
            for path in folder.rglob("*")}


def checked(main, words, capsys):
    """(exit code, stdout) of a command. If it failed, it printed one line of error."""
    sys.stderr.reconfigure(errors="backslashreplace")  # as outside pytest
    code, out, err = outcome(main, words, capsys)
    assert code in (0, 2), (code, err)
    assert not err if code != 2 else err.startswith("error: ") and len(err.splitlines()) == 1, err
    return code, out


@pytest.fixture
def place(nowhere):
    """A folder with one of each kind of thing that a name can mean."""
    (nowhere / "file").write_text("{}")
    (nowhere / "short").write_text("some words here " * 200)
    (nowhere / "binary").write_bytes(b"\xff\xfe")
    (nowhere / "sub").mkdir()
    (nowhere / "loop").symlink_to("loop")
    return nowhere


def hold(test, strategy, count=COUNT):
    settings(max_examples=count, deadline=None, derandomize=True, database=None,
             suppress_health_check=list(HealthCheck))(given(strategy)(test))()


def test_any_words_for_grasp(place, monkeypatch, capsys):
    before, seen = tree(place), Counter()

    def few_windows(tokens, samples, seq_len, seed):
        if samples * seq_len > 4000:
            raise ValueError("too long for a test")
        return random_windows(tokens, samples, seq_len, seed)

    monkeypatch.setattr(corpus, "random_windows", few_windows)

    def run(words):
        layers = [] if {"--layers", "--layer-ids"} & {*words} else ["--layers", "2"]
        code, out = checked(grasp.main, ["--samples", "2", "--windows", "1", *layers, *words], capsys)
        if not code and "written to " in out:
            folder = Path(out.rpartition("written to ")[2].rstrip("\n"))
            report = json.loads((folder / "report.json").read_text())
            assert load_checkpoint(folder).n_params == report["parameters_after"]
            for row in report["results"]:
                assert all(map(math.isfinite, row["perplexity"].values())), words
            shutil.rmtree(folder)
        seen[code, "written to " in out] += 1
        assert tree(place) == before, words

    hold(run, command_lines(parser_of(grasp.main, monkeypatch)))
    assert seen[2, False] and seen[0, True] > COUNT / 20, seen  # not everything was refused


def test_any_words_for_evaluate(place, monkeypatch, capsys):
    before, seen = tree(place), Counter()

    def run(words):
        code, out = checked(evaluate.main, ["--windows", "1", *words], capsys)
        seen[code, " ppl |" in out] += 1
        changed = [file for file, content in tree(place).items() if before.get(file) != content]
        for file in () if code else changed:
            found = json.loads(file.read_text())["perplexity"]
            assert "--json" in words and all(map(math.isfinite, found.values()))
            file.unlink()
            if isinstance(before.get(file), bytes):  # --json replaces a file, and a link that leads nowhere
                file.write_bytes(before[file])
            elif file in before:
                file.symlink_to(before[file])
        assert tree(place) == before, words

    hold(run, command_lines(parser_of(evaluate.main, monkeypatch), ["embedded", "short"]))
    assert seen[2, False] and seen[0, True] > COUNT / 20, seen


@pytest.mark.parametrize("name", EXTRAS)
def test_any_words_for_the_extras(name, place, monkeypatch, capsys):
    """Until a folder of weights would be opened: the work after that takes too long."""
    module = importlib.import_module(name)

    def refuse(*_, **__):
        raise ValueError("no weights in this test")

    for opening in ("open_weights", "start_harness", "download", "train_tokenizer"):
        if hasattr(module, opening):
            monkeypatch.setattr(module, opening, refuse)
    monkeypatch.setattr(cli, "weight_files", refuse)
    monkeypatch.setattr(cli, "load_checkpoint", refuse)
    if hasattr(module, "tempfile"):  # where faults and crashes begin to work
        monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    before = tree(place)

    def run(words):
        checked(module.main, words, capsys)
        assert tree(place) == before, words

    hold(run, command_lines(parser_of(module.main, monkeypatch)))
