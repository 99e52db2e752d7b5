"""Perplexity of a dense or compressed model on texts.

    python evaluate.py --ckpt FOLDER --data wikitext2 ptb

text -> one stream of tokens -> windows that do not overlap -> exp of the mean negative log-likelihood (NLL)
"""
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.corpus import TEXTS, consecutive_windows, load_text
from data.files import error_prefix, write_json
from data.tokenizer import Tokenizer
from model import Transformer

Texts = dict[str, tuple[Tensor, dict]]  # label -> (windows (n, seq_len) int64, protocol)


@torch.no_grad()
def perplexity(model: Transformer, batches: Iterable[Tensor]) -> float:
    """exp of the mean NLL (nats) per predicted token over batches (B, T) int64 of equally long windows.

    Each window predicts its tokens 1..T-1. Raises ValueError if the result is NaN or infinite.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    count = torch.zeros((), dtype=torch.int64)  # of predicted tokens
    for tokens in batches:
        tokens = tokens.to(model.device)
        total += sum(nll.double() for nll in model.losses(model.final_state(tokens), tokens))
        count += tokens[:, 1:].numel()
    if dist.is_initialized():  # torchrun: each process has read its part of the windows
        dist.all_reduce(total)
        dist.all_reduce(count)
    if not count:
        raise ValueError("no batches of tokens: the sweep is empty or used up")
    mean = (total / count).cpu()
    if not mean.exp().isfinite():
        raise ValueError(f"no finite perplexity: the mean loss is {mean.item():.4g} nats per token in "
                         f"{model.dtype}; try --dtype bfloat16 or float32")
    return mean.exp().item()


def evaluation_windows(names: list[str], tokenizer: Tokenizer, seq_len: int, limit: int | None = None,
                       data_dir: str | None = None) -> Texts:
    """The windows of each text (limit: only the first ones), with the protocol of its perplexity."""
    texts = {}
    for name in names:
        text, source = load_text(name, "test", data_dir)
        tokens = tokenizer.stream(text)
        with error_prefix(name):
            windows = consecutive_windows(tokens, seq_len, limit)
        label = Path(name).name  # of a file; its whole path if that name is taken
        label = name if label in texts or (label, "test") in TEXTS else label
        texts[label] = windows, {"text": source, "tokens": len(tokens), "windows": len(windows),
                                 "seq_len": seq_len, "all_windows": len(tokens) // seq_len,
                                 "bos": tokenizer.bos_id is not None}
    return texts


def result_row(name: str, model: Transformer, texts: Texts, batches: Callable[..., Iterable[Tensor]],
               seconds: float | None = None) -> dict:
    """Evaluate a model: one row of the table. seconds: what it took to make the model.

    batches(windows, label=...): the micro-batches of a text's windows, with progress under that label.
    """
    results = {label: perplexity(model, batches(windows, label=f"{name} on {label}"))
               for label, (windows, _) in texts.items()}
    return {"model": name, "parameters": model.n_params, "perplexity": results, "seconds": seconds}


def table(rows: list[dict], texts: Texts, dense_params: int) -> str:
    """The rows as a Markdown table, with the texts' protocols under it."""
    head = ["model", "parameters", "kept %", *(f"{label} ppl" for label in texts), "seconds"]
    cells = [[row["model"], f"{row['parameters']:,}", f"{100 * row['parameters'] / dense_params:.1f}",
              *(f"{row['perplexity'][label]:.2f}" for label in texts),
              "-" if row["seconds"] is None else f"{row['seconds']:.1f}"] for row in rows]
    return f"{markdown(head, cells)}\n\n{protocols(texts)}"


def protocols(texts: Texts) -> str:
    """A line for each text: its source, its tokens and the windows evaluated."""
    return "\n".join(
        f"{label}: {p['text']}; {p['tokens']:,} tokens, {'first ' * (p['windows'] < p['all_windows'])}"
        f"{p['windows']} window{'s' * (p['windows'] > 1)} of {p['seq_len']:,}, "
        f"{'BOS once at the start' if p['bos'] else 'no BOS'}" for label, (_, p) in texts.items())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
                     for row in (head, rule, *rows))


def main() -> None:
    from runtime import cli  # here, because runtime/job.py stands on this file
    p, seconds = cli.Parser(__doc__), {}
    cli.model_flags(p, "what to evaluate")
    cli.evaluation_flags(p).add_argument("--seq-len", type=cli.positive, metavar="T", help=(
        "tokens in a window (default: 2048, or the model's maximum if less)"))
    p.add_argument_group("output").add_argument("--json", type=cli.json_file, metavar="FILE", help=(
        "also write the results to this file"))
    cli.machine_flags(p, batches=True, offload=True)
    a = p.parse_args()
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype, a.offload)
    seq_len = cli.sequence_length(a.seq_len, 2048, model)
    texts = evaluation_windows(a.eval, tokenizer, seq_len, a.windows, a.data_dir)
    with cli.timed(seconds, "evaluation"):
        batches = partial(cli.batches, size=cli.batch_size(a.batch_size, seq_len, model))
        row = result_row(a.ckpt.name, model, texts, batches)
    row["seconds"] = seconds["evaluation"]
    print(f"\n{table([row], texts, model.n_params_dense)}")
    if a.json and cli.first_process():
        write_json(a.json, {**row, "protocol": {label: protocol for label, (_, protocol) in texts.items()}})


if __name__ == "__main__":
    from runtime.cli import command
    command(main, parallel=True)
