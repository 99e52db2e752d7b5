"""The lesson: what all commands that compress share is one object: texts, sweeps, rows, seconds and the report."""
import json
import shutil

import pytest
import torch

import grasp
from evaluate import perplexity
from data import files
from runtime import cli
from runtime.job import Job
from tests.conftest import error_of, job_of, output_of, random_model, random_tokens

QUICK = "--samples 4 --seq-len 32 --windows 1"


def tiny(**changes):
    """A Job on the embedded model that has read its texts."""
    model, tokenizer = cli.open_checkpoint(cli.TINY, "cpu", "auto")
    job = Job(model, **{"samples": 6, "seq_len": 64, "batch_size": None, **changes})
    job.calibrate(tokenizer, "embedded", seed=7, data_dir=None)
    job.read_texts(tokenizer, ["embedded"], 3, None)
    return job


def test_the_calibration_set_is_read_once_and_swept_as_often_as_asked(capsys):
    job = tiny(batch_size=4)
    first, second = list(job.sweep("redundancy")), list(job.sweep("attribution"))
    assert [len(batch) for batch in first] == [4, 2] and torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(first), job.windows) and job.windows.shape == (6, 64)
    assert set(job.seconds) == {"redundancy", "attribution"} and all(s > 0 for s in job.seconds.values())
    assert "6 random windows of 64, seed 7, batches of 4\n\n" in capsys.readouterr().out


def test_sizes_come_from_the_model_and_the_flags():
    model = random_model(max_seq_len=128)
    job = Job(model, 100, None, None)
    assert (job.seq_len, job.eval_len, job.size, job.eval_size) == (128, 128, 8, 8)  # 1,024 tokens at a time
    assert Job(model, 3, 64, None).size == 3 and Job(model, 100, 64, 5).size == 5  # never more than there are
    with pytest.raises(ValueError, match="--seq-len 129: expected 2 to 128"):
        Job(model, 3, 129, None)


def test_on_cuda_only_a_sweep_of_gradients_takes_more_than_1024_tokens(monkeypatch):
    """A command that keeps moments or states beside them passes no layers."""
    asked = []
    monkeypatch.setattr(cli, "batch_size", lambda size, length, model=None, layers=0: asked.append(
        (model is not None, layers)) or 1)
    Job(random_model(), 9, 8, None)
    Job(random_model(), 9, 8, None, layers=2)
    assert asked == [(False, 0), (True, 0), (True, 2), (True, 0)]  # the second of each pair is for evaluations


def test_rows_are_of_the_model_as_it_is_at_that_moment():
    model, windows = random_model(), random_tokens(random_model(), 3, 12)
    job = job_of(model, {"text": (windows, None)})
    assert job.evaluate()["model"] == "dense"
    whole = perplexity(model, windows.split(2))
    model.layers[0].feed_forward.w2.weight.zero_()
    row = job.evaluate("other", 1.5)
    assert job.rows[0]["perplexity"] == {"text": whole}
    assert row["perplexity"] == {"text": pytest.approx(perplexity(model, [windows]), rel=1e-12)}
    assert row["seconds"] == 1.5 and job.achieved() == f"{model.n_params:,} parameters left of {model.n_params:,}, 0.0 % removed"


def test_the_report_says_what_ran(capsys):
    job = tiny()
    job.evaluate()
    report = job.report({"samples": 6, "seq_len": None}, more=1)
    assert report["settings"] == {"samples": 6, "seq_len": 64, "device": "cpu", "dtype": "torch.float32"}
    assert report["versions"]["torch"] == torch.__version__ and report["results"] == job.rows and report["more"] == 1 and len(report["calibration"]["offsets"]) == 6
    assert report["protocol"]["embedded"]["windows"] == 3
    assert report["parameters_before"] == report["parameters_after"] == 886_368 and report["seconds"] is job.seconds


def test_an_error_in_a_sweep_passes(capsys):
    job = tiny()
    with pytest.raises(ZeroDivisionError):
        for batch in job.sweep("attribution"):
            1 / 0
    assert len(list(job.sweep("attribution"))) == 1  # and the next sweep is whole again


# ------------------------------------------------------------------------------------- before and after the sweep

def test_a_full_disk_is_found_before_the_sweep(nowhere, monkeypatch, capsys):
    usage = shutil.disk_usage(nowhere)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("runtime.job.calibration_windows", None)
    line = error_of(grasp.main, f"--layers 2 {QUICK}", monkeypatch, capsys)
    assert "tiny-grasp: needs 3,545,472 bytes, only 1,000 are free there" in line


def test_layers_that_are_low_rank_already_are_not_compressed_again(nowhere, monkeypatch, capsys):
    output_of(grasp.main, f"--layer-ids 3 5 --eval none {QUICK}", capsys)
    compressed = f"--ckpt tiny-grasp --eval none --calibration embedded {QUICK}"
    line = error_of(grasp.main, f"{compressed} --layer-ids 5 3", monkeypatch, capsys)
    assert "layers [3, 5] are low-rank already; take more, others, or the dense model" in line
    out = output_of(grasp.main, f"{compressed} --layer-ids 3 4 --out again", capsys)
    assert "layers.4.attention.wq" in out and "layers.3" not in out
    report = json.loads((nowhere / "again/report.json").read_text())
    assert {record["name"][:9] for record in report["matrices"]} == {"layers.4."}
    assert report["input"]["redundant"] == [3, 5] and report["input"]["input"] == {}
