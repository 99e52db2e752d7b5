"""The lesson: what a compressed folder is held against has its layers, its ranks or its norms, and nothing else."""
import json

import pytest
import torch

import grasp
from tests.conftest import error_of
from data.checkpoint import load_checkpoint
from extras import controls
from model import LowRankLinear
from runtime import cli
from runtime.cli import TINY


@pytest.fixture
def run(tmp_path, monkeypatch):
    """controls' main with these words, beside the folder `small` that grasp.py has just made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", "grasp.py --layer-ids 2 5 --threshold 0.5 --samples 2 --seq-len 32 --eval none "
                                    "--out small".split())
    grasp.main()

    def run(*words):
        monkeypatch.setattr("sys.argv", ["controls", "--ckpt", "small", *map(str, words)])
        controls.main()
    return run


def low_rank(folder):
    return {name: m for name, m in load_checkpoint(folder).named_modules() if isinstance(m, LowRankLinear)}


def test_dropped_layers_are_the_dense_model_without_them(run, tmp_path):
    run("dropped")
    dense, dropped, tokens = load_checkpoint(TINY), load_checkpoint(tmp_path / "small-dropped"), torch.arange(30)[None]
    assert dropped.args.n_layers == 6 and dropped.n_params == dropped.n_params_dense
    for layer in (2, 5):  # a block that adds nothing is as good as none
        dense.layers[layer].attention.wo.weight.zero_()
        dense.layers[layer].feed_forward.w2.weight.zero_()
    torch.testing.assert_close(dropped(tokens), dense(tokens))


@pytest.mark.parametrize("kind", ["dropped", "svd", "random"])
def test_a_control_of_the_embedded_model_is_evaluated_on_its_text(kind, run, tmp_path):
    run(kind, "--out", kind)
    assert cli.made_on_embedded(tmp_path / "small") and cli.made_on_embedded(tmp_path / kind)


def test_plain_svd_has_the_same_ranks_and_the_best_approximation(run, tmp_path):
    run("svd", "--out", "plain")
    ours, plain, dense = low_rank("small"), low_rank("plain"), load_checkpoint(TINY)
    ranks = {name: m.A.shape[1] for name, m in ours.items()}
    assert ranks == {name: m.A.shape[1] for name, m in plain.items()} and len(set(ranks.values())) > 5
    for name, m in plain.items():
        W = dense.get_submodule(name).weight
        error = torch.linalg.matrix_norm(W - m.A @ m.B) ** 2
        dropped = torch.linalg.svdvals(W.double())[ranks[name]:].pow(2).sum()  # [Eckart-Young]
        assert error.item() == pytest.approx(dropped.item(), rel=1e-3, abs=1e-6)
        assert error <= torch.linalg.matrix_norm(W - ours[name].A @ ours[name].B) ** 2 + 1e-5


def test_random_factors_have_the_norms_and_not_the_directions(run):
    run("random")
    ours, drawn = low_rank("small"), low_rank("small-random")
    assert ours.keys() == drawn.keys()
    for name, m in ours.items():
        for kept, noise in ((m.A, drawn[name].A), (m.B, drawn[name].B)):
            assert noise.norm().item() == pytest.approx(kept.norm().item(), rel=1e-5)
            assert torch.cosine_similarity(noise.flatten(), kept.flatten(), dim=0).abs() < 0.5
    same = load_checkpoint("small").layers[0].attention.wq.weight
    assert torch.equal(same, load_checkpoint("small-random").layers[0].attention.wq.weight)
    run("random", "--seed", 1, "--out", "other")
    assert not torch.equal(low_rank("other")["layers.2.attention.wq"].A, drawn["layers.2.attention.wq"].A)


@pytest.mark.parametrize("words, change, message", [
    ("dropped --out small/params.json", {}, "params.json: exists"),
    ("dropped --dense nowhere", {}, "nowhere: no such folder"),
    ("dropped", {"settings": {"ckpt": "gone", "score": "taylor", "dtype": "torch.float32"}}, "gone: no such folder"),
    ("dropped", {"redundant": [5, 2]}, "redundant is missing or not as grasp.py writes it"),
    ("dropped", {"redundant": [2, 5, 9]}, "tiny: a model of 8 layers, but the report is of layers [2, 5, 9]"),
    ("random --out small", {}, "small: exists; choose another"),
    ("random --dense small", {}, "--dense has no use with random"),
    ("svd --dense small", {}, "layers.2.attention.wq is low-rank, expected a dense matrix"),
    ("random --seed -1", {}, "argument --seed"),
    ("nothing", {}, "invalid choice: 'nothing'")])
def test_mistakes_are_one_line(words, change, message, run, tmp_path, monkeypatch, capsys):
    report = json.loads((tmp_path / "small/report.json").read_text())
    (tmp_path / "small/report.json").write_text(json.dumps({**report, **change}))
    assert message in error_of(lambda: run(*words.split()), "", monkeypatch, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
