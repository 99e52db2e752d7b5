"""What the commands that compress share: the texts of a run, its sweeps, its table and its report."""
import platform
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from data.corpus import calibration_windows
from data.tokenizer import Tokenizer
from evaluate import evaluation_windows, result_row, table
from model import Transformer
from runtime import cli


class Job:
    """One run of a command on a model.

    rows: of the table. seconds: of each phase. size, eval_size: sequences in a micro-batch of a sweep and
    of an evaluation. windows (samples, seq_len) int64, calibration: after `calibrate`. texts: after
    `read_texts`.
    """
    def __init__(self, model: Transformer, samples: int, seq_len: int | None, batch_size: int | None,
                 layers: int | None = None):
        """layers: how many layers' gradients a sweep sums, which sets the micro-batch on CUDA. None: the
        command keeps more than gradients, so a micro-batch has 1,024 tokens there, too."""
        self.model, self.before, self.dense = model, model.n_params, model.n_params_dense
        self.rows, self.seconds = [], {}
        self.samples, self.seq_len = samples, cli.sequence_length(seq_len, 512, model)
        self.eval_len = cli.sequence_length(None, 2048, model)
        size = cli.batch_size(batch_size, self.seq_len, model if layers else None, layers or 0)
        self.size, self.eval_size = min(size, samples), cli.batch_size(batch_size, self.eval_len, model)
        self.eval_batches = partial(cli.batches, size=self.eval_size)

    def calibrate(self, tokenizer: Tokenizer, text: str, seed: int, data_dir: str | None) -> None:
        """Read the calibration set and print what it is."""
        self.windows, self.calibration = calibration_windows(
            tokenizer, text, self.samples, self.seq_len, seed, data_dir)
        print(f"calibration  {self.calibration['protocol']}, batches of {self.size}\n")

    def read_texts(self, tokenizer: Tokenizer, names: list[str], limit: int | None,
                   data_dir: str | None) -> None:
        """Read the texts to evaluate on."""
        self.texts = evaluation_windows(names, tokenizer, self.eval_len, limit, data_dir)

    def sweep(self, label: str) -> Iterator[Tensor]:
        """Yield the calibration set's batches (B, seq_len) int64. Their time is added to seconds[label]."""
        with cli.timed(self.seconds, label, self.model.device):
            yield from cli.batches(self.windows.to(self.model.device), self.size, label)

    def evaluate(self, name: str | None = None, seconds: float | None = None) -> dict:
        """Evaluate the model as it is now and add a row to the table. seconds: what it took to make it."""
        name = name or ("dense" if self.model.n_params == self.dense else "input")
        self.rows.append(result_row(name, self.model, self.texts, self.eval_batches, seconds))
        return self.rows[-1]

    def table(self) -> str:
        return table(self.rows, self.texts, self.dense)

    def achieved(self) -> str:
        left = self.model.n_params
        return f"{left:,} parameters left of {self.before:,}, {100 * (1 - left / self.before):.1f} % removed"

    def report(self, settings: dict, **more) -> dict:
        """What report.json says of a run. settings: of the command. more: its own fields."""
        return {"settings": {**settings, "seq_len": self.seq_len, "device": str(self.model.device),
                             "dtype": str(self.model.dtype)},
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "calibration": self.calibration,
                "protocol": {label: protocol for label, (_, protocol) in self.texts.items()},
                "parameters_before": self.before, "parameters_after": self.model.n_params,
                "seconds": self.seconds, "results": self.rows, **more}
