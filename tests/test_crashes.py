"""The lesson: faults made on purpose find nothing, and would find it if there were something."""
import json

import pytest

from conftest import error_of
from extras import crashes
from extras.crashes import Command, faulty_disk, hit, one_line, plain, state, verdict, write_random
from model import load_checkpoint

WRITER = """from data.target import *
obey_signals()
import sys, time
if Path("there/out").exists():
    sys.exit("error: there/out exists; choose another")
with written_whole("there/out") as folder:
    folder.mkdir()
    time.sleep(0.3)
    (folder / "file").write_text("content")
    time.sleep(0.3)
print("written")"""
CARELESS = """from data.target import *
obey_signals()
import time
Path("there/out").mkdir(exist_ok=True)
Path("there/out/file").write_text("content"[:4])
time.sleep(1)"""
MADE = Command(["-c", WRITER], {}, {"out/file": b"content"}, 0.8)


def test_a_state_is_what_is_there_but_for_what_is_measured(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text(json.dumps({"seconds": 1.5, "rows": [{"peak_bytes": 3, "layer": 2}]}))
    (tmp_path / "cut.json").write_text("{")
    (tmp_path / ".out.tmp-abcdefgh/new").mkdir(parents=True)
    (tmp_path / ".out.tmp-abcdefgh/new/file").touch()
    assert state(tmp_path) == {"out/report.json": {"rows": [{"layer": 2}]}, "cut.json": b"{", ".out.tmp-abcdefgh": None}
    assert plain(3) == 3


def test_the_judge_can_say_no():
    made = Command([], {"out/file": b"old"}, {"out/file": b"new", "out/more": b"m"}, 1.0)
    assert verdict(made.before, made) == ("as before", "") and verdict(made.whole, made) == ("whole", "")
    assert verdict({}, made._replace(before={})) == ("absent", "")
    for found, wrong in (({}, "out/file"), ({"out/file": b"new"}, "out/more"),
                         ({**made.whole, ".out.tmp-a": None}, ".out.tmp-a"),
                         ({**made.whole, "out/file": b"ne"}, "out/file"),
                         ({**made.whole, "junk": b""}, "junk"),
                         ({"out.state": b"cut"}, "out.state cannot be read")):
        what, fault = verdict(found, made)
        assert what == "cut" and wrong in fault, found

    class Ended:
        returncode = 2

    assert not one_line(Ended, "error: disk full\n") and one_line(Ended, "error: disk\nfull\n")
    assert one_line(Ended, "Traceback\n") and one_line(type("Ended", (), {"returncode": 1}), "error: disk full\n")


@pytest.mark.parametrize("kind", crashes.SIGNALS)
@pytest.mark.parametrize("moment", [0.0, 0.35, 2.0])
def test_a_writer_of_this_project_stands_every_moment(kind, moment, tmp_path):
    what, early, left, seconds, fault = hit(tmp_path, "writer", MADE, kind, moment)
    assert not fault and what in ("absent", "whole") and seconds >= 0 and list(tmp_path.iterdir()) == []


def test_a_careless_one_does_not(tmp_path):
    for kind in crashes.SIGNALS:
        fault = hit(tmp_path, "careless", MADE._replace(words=["-c", CARELESS]), kind, 3.0)[-1]
        assert f"careless, {kind} after 3.000 s" in fault and "out/file" in fault


def test_one_that_says_too_much_is_found_out(tmp_path):
    loud = "import signal, time; signal.signal(signal.SIGTERM, print); time.sleep(60)"
    what, early, *_, fault = hit(tmp_path, "loud", MADE._replace(words=["-c", loud]), "SIGINT", 1.5)
    assert what == "absent" and not early and "exit code" in fault and "Traceback" in fault


def test_real_commands_at_a_few_moments(tmp_path, monkeypatch):
    """The download and a run over an older folder, hit in the midst: the other commands' turn is the command line's."""
    words = crashes.prepare(tmp_path)
    for name, kind in (("download", "SIGINT"), ("grasp --overwrite", "SIGKILL")):
        made = crashes.measure(tmp_path, name, words[name])
        what, *_, fault = hit(tmp_path, name, made, kind, 0.8 * made.seconds)
        assert not fault and what in ("absent", "as before", "whole"), fault


@pytest.mark.parametrize("kind, at", [("full", 0), ("full", 9), ("read-only", 0), ("vanishes", 0.4)])
def test_a_disk_that_fails(kind, at, tmp_path):
    """Where a small one may be mounted: else it says what that needs."""
    code = ("import evaluate\nfrom data.target import *\n"
            "def main():\n    check_target('there/out')\n    with written_whole('there/out') as folder:\n"
            "        folder.mkdir()\n        (folder / 'file').write_bytes(bytes(5 * 4096))\n"
            "evaluate.command(main)")
    made = Command(["-c", code], {}, {"out/file": bytes(5 * 4096)}, 1.0)
    try:
        what, fault = faulty_disk(tmp_path, "writer", made, kind, at)
    except PermissionError as e:
        assert "run this as root" in str(e)
    else:
        assert not fault and what == ("whole" if at == 9 else "absent")


def test_without_the_right_to_mount_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(crashes.subprocess, "run", lambda *words, **how: type("Done", (), {"returncode": 1}))
    monkeypatch.setattr(crashes.ctypes, "CDLL", lambda name: type("C", (), {"unshare": lambda flags: -1}))
    assert "needs Linux and the right to mount one: run this as root" in error_of(
        crashes.main, "disk", monkeypatch, capsys)


def test_the_large_folder_is_one_that_loads(tmp_path):
    size = write_random(tmp_path / "big", seed=0, layers=1, dim=64)
    model = load_checkpoint(tmp_path / "big")
    assert model.args.n_layers == 1 and sum(p.nbytes for p in model.parameters()) == size
