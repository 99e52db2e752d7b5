"""The lesson: faults made on purpose find nothing, and would find it if there were something."""
import json
import sys

import pytest

from tests.conftest import error_of
from tests.robustness import crashes
from tests.robustness.crashes import Command, ended, faulty_disk, hit, judge, new_case, start, state, write_random, writes
from data.checkpoint import load_checkpoint

HEAD = """import os, signal, sys, time
from data.files import atomic_write, check_output
from pathlib import Path
def main():
"""
TAIL = """
def terminate(number, frame):
    raise KeyboardInterrupt("terminated")
signal.signal(signal.SIGTERM, terminate)
try:
    main()
except KeyboardInterrupt as e:
    print(str(e) or "interrupted", file=sys.stderr)
    sys.exit(143 if e.args else 130)
except OSError as e:
    print("error:", e, file=sys.stderr)
    sys.exit(2)"""  # as cli.command does it, without torch
WRITER = f"""{HEAD}
    if Path("there/out").exists():
        sys.exit("error: there/out exists; choose another")
    with atomic_write("there/out") as folder:
        folder.mkdir()
        time.sleep(0.3)
        (folder / "file").write_text("content")
        time.sleep(0.3){TAIL}"""
CARELESS = f"""{HEAD}
    Path("there/out").mkdir(exist_ok=True)
    Path("there/out/file").write_text("content"[:4])
    time.sleep(60){TAIL}"""
RENAMING = f"""{HEAD}
    with atomic_write("there/out") as folder:
        folder.mkdir()
        Path.replace = lambda *words: time.sleep(60){TAIL}"""
MADE = Command(["-c", WRITER], {}, {"out/file": b"content"}, 1, 1, 0.8)


def test_a_state_is_what_is_there_but_for_what_is_measured(tmp_path):
    place = tmp_path / ".crashes.partial-1/there"  # itself in a temporary folder
    (place / "out").mkdir(parents=True)
    (place / "out/report.json").write_text(json.dumps({"seconds": 1.5, "rows": [{"peak_bytes": 3, "layer": 2}]}))
    (place / "cut.json").write_text("{")
    (place / "out.state").write_bytes(b"cut")
    (place / ".out.partial-1/new").mkdir(parents=True)
    assert state(place) == {"out/report.json": {"rows": [{"layer": 2}]}, "cut.json": b"{", "out.state": b"cut",
                            ".out.partial-1": None}


def test_the_judge_can_say_no():
    made = MADE._replace(before={"out/file": b"old"}, whole={"out/file": b"new", "out/more": b"m"})
    assert judge(made, made.before, "2 no", "0", "2 .*") == ("as before", "")
    assert judge(made, made.whole, "0", "0", "2 .*") == ("whole", "")
    assert judge(made._replace(before={}), {}, "2 no", "0", "2 .*") == ("absent", "")
    for found, wrong in (({}, "out/file"), ({"out/file": b"new"}, "out/more"),
                         ({**made.whole, ".out.partial-a": None}, ".out.partial-a"),
                         ({**made.whole, "out/file": b"ne"}, "out/file"),
                         ({**made.whole, "junk": b""}, "junk"),
                         ({**made.before, "out.state": b"cut"}, "out.state")):
        what, fault = judge(made, found, "0", ".*", ".*")
        assert what == "cut" and wrong in fault, found
    for found, end in ((made.whole, "2 error: disk full"), (made.before, "0"), (made.before, "1 error: disk full"),
                       (made.before, "2 error: disk\nfull"), (made.before, "2 Traceback"), (made.whole, "0 loud")):
        assert end in judge(made, found, end, "0", crashes.ERROR)[1].encode().decode("unicode_escape")


@pytest.mark.parametrize("kind", crashes.SIGNALS)
@pytest.mark.parametrize("write, delay", [(0, 0.0), (1, 0.15), (0, 2.0)])
def test_a_writer_of_this_project_stands_every_moment(kind, write, delay, tmp_path):
    what, fault, writing, left, again, seconds = hit(tmp_path, "writer", MADE, kind, write, delay, delay == 0)
    assert not fault and what in ("absent", "whole") and seconds >= 0 and list(tmp_path.iterdir()) == []
    assert not write or writing and left == (kind == "SIGKILL")


def test_killed_between_the_two_renames_the_old_folder_waits(tmp_path):
    """Ended by any other signal it is put back."""
    made = MADE._replace(words=["-c", RENAMING], before=state(new_case(tmp_path, "--overwrite")))
    for kind in crashes.SIGNALS:
        assert hit(tmp_path, "--overwrite", made, kind, 1, 1.0, False)[:2] == ("as before", "")
    spoiled = RENAMING.replace("time.sleep", "next(Path('there').glob('.*/*.old/params.json')).unlink() or time.sleep")
    what, fault, *_ = hit(tmp_path, "--overwrite", made._replace(words=["-c", spoiled]), "SIGKILL", 1, 1.0, False)
    assert what == "cut"


def test_a_careless_one_does_not(tmp_path):
    for kind in crashes.SIGNALS:
        what, fault, *_ = hit(tmp_path, "careless", MADE._replace(words=["-c", CARELESS]), kind, 0, 1.0, False)
        assert what == "cut" and "out/file" in fault


def test_one_that_says_too_much_is_found_out(tmp_path):
    loud = "import signal, time; signal.signal(signal.SIGTERM, print); time.sleep(60)"
    what, fault, *_ = hit(tmp_path, "loud", MADE._replace(words=["-c", loud]), "SIGINT", 0, 0.2, False)
    assert what == "absent" and "Traceback" in fault


def test_one_whose_leftovers_the_next_run_does_not_clear_is_found_out(tmp_path):
    what, fault, *_ = hit(tmp_path, "writer", MADE._replace(words=["-c", WRITER.replace(
        '"there/out") as', 'f"there/{os.getpid()}") as')]), "SIGKILL", 1, 0.1, True)
    assert what == "cut" and ".partial-" in fault


def test_every_write_is_seen(tmp_path):
    process = start(["-c", "from data.files import *; import time\nfor name in 'ab':\n    with atomic_write(name) as "
                     "file:\n        file.touch()\n        time.sleep(1)"], tmp_path)
    assert [path.name[:3] for path in writes(process, tmp_path)] == [".a.", ".b."] and ended(process) == "0"


def test_real_commands_at_a_few_moments(tmp_path):
    """The download and a run over an older folder, hit in a write: the other commands' turn is the command line's."""
    for name, made in crashes.measured(tmp_path, ["download", "grasp --overwrite"]).items():
        assert made.whole != made.before and made.seconds > 0 and made.pages > 1
        what, fault, *_ = hit(tmp_path, name, made, "SIGKILL", 1, 0.002, False)
        assert not fault and what in ("absent", "as before", "whole"), fault


@pytest.mark.parametrize("kind, at", [("full", 0), ("full", 4), ("full", 9), ("read-only", 0), ("vanishes", 0.4)])
def test_a_disk_that_fails(kind, at, tmp_path):
    """Where a small one may be mounted: else it says what that needs."""
    code = f"""{HEAD}
    check_output("there/out")
    with atomic_write("there/out") as folder:
        folder.mkdir()
        time.sleep(0.5)
        (folder / "file").write_bytes(bytes(5 * 4096)){TAIL}"""
    made = MADE._replace(words=["-c", code], whole={"out/file": bytes(5 * 4096)})
    try:
        what, fault = faulty_disk(tmp_path, "writer", made, kind, at)
    except PermissionError as e:
        assert "run this as root" in str(e)
    else:
        assert not fault and what == ("whole" if at == 9 else "absent")


def summed_up(words, monkeypatch, capsys):
    """(the exit code, the last line) of the command."""
    monkeypatch.setattr(sys, "argv", ["crashes", *words.split()])
    with pytest.raises(SystemExit) as stop:
        crashes.main()
    return stop.value.code, capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_of_signals_sums_up(monkeypatch, capsys):
    results = {"SIGINT": ("absent", "", True, False, False, 0.5),
               "SIGTERM": ("cut", "cut or left: out", False, False, False, 3.5),
               "SIGKILL": ("absent", "", True, True, False, 9.0)}
    monkeypatch.setattr(crashes, "measured", lambda work, names: {"recover": MADE, "download": MADE})
    monkeypatch.setattr(crashes, "hit", lambda work, name, made, kind, *words: results[kind])
    assert summed_up("signals --count 3", monkeypatch, capsys) == (
        1, "6 moments, 4 in a write, 2 faults; seconds to end after SIGINT or SIGTERM: median 2.0, most 3.5")


def test_the_last_line_of_disk_sums_up(monkeypatch, capsys):
    monkeypatch.setattr(crashes.ctypes, "CDLL", lambda name: type("C", (), {"unshare": lambda flags: 0}))
    monkeypatch.setattr(crashes, "mount", lambda *words: None)
    monkeypatch.setattr(crashes, "measured", lambda work, names: {"recover": MADE})
    monkeypatch.setattr(crashes, "faulty_disk", lambda *words: ("absent", ""))
    code, line = summed_up("disk --count 2", monkeypatch, capsys)
    assert code == 0 and line == "5 runs, 0 faults"  # read-only, 0 and 2 free pages, twice a folder that goes


def test_the_last_line_of_load_sums_up(monkeypatch, capsys):
    monkeypatch.setattr(crashes, "start", lambda *words: None)
    monkeypatch.setattr(crashes, "ended", lambda process: "0")
    monkeypatch.setattr(crashes, "large", lambda work: (["grasp.py on 3 bytes", "4", "5"], ["too much"]))
    assert summed_up("load --count 2", monkeypatch, capsys) == (
        1, "2 evaluations at once and 1 large folder, 1 faults")


def test_without_the_right_to_mount_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(crashes.subprocess, "run", lambda *words, **how: type("Done", (), {"returncode": 1}))
    monkeypatch.setattr(crashes.ctypes, "CDLL", lambda name: type("C", (), {"unshare": lambda flags: -1}))
    assert "needs Linux and the right to mount one: run this as root" in error_of(
        crashes.main, "disk", monkeypatch, capsys)


def test_the_large_folder_is_one_that_loads(tmp_path):
    size = write_random(tmp_path / "big", (64, 1, 4, 2, 96, 1024, False))
    model = load_checkpoint(tmp_path / "big")
    assert model.args.n_layers == 1 and sum(p.nbytes for p in model.parameters()) == size
