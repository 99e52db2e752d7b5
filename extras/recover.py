"""GRASP*: recovery training of the factors in a compressed folder, on Alpaca's records [GRASP §3.2, Table 6].

    python -m extras.recover --ckpt COMPRESSED --data alpaca.json --out FOLDER

Only A and B of the replaced matrices learn; all else stays as it is. For comparison, `--lora R` trains adapters beside
the matrices of a dense folder, on the same batches, and adds them in at the end.

    tokens, labels   (B, T) int64; a label is its token, or -100 where nothing is to be predicted (padding, prompts)
    step             one update from `batch` records, whose gradients come in micro-batches
    state            OUT.state: factors, AdamW's moments, step; the same command goes on from there when interrupted
"""
import hashlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from attribution import backward
from data.checkpoint import save_checkpoint
from data.files import atomic_write, check_output, error_prefix, optional_json
from extras import linear, peak_bytes
from model import LowRankLinear, matrix_names, upcast
from runtime import cli

# Alpaca's own two templates (github.com/tatsu-lab/stanford_alpaca): models tuned on it know these words.
WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
WITHOUT_INPUT = "Below is an instruction that describes a task. " + WRITE + "### Response:\n"
WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
              + WRITE + "### Input:\n{input}\n\n### Response:\n")


def read_records(file):
    """([{instruction, input, output}], SHA-256) of Alpaca's JSON file. ValueError: what is not so."""
    content = file.read_bytes()
    try:
        records = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not JSON ({e})") from None
    for i, record in enumerate(records if isinstance(records, list) and records else [None]):
        fields = {"input": "", **record} if isinstance(record, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("instruction", "input", "output")):
            raise ValueError(f"{file}: record {i}: expected a list of records with the strings instruction, output "
                             "and, where there is one, input")
    return records, hashlib.sha256(content).hexdigest()


def tokenize(record, tokenizer, length, response_only=False):
    """(tokens, labels), each (T,) int64, T at most `length`: BOS, prompt, response, and an end where there is room."""
    prompt = (WITH_INPUT if record.get("input") else WITHOUT_INPUT).format_map(record)
    end = torch.tensor(tokenizer.ends[:1], dtype=torch.int64)
    tokens = torch.cat([tokenizer.stream(prompt + record["output"]), end])
    labels = tokens.clone()
    if response_only:
        labels[:len(tokenizer.stream(prompt))] = -100
    return tokens[:length], labels[:length]


def order(lengths, batch, generator):
    """The batches of one epoch, as lists of indices: records of like length together, the batches in random order."""
    shuffled = torch.randperm(len(lengths), generator=generator)
    alike = shuffled[torch.tensor(lengths)[shuffled].argsort(stable=True)].split(batch)
    return [alike[i].tolist() for i in torch.randperm(len(alike), generator=generator)]


def micro_batches(examples, size, device):
    """Yield tokens, labels (size, T), filled on the right, where causal attention sees them from nowhere else."""
    for start in range(0, len(examples), size):
        tokens, labels = zip(*examples[start:start + size])
        yield (nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device),
               nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(device))


def predicted(examples):
    """How many tokens are predicted in [(tokens, labels)]; a sequence's first never is."""
    return sum(int((labels[1:] != -100).sum()) for _, labels in examples)


def mixed(model):
    """Products in bf16 on CUDA, and where the frozen weights are half; the factors and their sums stay fp32."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half or model.device.type == "cuda")


@torch.no_grad()
def mean_loss(model, examples, micro_batch):
    """Mean negative log-likelihood (nats) per predicted token of [(tokens, labels)]."""
    total = 0.0
    for tokens, labels in micro_batches(examples, micro_batch, model.device):
        with mixed(model):
            total += sum(nll.double() for nll in model.losses(model.final_state(tokens), labels))
    return (total / predicted(examples)).item()


def update(model, factors, optimizer, examples, micro_batch):
    """One step of AdamW on the mean loss per predicted token of the whole batch; that loss, in nats.

    ValueError if the gradient is not finite: the factors are still as they were.
    """
    total, count = 0.0, predicted(examples)
    for tokens, labels in micro_batches(examples, micro_batch, model.device):
        with mixed(model):  # once a micro-batch, for autocast keeps the cast weights while it lasts
            total += backward(model, tokens, labels, scale=1 / count)
    if not nn.utils.clip_grad_norm_(factors.values(), 1.0).isfinite():
        raise ValueError("the gradient is not finite; try a smaller --lr, or --dtype float32")
    optimizer.step()
    optimizer.zero_grad()
    return float(total) / count


def learning_rate(step, steps, peak):
    """Linear from 0 to `peak` in 100 steps, a tenth of all at most, and linear to 0 after the last."""
    warmup = min(100, steps // 10)
    return peak * ((step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup))


class LoRALinear(LowRankLinear):
    """y = W x + 2 A (B x), W frozen, A zero at first [arXiv 2106.09685, alpha = 2 r]."""
    def __init__(self, W, rank, generator):
        m, n = W.shape
        B = (torch.rand(rank, n, generator=generator) * 2 - 1) / n ** 0.5
        wide = torch.promote_types(W.dtype, torch.float32)
        super().__init__(torch.zeros(m, rank).to(W.device, wide), B.to(W.device, wide))
        self.W = W

    def forward(self, x):
        return F.linear(x, self.W) + 2 * super().forward(x)

    def merged(self):
        return linear((upcast(self.W) + 2 * self.A @ self.B).type_as(self.W))


def prepare(model, lora=None, seed=0):
    """{name: parameter}, fp32 at least: the factors to train, or new adapters of rank `lora` beside every matrix."""
    low_rank = any(isinstance(module, LowRankLinear) for module in model.modules())
    if low_rank == bool(lora):
        raise ValueError("--lora is for dense matrices, this folder has low-rank ones" if lora else
                         "no low-rank matrices to train in this folder: compress it first, or pass --lora RANK")
    generator = torch.Generator().manual_seed(seed)
    for name in matrix_names(*range(model.args.n_layers)):
        module = model.get_submodule(name)
        if lora:
            model.set_submodule(name, LoRALinear(module.weight, lora, generator))
        elif isinstance(module, LowRankLinear):
            for factor in (module.A, module.B):
                factor.data = upcast(factor.data).clone()  # apart from the file it was mapped from
    return {name: p.requires_grad_(True) for name, p in model.named_parameters() if name.endswith((".A", ".B"))}


def finish(model, dtype):
    """The trained model as a folder has it: factors in the folder's dtype, adapters added into their matrices."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
        elif isinstance(module, LowRankLinear):
            module.A.data, module.B.data = module.A.data.to(dtype), module.B.data.to(dtype)
    return model.requires_grad_(False)


def load_state(file, settings, factors, optimizer):
    """(steps done, log so far): the factors and the optimizer as they were. ValueError for another run's state."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        begun = state["settings"]
    except Exception as e:
        raise ValueError(f"{file}: not a state of this command ({type(e).__name__}); delete it to begin anew") from None
    other = sorted(name for name in settings if begun.get(name) != settings[name])
    if other:
        raise ValueError(f"{file}: begun with other settings ({other[0]} {begun.get(other[0])}, now "
                         f"{settings[other[0]]}); delete it to begin anew")
    for name, p in factors.items():
        p.data.copy_(state["factors"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["log"]


def train(model, factors, examples, held_out, settings, state_file, save_every):
    """All steps, from the saved state if there is one: the log [{step, loss, held_out}] (nats per predicted token)."""
    s, generator = settings, torch.Generator().manual_seed(settings["seed"])
    batches = [batch for _ in range(s["epochs"])
               for batch in order([len(tokens) for tokens, _ in examples], s["batch_size"], generator)]
    optimizer = torch.optim.AdamW(factors.values(), lr=s["lr"], weight_decay=0.0)
    done, log = load_state(state_file, s, factors, optimizer) if state_file.exists() else (0, [])
    tokens_seen, losses = 0, []

    def mark(step, speed=""):
        loss, other = sum(losses) / len(losses) if losses else None, mean_loss(model, held_out, s["micro_batch"])
        log.append({"step": step, "loss": loss, "held_out": other})
        print(f"step {step:5}/{len(batches)}  loss {'-' if loss is None else format(loss, '.4f'):>6}  "
              f"held out {other:.4f}  {speed}".rstrip())
        losses.clear()

    if done:
        print(f"going on from {state_file}, {done} of {len(batches)} steps done")
    else:
        mark(0)
    start = time.monotonic()
    for step in range(done, len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), s["lr"])
        batch = [examples[i] for i in batches[step]]
        losses.append(update(model, factors, optimizer, batch, s["micro_batch"]))
        tokens_seen += sum(len(tokens) for tokens, _ in batch)
        spent = time.monotonic() - start
        speed = (f"{tokens_seen / spent:.0f} tokens/s  "
                 f"{spent * (len(batches) - step - 1) / (step + 1 - done):.0f} s left")
        cli.show(f"step {step + 1}/{len(batches)}  loss {losses[-1]:.3f}  {speed}", last=step + 1 == len(batches))
        if (step + 1) % save_every == 0 or step + 1 == len(batches):
            mark(step + 1, speed)
            state = {"step": step + 1, "log": log, "settings": s, "optimizer": optimizer.state_dict(),
                     "factors": {name: p.detach() for name, p in factors.items()}}
            with error_prefix(state_file), atomic_write(state_file) as new:
                torch.save(state, new)
    return log


def weights_sha256(model):
    """Of the blocks, bit for bit: a saved state goes on with the weights that it was begun with, and no others."""
    digest = hashlib.sha256()
    for p in model.layers.parameters():
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def split(records, tokenizer, settings):
    """(training examples, held-out ones), each [(tokens, labels)], at random; records without a prediction left out."""
    s, shuffled = settings, torch.randperm(len(records), generator=torch.Generator().manual_seed(settings["seed"]))
    if not s["held_out"] < len(records):
        raise ValueError(f"{len(records)} records, too few to hold out {s['held_out']}")
    examples = [tokenize(records[i], tokenizer, s["seq_len"], s["response_only"])
                for i in shuffled[:s["held_out"] + (s["samples"] or len(records))]]
    parts = [[example for example in part if predicted([example])]
             for part in (examples[s["held_out"]:], examples[:s["held_out"]])]
    if not all(parts):
        raise ValueError(f"nothing to predict within the first {s['seq_len']} tokens of these records")
    return parts


def main():
    a = parse()
    records, digest = read_records(a.data)
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype)
    dtype, state_file = model.dtype, a.out.with_name(f"{a.out.name}.state")
    settings = {"weights_sha256": weights_sha256(model), "data_sha256": digest, "dtype": str(dtype),
                "batch_size": a.batch_size, "micro_batch": a.micro_batch, "lr": a.lr, "epochs": a.epochs,
                "seq_len": cli.sequence_length(a.seq_len, 256, model), "samples": a.samples, "held_out": a.held_out,
                "seed": a.seed, "response_only": a.response_only, "lora": a.lora}
    examples, held_out = split(records, tokenizer, settings)
    factors = prepare(model, a.lora, a.seed)
    steps = -(-len(examples) // a.batch_size) * a.epochs
    what, where = f"adapters of rank {a.lora}" if a.lora else "the factors", "responses" if a.response_only else "all"
    print(f"data         {a.data.name}: {len(examples):,} records of at most {settings['seq_len']} tokens, "
          f"{sum(len(t) for t, _ in examples):,} in all, and {len(held_out):,} held out; loss on {where}, "
          f"seed {a.seed}\ntraining     {what}, {sum(p.numel() for p in factors.values()):,} parameters of "
          f"{model.n_params:,}; AdamW, {steps} steps of {a.batch_size} records, {a.micro_batch} at a time, learning "
          f"rate {a.lr}\n"
          f"state        {state_file}, every {a.save_every} steps\n")
    log = train(model, factors, examples, held_out, settings, state_file, a.save_every)
    old = optional_json(a.ckpt / "report.json")
    report = {**old, "recovery": {"settings": settings, "log": log, "peak_bytes": peak_bytes(model.device)}}
    save_checkpoint(finish(model, dtype), a.out, report, tokenizer.files, a.overwrite)
    state_file.unlink()
    print(f"written to {a.out}")


def parse():
    p = cli.Parser(__doc__)
    add = cli.model_flags(p, "what to train", default=None, required=True, help="a compressed folder").add_argument
    add("--lora", type=cli.positive, metavar="R",
        help="a dense folder instead: train adapters of rank R, then add them in")
    add = p.add_argument_group("training").add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="Alpaca's JSON list of instruction, input, output")
    add("--response-only", action="store_true", help="loss on the responses alone")
    add("--samples", type=cli.positive, metavar="N", help="records to train on, at random (default: all)")
    add("--held-out", type=cli.positive, metavar="N", default=128, help="records to measure on alone (default: 128)")
    add("--epochs", type=cli.positive, metavar="N", default=1, help="passes over the records (default: 1)")
    add("--seq-len", type=cli.positive, metavar="T", help="of each (default: 256, or the model's maximum)")
    add("--batch-size", type=cli.positive, metavar="N", default=32, help="records in a step (default: 32)")
    add("--micro-batch", type=cli.positive, metavar="N", default=4, help="records at a time (default: 4)")
    add("--lr", type=float, default=3e-4, help="peak learning rate (default: 0.0003)")
    add("--seed", type=cli.seed, default=42, help="of the split, the order and adapters (default: 42)")
    add("--save-every", type=cli.positive, metavar="N", default=20, help="steps between states (default: 20)")
    cli.output_flags(p, "recovered")
    cli.machine_flags(p)
    a = p.parse_args()
    if not 0 < a.lr < 1:
        raise ValueError(f"--lr {a.lr}: expected more than 0 and less than 1")
    if not a.data.is_file():
        raise FileNotFoundError(f"--data {a.data}: no such file")
    check_output(a.out, a.overwrite)
    return a


if __name__ == "__main__":
    cli.command(main)
