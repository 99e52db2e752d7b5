"""The lesson: the extras stand on the core, which knows none of them, and ask by name for what they need beyond it."""
import ast
import json
import shutil
import sys

import pytest

from tests.conftest import ROOT, error_of, run
from extras import plot, short_names, smollm2, zeroshot
from runtime import cli

DOCUMENTED = {file.stem: file for file in (ROOT / "extras").glob("[a-z]*.py")} | {
    file.parent.name: file.with_name("__init__.py") for file in (ROOT / "extras").glob("*/__main__.py")}


def test_the_core_imports_none_of_them_and_no_optional_package():
    optional = "extras safetensors tokenizers tiktoken gguf matplotlib lm_eval transformers datasets".split()
    code = ("import json, sys, grasp, evaluate\n"
            "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))")
    done = run("-c", code, cwd=ROOT)
    assert done.returncode == 0 and not set(optional) & set(json.loads(done.stdout)), done.stderr


MAY_IMPORT = {"model": [], "attribution": ["model"], "data": ["model", "data"], "evaluate": ["model", "data"],
              "runtime": ["model", "data", "evaluate", "runtime"],
              "grasp": ["model", "attribution", "data", "runtime"]}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_of_the_core_go_one_way(part):
    """At the top of a file. Only evaluate's command imports more, inside its main."""
    for file in [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else (ROOT / part).glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            ours = {name.split(".")[0] for name in names} & MAY_IMPORT.keys()
            assert ours <= {*MAY_IMPORT[part]}, f"{file.name} imports {ours}"


def test_model_py_alone_runs(tmp_path):
    """Copied to another place, without the rest of the project."""
    shutil.copy(ROOT / "model.py", tmp_path)
    code = ("import torch; from model import ModelArgs, Transformer\n"
            "model = Transformer(ModelArgs(16, 2, 4, 2, 4, 24, 50, 1e-5))\n"
            "print(*model(torch.zeros(1, 5, dtype=torch.int64)).shape)")
    done = run("-c", code, cwd=tmp_path, env={"PYTHONPATH": ""})
    assert done.stdout == "1 5 50\n", done.stderr


def test_each_says_how_it_is_run_and_has_its_place_in_the_readmes():
    first, all_of_them = (ROOT / "README.md").read_text(), (ROOT / "extras/README.md").read_text()
    assert len(DOCUMENTED) == 14
    for name, file in DOCUMENTED.items():
        command = f"python -m extras.{name}"
        assert command in file.read_text() and command in all_of_them
        assert cli.Parser(ast.get_docstring(ast.parse(file.read_text()))).prog == command  # in its --help
        assert f"[{name}](extras/README.md#" in first


@pytest.mark.parametrize("main, words, package", [
    (smollm2.main, "there", "gguf"), (smollm2.main, "there", "safetensors"), (plot.main, "small", "matplotlib"),
    (zeroshot.main, "--local .", "lm_eval")])
def test_a_missing_package_is_one_line(main, words, package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small/report.json").write_text(json.dumps({
        "settings": {"ckpt": str(ROOT / "data/tiny"), "score": "taylor", "dtype": "torch.float32"},
        "cosines": [0.5] * 8, "redundant": [3], "matrices": []}))
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs the package {package}: pip install {package}" in error_of(main, words, monkeypatch, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_folders_are_named_shortly_unless_two_would_be_alike():
    assert short_names(["a/small", "b/big"]) == ["small", "big"]
    assert short_names(["a/small", "b/small"]) == ["a/small", "b/small"]
