"""How the embedded model in data/tiny was made: `python -m extras.make_tiny FOLDER`, two minutes on 2 CPU cores.

A LLaMA of 8 blocks with grouped-query attention and its own SentencePiece vocabulary, trained on the language
reference that every Python carries; the last tenth of that text is held out.
"""
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
import torch

from data.checkpoint import save_checkpoint
from data.corpus import consecutive_windows, embedded_text, random_windows
from data.files import check_output
from data.tokenizer import load_tokenizer
from evaluate import perplexity
from model import ModelArgs, Transformer
from runtime import cli

ARGS = ModelArgs(dim=96, n_layers=8, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=256, vocab_size=1024,
                 norm_eps=1e-5, max_seq_len=256)
STEPS, BATCH, WARMUP, RATE = 450, 16, 50, 3e-3  # longer training overfits: the text has 122,954 tokens


def train_tokenizer(text, folder):
    """A byte-fallback BPE of ARGS.vocab_size pieces that changes no character of the text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=ARGS.vocab_size, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    return load_tokenizer(folder)


def initialise(model):
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # what is added to the residual stream starts smaller, the deeper the model
            deep = name.endswith(("wo.weight", "w2.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * ARGS.n_layers) if deep else 0.02)


def train(model, tokens, held_out):
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.3)
    start = time.monotonic()
    for step in range(STEPS):
        rate = RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        windows, _ = random_windows(tokens, BATCH, ARGS.max_seq_len, seed=step)
        loss = sum(model.losses(model.final_state(windows), windows)) / windows[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.3f}  held-out perplexity "
                  f"{perplexity(model, [held_out]):.2f}  {time.monotonic() - start:.0f} s")


def main():
    p = cli.Parser(__doc__)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="to write, a new one")
    folder = p.parse_args().folder
    check_output(folder)
    torch.manual_seed(42)
    text, held_out = embedded_text("train"), embedded_text("test")
    with TemporaryDirectory() as scratch:
        tokenizer = train_tokenizer(text, Path(scratch))
        tokens = tokenizer.stream(text)
        windows = consecutive_windows(tokenizer.stream(held_out), ARGS.max_seq_len)
        counts = torch.bincount(tokens, minlength=ARGS.vocab_size) + 1.0
        unigram = -(counts / counts.sum()).log()[windows[:, 1:]].mean().item()
        torch.empty(ARGS.vocab_size, ARGS.dim).normal_()  # embeddings of torch's own came first when data/tiny was made
        model = Transformer(ARGS, tied=True)
        initialise(model)
        print(f"{len(tokens):,} tokens, {model.n_params:,} parameters")
        train(model, tokens, windows)
        print(f"held-out perplexity {perplexity(model, [windows]):.2f}, "
              f"of a unigram model {math.exp(unigram):.2f}")
        save_checkpoint(model, folder, tokenizer=tokenizer.files)


if __name__ == "__main__":
    cli.command(main)
