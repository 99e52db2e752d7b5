"""What the commands that compress share: the texts of a run, its sweeps, its table and its report."""
import argparse
from collections.abc import Iterator

from torch import Tensor

from data.corpus import calibration_windows
from data.tokenizer import Tokenizer
from evaluate import evaluation_windows, result_row, table
from model import Transformer
from runtime import cli


class Job:
    """One run of a command on a model.

    a: parsed flags, those of cli.calibration_flags, evaluation_flags and machine_flags among them.
    layers: how many layers have their gradients summed, for the size of a micro-batch on CUDA.
    """
    def __init__(self, a: argparse.Namespace, model: Transformer, layers: int = 0):
        self.a, self.model, self.before = a, model, model.n_params
        self.rows, self.seconds = [], {}
        self.seq_len = cli.sequence_length(a.seq_len, 512, model)
        self.eval_len = cli.sequence_length(None, 2048, model)
        self.size = cli.batch_size(a.batch_size, self.seq_len, model, layers)  # sequences in a micro-batch
        self.eval_size = cli.batch_size(a.batch_size, self.eval_len, model)

    def read(self, tokenizer: Tokenizer) -> None:
        """Read the calibration set and the evaluation texts, and print what the first one is."""
        a = self.a
        self.windows, self.calibration = calibration_windows(
            tokenizer, a.calibration, a.samples, self.seq_len, a.seed, a.data_dir)
        self.size = min(self.size, a.samples)
        self.read_texts(tokenizer)
        print(f"calibration  {self.calibration['protocol']}, batches of {self.size}\n")

    def read_texts(self, tokenizer: Tokenizer) -> None:
        a = self.a
        self.texts = evaluation_windows(a.eval, tokenizer, self.eval_len, a.windows, a.data_dir)

    def sweep(self, label: str) -> Iterator[Tensor]:
        """Yield the calibration set's batches (B, seq_len) int64. Their time is added to seconds[label]."""
        with cli.timed(self.seconds, label, self.model.device):
            yield from cli.batches(self.windows.to(self.model.device), self.size, label)

    def evaluate(self, name: str | None = None, seconds: float | None = None) -> dict:
        """Evaluate the model as it is now and add a row to the table. seconds: what it took to make it."""
        name = name or ("dense" if self.model.n_params == self.model.n_params_dense else "input")
        self.rows.append(result_row(name, self.model, self.texts, self.eval_size, seconds))
        return self.rows[-1]

    def table(self) -> str:
        return table(self.rows, self.texts, self.model.n_params_dense)

    def achieved(self) -> str:
        left = self.model.n_params
        return f"{left:,} parameters left of {self.before:,}, {100 * (1 - left / self.before):.1f} % removed"

    def report(self, settings: dict | None = None, **more) -> dict:
        """What report.json says of a run. settings: those that the command found itself. more: its fields."""
        return {"settings": {**vars(self.a), "seq_len": self.seq_len, "device": str(self.model.device),
                             "dtype": str(self.model.dtype), **(settings or {})},
                "versions": cli.versions(), "parameters_before": self.before,
                "parameters_after": self.model.n_params, "calibration": self.calibration,
                "protocol": {label: protocol for label, (_, protocol) in self.texts.items()},
                "results": self.rows, "seconds": self.seconds, **more}
