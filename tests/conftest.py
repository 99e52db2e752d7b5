"""What the tests share: small random models, ways to run a command, and the real data where it is at hand."""
import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread is fastest beside other work

import pytest
import torch

from data import corpus
from model import ModelArgs, Transformer
from runtime import cli
from runtime.job import Job

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
    job = Job(model, 100, None, size)
    job.texts, job.windows, job.calibration = texts, windows, {}
    return job


SIZES = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=99, max_position_embeddings=512, rms_norm_eps=1e-5,
             initializer_range=0.3)
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}
MODELS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("Llama", {"rope_theta": 10000.0, "rope_scaling": LLAMA31}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None, "rope_theta": 5e5}),
}


def transformers_model(kind):
    """A small random model of the `transformers` library, of one of the four kinds in MODELS, in fp64."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    family, changes = copy.deepcopy(MODELS[kind])  # transformers changes the tables it is given
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


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


def smollm2_folder():
    return folder_in("GRASP_SMOLLM2",
                     "needs a real model: python -m extras.smollm2 FOLDER, then GRASP_SMOLLM2=FOLDER")


@pytest.fixture
def smollm2():
    """The folder that `python -m extras.smollm2` wrote."""
    return smollm2_folder()


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty folder to work in, without data."""
    monkeypatch.chdir(tmp_path)
    for variable in ("GRASP_DATA", "GRASP_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(corpus, "CACHE", tmp_path / "no-cache")
    return tmp_path


def another_tokenizer(folder):
    """Change the bytes of a SentencePiece model but not what it does: an unknown field (200), empty."""
    with open(Path(folder) / "tokenizer.model", "ab") as file:
        file.write(b"\xc2\x0c\x00")


def start(*words, cwd, env=None, **how):
    """Start `python WORDS` in the folder `cwd`, with this project on its path. Returns a Popen with pipes.

    env: {variable: value}, where they differ from this process's.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, env=env, text=True,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})


def run(*words, cwd, env=None):
    """Run `python WORDS` to its end: its returncode, stdout and stderr."""
    process = start(*words, cwd=cwd, env=env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(n, *words):
    """The words for `start` or `run` that start n processes. --standalone takes a port that is free."""
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, *words


def obey_all_signals():
    """In a child process (preexec_fn): undo what nohup or a shell's & ignore."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def outcome(main, words, capsys):
    """(exit code, stdout, stderr) of a command in this process. words: a list, or a string to split."""
    words, before = words.split() if isinstance(words, str) else map(str, words), sys.argv
    sys.argv = ["command", *words]
    capsys.readouterr()
    try:
        code = cli.command(main) or 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return code, *capsys.readouterr()


def output_of(main, words, capsys):
    """What a command in this process prints. It must succeed."""
    code, out, err = outcome(main, words, capsys)
    assert code == 0, err
    return out


def error_of(main, words, monkeypatch, capsys):
    """The one line that a mistake prints."""
    monkeypatch.delenv("GRASP_DEBUG", raising=False)
    code, _, err = outcome(main, words, capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err
