"""The lesson: what a run will do is known before it: layers, ratio, parameters, bytes."""
import json
import shutil

import pytest

import grasp
from tests.conftest import error_of, output_of, random_model
from grasp import compress
from model import load_checkpoint
from runtime import files
from runtime.cli import TINY
from runtime.plan import dense_matrices, parameters_left, plan

QUICK = "--samples 4 --seq-len 32 --windows 1"


def test_the_parameters_left_are_those_of_the_compressed_model():
    model = random_model()
    expected = parameters_left(model, [1, 3], 0.3)
    assert expected < model.n_params == parameters_left(model, [1, 3], None)
    list(compress(model, [1, 3], None, ratio=0.3, score="magnitude"))
    assert model.n_params == expected == parameters_left(model, [1, 3], 0.3)  # nothing dense is left


@pytest.mark.parametrize("layers, layer_ids, remove", [(None, None, 0.2), (3, None, 0.1),
                                                       (None, [0, 5], 0.05)])
def test_remove_takes_a_ratio_that_reaches_it(layers, layer_ids, remove):
    """At most one more component of each matrix goes than would have to."""
    model = load_checkpoint(TINY)
    n, ratio, _ = plan(model, layers, layer_ids, None, remove)
    ids, target = layer_ids or range(n), (1 - remove) * model.n_params
    assert n == (layers or len(layer_ids or []) or n)
    more = sum(map(sum, dense_matrices(model, ids).values()))  # (m + n) parameters in a component
    assert target - more < parameters_left(model, ids, ratio) <= target
    if not (layers or layer_ids):  # the fewest layers that reach it at ratio 0.1
        assert parameters_left(model, range(n), 0.1) <= target < parameters_left(model, range(n - 1), 0.1)


def test_more_than_the_layers_have_cannot_be_removed():
    with pytest.raises(ValueError, match="--remove 0.9: 1 of 4 layers cannot lose that many parameters"):
        plan(random_model(), 1, None, None, 0.9)


def test_layers_that_are_not_alike_are_to_be_named():
    model = random_model()
    list(compress(model, [3], None, ratio=0.3, score="magnitude"))
    with pytest.raises(ValueError, match="--remove needs --layer-ids on a compressed folder"):
        plan(model, 2, None, None, 0.1)
    n, ratio, _ = plan(model, None, [0, 1], None, 0.1)
    assert n == 2 and parameters_left(model, [0, 1], ratio) <= 0.9 * model.n_params


def test_a_run_does_what_its_plan_says(nowhere, capsys):
    out = output_of(grasp.main, f"--remove 0.15 --eval none {QUICK}", capsys)
    report = json.loads((nowhere / "tiny-grasp/report.json").read_text())
    asked = f"remove 0.15, so ratio {report['settings']['ratio']} of"
    layers = f"{len(report['redundant'])} layers"
    size = f"at most {report['parameters_after']:,} parameters, 0.003 GiB\n"
    assert f"method       {asked} {layers}" in out and size in out and f"asked: {asked}" in out
    assert report["parameters_after"] <= 0.85 * report["parameters_before"]


def test_a_full_disk_is_found_before_the_sweep(nowhere, monkeypatch, capsys):
    usage = shutil.disk_usage(nowhere)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("runtime.job.calibration_windows", None)
    line = error_of(grasp.main, f"--layers 2 {QUICK}", monkeypatch, capsys)
    assert "tiny-grasp: needs 2,826,112 bytes, only 1,000 are free there" in line


def test_layers_that_are_low_rank_already_are_not_compressed_again(nowhere, monkeypatch, capsys):
    output_of(grasp.main, f"--layer-ids 3 5 --eval none {QUICK}", capsys)
    compressed = f"--ckpt tiny-grasp --eval none --calibration embedded {QUICK}"
    line = error_of(grasp.main, f"{compressed} --layer-ids 5 3", monkeypatch, capsys)
    assert "layers [3, 5] are low-rank already; ask for more layers or others" in line
    out = output_of(grasp.main, f"{compressed} --layer-ids 3 4 --out again", capsys)
    assert "layers.4.attention.wq" in out and "layers.3" not in out
    report = json.loads((nowhere / "again/report.json").read_text())
    assert {record["name"][:9] for record in report["matrices"]} == {"layers.4."}
    assert report["input"]["redundant"] == [3, 5] and report["input"]["input"] == {}
