"""What the tests share: small random models, and the real data where it is at hand."""
import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import corpus
from model import ModelArgs, Transformer
from runtime import cli
from runtime.job import Job

torch.set_num_threads(1)  # matrices this small gain nothing from a second thread

ROOT = Path(__file__).parent.parent


def random_model(dtype=torch.float64, tied=False, seed=0, **changes):
    """A small random LLaMA: 4 blocks, grouped queries, m != n for all matrices but wq and wo."""
    fields = dict(dim=16, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=4, hidden_dim=24, vocab_size=50,
                  norm_eps=1e-5)
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**{**fields, **changes}), tied).to(dtype).requires_grad_(False)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    return model


def random_tokens(model, B, T, seed=1):
    return torch.randint(model.args.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def job_of(model, texts, size=2, windows=None):
    """A Job on a model, with these texts and calibration windows, in micro-batches of `size` sequences."""
    job = Job(argparse.Namespace(seq_len=None, batch_size=size), model)
    job.texts, job.windows = texts, windows
    return job


def folder_in(variable, otherwise):
    """The folder that an environment variable names. Without it the test is skipped, with what it needs."""
    if not os.environ.get(variable):
        pytest.skip(otherwise)
    return Path(os.environ[variable])


@pytest.fixture
def data_dir():
    """The folder with wikitext-2-raw/ and ptb/."""
    return folder_in("GRASP_DATA",
                     "needs real text: set GRASP_DATA to a folder with wikitext-2-raw/ and ptb/")


@pytest.fixture
def smollm2():
    """The folder that `python -m extras.smollm2` wrote."""
    return folder_in("GRASP_SMOLLM2",
                     "needs a real model: python -m extras.smollm2 FOLDER, then GRASP_SMOLLM2=FOLDER")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty folder to work in, without data and without a network."""
    monkeypatch.chdir(tmp_path)
    for variable in ("GRASP_DATA", "GRASP_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(corpus, "CACHE", tmp_path / "no-cache")

    def refuse(url):
        raise OSError("no network")

    monkeypatch.setattr(corpus, "fetch", refuse)
    return tmp_path


def obey_all_signals():
    """In a child process: undo what nohup or a shell's & ignore."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(script, *words, cwd):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], cwd=cwd,
                          capture_output=True, text=True)


def error_of(main, words, monkeypatch, capsys):
    """The one line that a mistake prints."""
    monkeypatch.setattr(sys, "argv", ["command", *words.split()])
    monkeypatch.delenv("GRASP_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.command(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err
