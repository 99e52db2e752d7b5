"""The lesson: no command runs code that it reads, starts a process, opens a connection, or writes where it may not.

A child process runs every command with an audit hook that sees all of that [PEP 578], and says what it saw.
"""
import ast
import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent  # nothing is imported here but what Python brings: the child watches the rest
FORBIDDEN = ("socket.", "urllib.", "http.", "ftplib.", "subprocess.", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "pty.", "pickle.")  # audit events
LIBRARIES = ("subprocess.Popen ('fc-list'", "socket.__new__", "socket.bind")  # matplotlib's fonts; has urllib3 IPv6?
OURS = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("extras/**/*.py")]


def forbid(seen, folder):
    """Forbid this process what no command should do, and to write outside of a folder; add what it tried to `seen`."""
    allowed = (folder, os.devnull, "/proc/self/clear_refs")  # the last starts the count of peak memory anew

    def hook(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(args[0], int)
        if event.startswith(FORBIDDEN) or writes and not os.path.abspath(os.fsdecode(args[0])).startswith(allowed):
            seen.append(f"{event} {args}")
            raise PermissionError(f"forbidden: {event}")

    sys.addaudithook(hook)


def run_everything():
    """Every command, on the embedded model, in the current folder: [[its words, its exit code]]."""
    import evaluate  # not before the hook is there
    quick = "--samples 2 --seq-len 16 --windows 1"
    records = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(8)]
    Path("alpaca.json").write_text(json.dumps(records))
    Path("text").write_text("It is a text of some words, and more of them. " * 100)
    Path("zeroshot").mkdir()
    Path("zeroshot/openbookqa.jsonl").write_text("".join(json.dumps({
        "id": str(i), "question_stem": "Water is", "answerKey": "A",
        "choices": {"text": ["wet", "dry", "red", "old"], "label": ["A", "B", "C", "D"]}}) + "\n" for i in range(2)))
    commands = f"""
        grasp --layers 2 {quick} --compare --out small
        evaluate --ckpt small --data text --seq-len 64 --json results.json
        extras.export --ckpt small --out hf
        extras.export --ckpt small --out meta --format meta
        evaluate --ckpt hf --data text --seq-len 64
        evaluate --ckpt meta --data text --seq-len 64
        grasp --ckpt hf --layer-ids 3 --threshold 0.5 --iterative {quick} --calibration text --eval none --out again
        extras.recover --ckpt small --data alpaca.json --held-out 2 --batch-size 2 --seq-len 64 --out recovered
        extras.controls random --ckpt small
        extras.controls dropped --ckpt small
        extras.controls svd --ckpt small
        extras.generate --ckpt small --max-new-tokens 3
        extras.generate --ckpt small --throughput --max-new-tokens 3 --batch-sizes 1 --lengths 4 --repeats 1
        extras.plot small --layer-ids 5 --matrix layers.5.attention.wk --seq-len 16 --windows 1
        extras.ablation seeds --layers 1 --seeds 1 2 {quick}
        extras.fisher --budget 0.1 {quick}
        extras.compare --layers 1 {quick} --json compare.json
        extras.bench --samples 2 --seq-len 16 --repeats 1 --svd --autograd
        extras.bench --memory 2
        extras.zeroshot --ckpt small --local zeroshot --tasks openbookqa --limit 2
        evaluate --data wikitext2
        evaluate --data ptb
        """
    done = []
    for name, *words in map(str.split, commands.strip().splitlines()):
        sys.argv = [name, *words]
        try:
            code = evaluate.command(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code
        done.append([" ".join(sys.argv), code])
    return done


def test_every_command_runs_with_processes_connections_and_pickles_forbidden(tmp_path):
    from data.corpus import PTB, WIKITEXT
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    env = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "home"),
           "HF_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
           "GRASP_DATA": ""}
    child = subprocess.run([sys.executable, __file__, str(tmp_path)], cwd=tmp_path / "work", env=env, text=True,
                           capture_output=True)
    assert child.returncode == 0, child.stderr
    done, seen = json.loads(child.stdout.splitlines()[-1])
    *offline, wikitext2, ptb = done
    assert [code for _, code in offline] == [None] * len(offline), child.stderr
    assert wikitext2[1] == ptb[1] == 2  # they would download, over https, and that is all that was ever tried
    tried = [event for event in seen if not event.startswith(LIBRARIES)]
    assert [event.split("'")[1] for event in tried] == [WIKITEXT, PTB + "ptb.valid.txt"], tried
    assert WIKITEXT.startswith("https://") and PTB.startswith("https://")
    run = {words.split()[0] for words, _ in done}
    assert run == {"grasp", "evaluate", *(f"extras.{file.stem}" for file in ROOT.glob("extras/[a-z]*.py"))} - {
        "extras.smollm2", "extras.make_tiny", "extras.faults", "extras.crashes"}
    # the first asks pip, the second trains for two minutes; the last two are there to break things, and start processes


def test_the_hook_sees_what_it_is_there_for(tmp_path):
    for code in ("import socket; socket.create_connection(('localhost', 1))", "import os; os.system('true')",
                 "import pickle; pickle.loads(pickle.dumps(print))", "open('../elsewhere', 'w')"):
        code = f"import test_safety; test_safety.forbid([], {str(tmp_path)!r})\n{code}"
        child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
        assert "forbidden: " in child.stderr, code


def test_the_source_names_nothing_that_runs_what_it_reads():
    """pickle, eval, exec and the like; torch.load only with weights_only; processes and connections where they belong."""
    places = {"subprocess": set(), "urllib": set(), "torch.load": 0}
    for file in OURS:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {m.split(".")[0] for m in modules} & {"pickle", "marshal", "shelve", "joblib", "dill", "socket",
                                                             "requests", "multiprocessing"}, file
            for name in {m.split(".")[0] for m in modules} & {"subprocess", "urllib"}:
                places[name].add(file.name)
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "os.system", "os.popen"}, f"{file}: {called}"
                if called.endswith((".load", "load")) and "torch" in called:
                    places["torch.load"] += 1
                    assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), file
                if called == "np.load" or called == "numpy.load":
                    assert not any(k.arg == "allow_pickle" for k in node.keywords), file
    assert places["urllib"] == {"corpus.py"} and places["torch.load"] == 5
    assert places["subprocess"] == {"smollm2.py", "crashes.py"}


if __name__ == "__main__":
    seen = []
    forbid(seen, sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        done = run_everything()
    print(json.dumps([done, seen]))
