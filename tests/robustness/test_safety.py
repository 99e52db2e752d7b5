"""The lesson: no command runs code from a file, starts a process, opens a connection or writes elsewhere.

A child process runs every command with an audit hook that sees all of these [PEP 578]. It prints what it saw.
"""
import ast
import contextlib
import importlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# The standard library alone is imported up here. The child imports all else after its hook is there.
FORBIDDEN = ("socket.", "urllib.", "http.", "ftplib.", "subprocess.", "os.system", "os.exec",
             "os.posix_spawn", "os.fork", "pty.", "pickle.")  # audit events
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# matplotlib looks for fonts, urllib3 for IPv6
LIBRARIES = ("subprocess.Popen ('fc-list'", "socket.__new__", "socket.bind")
OURS = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("extras/**/*.py"),
        *(ROOT / f"tests/robustness/{name}.py" for name in ("faults", "damage", "crashes"))]


def forbid(seen, folder):
    """Make this process raise an error if it does what no command should do. Add what it tried to `seen`."""
    allowed = (folder, os.devnull, "/proc/self/clear_refs")  # the last resets the peak memory

    def hook(event, args):
        writes = event == "open" and not isinstance(args[0], int) and args[2] & WRITING
        elsewhere = writes and not os.path.abspath(os.fsdecode(args[0])).startswith(allowed)
        if event.startswith(FORBIDDEN) or elsewhere:
            seen.append(f"{event} {args}")
            raise PermissionError(f"forbidden: {event}")

    sys.addaudithook(hook)


def run_everything():
    """Run every command on the embedded model in the current folder. Return [[its words, its exit code]]."""
    from runtime import cli  # not before the hook is there
    from extras.baselines.streamline import streamline
    streamline.__defaults__ = (2, *streamline.__defaults__[1:])  # steps of training, instead of 512
    quick = "--samples 2 --seq-len 16 --windows 1"
    records = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(8)]
    Path("alpaca.json").write_text(json.dumps(records))
    Path("text").write_text("It is a text of some words, and more of them. " * 100)
    Path("zeroshot").mkdir()
    Path("zeroshot/openbookqa.jsonl").write_text("".join(json.dumps({
        "id": str(i), "question_stem": "Water is", "answerKey": "A",
        "choices": {"text": ["wet", "dry", "red", "old"], "label": [*"ABCD"]}}) + "\n" for i in range(2)))
    commands = f"""
        grasp --layers 2 {quick} --out small
        evaluate --ckpt small --data text --seq-len 64 --json results.json
        extras.export.__main__ --ckpt small --out hf
        extras.export.__main__ --ckpt small --out meta --format meta
        extras.export.__main__ --ckpt small --out low-rank --format hf-lowrank
        extras.export.__main__ --ckpt hf --out deci --format deci
        extras.export.__main__ --ckpt hf --out gguf --format gguf
        evaluate --ckpt hf --data text --seq-len 64
        evaluate --ckpt meta --data text --seq-len 64
        grasp --ckpt hf --layer-ids 3 --threshold 0.5 --iterative {quick} --calibration text --eval none
        extras.recover --ckpt small --data alpaca.json --held-out 2 --batch-size 2 --seq-len 64
        extras.controls random --ckpt small
        extras.controls dropped --ckpt small
        extras.controls svd --ckpt small
        extras.generate --ckpt small --max-new-tokens 3
        extras.throughput --ckpt small --eval text --max-new-tokens 3 --batch-sizes 1 --lengths 4 --repeats 1
        extras.plot small --layer-ids 5 --matrix layers.5.attention.wk --seq-len 16 --windows 1
        extras.ablation seeds --layers 1 --seeds 1 2 {quick}
        extras.fisher.__main__ --budget 0.1 {quick}
        extras.compare --layers 1 {quick} --json compare.json
        extras.bench.__main__ --samples 2 --seq-len 16 --repeats 1 --svd --autograd
        extras.bench.__main__ --memory
        extras.baselines.lorap --ratio 0.9 {quick}
        extras.zeroshot --ckpt small --local zeroshot --tasks openbookqa --limit 2
        evaluate --data wikitext2
        extras.texts there
        """
    done = []
    for name, *words in map(str.split, commands.strip().splitlines()):
        sys.argv = [name, *words]
        try:
            code = cli.command(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code
        done.append([" ".join(sys.argv), code])
    return done


def test_every_command_runs_without_processes_connections_and_pickles(tmp_path):
    from extras.texts import PTB, WIKITEXT
    from tests.conftest import run
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    home = str(tmp_path / "home")
    child = run(__file__, tmp_path, cwd=tmp_path / "work", env={
        "HOME": home, "TMPDIR": str(tmp_path), "MPLCONFIGDIR": home, "HF_HOME": home,
        "PYTHONDONTWRITEBYTECODE": "1", "GRASP_DATA": ""})
    assert child.returncode == 0, child.stderr
    done, seen = json.loads(child.stdout.splitlines()[-1])
    *offline, wikitext2, texts = done
    assert [code for _, code in offline] == [None] * len(offline), child.stderr
    assert wikitext2[1] == texts[1] == 2  # only the second tried to download, over https
    tried = [event for event in seen if not event.startswith(LIBRARIES)]
    assert [event.split("'")[1] for event in tried] == [WIKITEXT], tried
    assert WIKITEXT.startswith("https://") and PTB.startswith("https://")
    assert {words.split()[0] for words, _ in done} == {
        "grasp", "evaluate", "extras.baselines.lorap",
        *(f"extras.{file.parent.name}.__main__" for file in ROOT.glob("extras/*/__main__.py")),
        *(f"extras.{file.stem}" for file in ROOT.glob("extras/[a-z]*.py"))} - {
        "extras.smollm2", "extras.make_tiny"}  # the first calls pip, the second trains for two minutes


def test_the_hook_sees_what_is_forbidden(tmp_path):
    from tests.conftest import run
    for code in ("import socket; socket.create_connection(('localhost', 1))", "import os; os.system('true')",
                 "import pickle; pickle.loads(pickle.dumps(print))", "open('../elsewhere', 'w')"):
        code = f"from tests.robustness import test_safety; test_safety.forbid([], {str(tmp_path)!r})\n{code}"
        child = run("-c", code, cwd=tmp_path)
        assert "forbidden: " in child.stderr, code


def test_the_source_has_nothing_that_runs_code_from_a_file():
    """No pickle, eval or exec. torch.load only with weights_only.

    Processes and connections in their files only.
    """
    places = {"subprocess": set(), "urllib": set(), "torch.load": 0}
    for file in OURS:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                node.module] if isinstance(node, ast.ImportFrom) else []
            modules = {m.split(".")[0] for m in modules}
            assert not modules & {"pickle", "marshal", "shelve", "joblib", "dill", "socket", "requests",
                                  "multiprocessing"}, file
            for name in modules & {"subprocess", "urllib"}:
                places[name].add(file.name)
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "os.system", "os.popen"}, f"{file}: {called}"
                if called.endswith((".load", "load")) and "torch" in called:
                    places["torch.load"] += 1
                    assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), file
                if called == "np.load" or called == "numpy.load":
                    assert not any(k.arg == "allow_pickle" for k in node.keywords), file
    assert places["urllib"] == {"texts.py"} and places["torch.load"] > 0
    assert places["subprocess"] == {"smollm2.py", "crashes.py", "report.py"}  # pip, this project, its tests


if __name__ == "__main__":
    seen = []
    forbid(seen, sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        done = run_everything()
    print(json.dumps([done, seen]))
