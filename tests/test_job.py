"""The lesson: what all commands that compress share is one object: texts, sweeps, rows, seconds and the report."""
import pytest
import torch

from evaluate import perplexity
from runtime import cli
from runtime.job import Job
from tests.conftest import job_of, random_model, random_tokens


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


def test_rows_are_of_the_model_as_it_is_at_that_moment():
    model, windows = random_model(), random_tokens(random_model(), 3, 12)
    job = job_of(model, {"text": (windows, None)})
    assert job.evaluate()["model"] == "dense"
    whole = perplexity(model, windows.split(2))
    model.layers[0].feed_forward.w2.weight.zero_()
    row = job.evaluate("other", 1.5)
    assert job.rows[0]["perplexity"] == {"text": whole} and row["perplexity"] == {"text": perplexity(model, [windows])}
    assert row["seconds"] == 1.5 and job.achieved() == f"{model.n_params:,} parameters left of {model.n_params:,}, 0.0 % removed"


def test_the_report_says_what_ran(capsys):
    job = tiny()
    job.evaluate()
    report = job.report({"samples": 6, "seq_len": None}, more=1)
    assert report["settings"] == {"samples": 6, "seq_len": 64, "device": "cpu", "dtype": "torch.float32"}
    assert report["versions"]["torch"] == torch.__version__ and report["results"] == job.rows and report["more"] == 1 and len(report["calibration"]["offsets"]) == 6
    assert report["protocol"]["embedded"]["windows"] == 3 and "parameters_after" not in report
    made = job.made({})
    assert made["parameters_before"] == made["parameters_after"] == 886_368 and made["seconds"] is job.seconds


def test_an_error_in_a_sweep_passes(capsys):
    job = tiny()
    with pytest.raises(ZeroDivisionError):
        for batch in job.sweep("attribution"):
            1 / 0
    assert len(list(job.sweep("attribution"))) == 1  # and the next sweep is whole again
