"""How fast folders of weights are, here and in other engines: `python -m extras.throughput --ckpt FOLDER FOLDER`.

    this           this project: extras.generate
    transformers   the folder as extras.export writes it (hf, or hf-lowrank where hf would be dense again)
    llama.cpp      the folder as a GGUF file, run on the CPU by the package xllamacpp

A row for each batch size, length of prompt (random tokens), folder and engine, all in one dtype and with as many
threads [GRASP Fig. 5]. Every engine decodes greedily with a key/value cache in that dtype. Folders and engines take
turns, so that a machine that slows down slows them all alike; times are medians of --repeats turns, after one that does
not count. All are in memory, so there is no column for the peak.
"""
import itertools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch import nn

from data import need
from data.corpus import text_names
from evaluate import evaluation_windows, markdown, protocols, result_row
from extras import check_dtypes, export, short_names
from extras.export.__main__ import PACKAGES
from extras.export.dense import exported_params
from extras.generate import check_length, generate
from model import LowRankLinear
from runtime import cli

ENGINES = {"this": (), "transformers": ("transformers", *PACKAGES["hf"]),  # the packages that each needs
           "llama.cpp": ("xllamacpp", *PACKAGES["gguf"])}
GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def throughput(pairs, perplexities, batch_sizes, lengths, max_new_tokens, repeats, seed):
    """A Markdown table with a row for each batch size, prompt length and pair.

    pairs: (name, engine, model, run, bytes of weights). run(prompt, max_new_tokens) returns (seconds to the first
    token, seconds of the others); None where the engine cannot read the model. perplexities: {name: {text: value}}.
    """
    rows = []
    for B, T in itertools.product(batch_sizes, lengths):
        turns = [[] for _ in pairs]
        for turn in range(repeats + 1):
            for (name, engine, model, run, _), mine in zip(pairs, turns):
                cli.show(f"batch {B}, prompt {T}: {name}, {engine}, turn {turn}/{repeats}", last=False)
                if run:
                    mine.append(run(random_prompt(model, B, T, seed), max_new_tokens))
        for (name, engine, model, run, size), mine in zip(pairs, turns):
            mib = prefill = decode = "-"
            if run:
                first, rest = map(statistics.median, zip(*mine[1:]))  # the first turn does not count
                mib, prefill, decode = (f"{n:,.1f}" for n in (
                    size / 2 ** 20, B * T / first, B * (max_new_tokens - 1) / rest))
            rows.append([name, engine, str(model.dtype)[6:], f"{B}", f"{T}", f"{model.n_params:,}", mib,
                         *(f"{value:.2f}" for value in perplexities[name].values()), prefill, decode,
                         f"{multiply_adds(model, T) / 1e6:,.2f}"])
    cli.show("", last=True)
    texts = [f"{text} ppl" for text in perplexities[pairs[0][0]]]
    return markdown(["model", "engine", "dtype", "batch", "prompt", "parameters", "MiB", *texts, "prefill tokens/s",
                     "decode tokens/s", "M multiply-adds"], rows)


def random_prompt(model, B, T, seed):
    return torch.randint(model.args.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def weight_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def multiply_adds(model, T):
    """Multiply-adds for one new token that sees T (itself among them).

    The sizes of all weights it is multiplied by (dense W, or A and B, and the output head), and in each block
    2 T n_heads head_dim: queries with keys, and probabilities with values. Norms, rotations and softmax are left out.
    """
    linear = (m for m in model.modules() if isinstance(m, (nn.Linear, LowRankLinear)))
    a = model.args
    return sum(p.numel() for m in linear for p in m.parameters()) + len(model.layers) * 2 * T * a.n_heads * a.head_dim


# ------------------------------------------------------------------------------------------------ the engines

def open_engine(engine, model, tokenizer, folder, batch, max_len, stack):
    """(run, bytes of weights) as in `throughput`. The model is exported to `folder`, a new one.

    batch, max_len: the most sequences and the most tokens in each. stack: an ExitStack that ends what was started.
    Raises ValueError if the engine cannot read the model.
    """
    if engine == "this":
        return partial(run_this, model), weight_bytes(model)
    layout = "gguf"
    if engine == "transformers":
        layout = "hf" if exported_params(model, "hf") == model.n_params else "hf-lowrank"
    elif model.device.type != "cpu" or model.dtype not in GGML_TYPES:
        raise ValueError(f"{model.dtype} on {model.device}, expected float32, bfloat16 or float16 on the CPU")
    export.export(model, tokenizer, folder, layout)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    run = (in_transformers(folder, model.device) if engine == "transformers" else
           in_llama_cpp(files[0], model.dtype, batch, max_len, stack))
    return run, sum(file.stat().st_size for file in files)


def run_this(model, prompt, max_new_tokens):
    seconds, tokens = {}, generate(model, prompt, max_new_tokens)
    with cli.timed(seconds, "first", model.device):
        next(tokens)
    with cli.timed(seconds, "rest", model.device):
        others = sum(1 for _ in tokens)
    assert others == max_new_tokens - 1
    return seconds["first"], seconds["rest"]


def in_transformers(folder, device):
    """Load an exported folder and return its `run`: transformers' own generate, which shows each token to a clock."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder.parent / "modules")  # it copies the folder's code
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).to(device)
    theirs.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # no end token

    def run(prompt, max_new_tokens):
        prompt, times = prompt.to(device), [time.perf_counter()]
        clock = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
        theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, streamer=clock)
        start, _, first, *others = times  # the second is when the prompt is streamed
        assert len(others) == max_new_tokens - 1
        return first - start, others[-1] - first
    return run


def in_llama_cpp(file, dtype, batch, max_len, stack):
    """Start llama.cpp's server in this process and return its `run`, which takes the server's own times.

    The sequences of a batch are one request. They all fit into one n_batch, so they are decoded in step.
    """
    import xllamacpp
    p = xllamacpp.CommonParams()
    p.model.path, p.n_parallel, p.n_ctx, p.n_batch = str(file), batch, batch * max_len, batch * max_len
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
    p.n_gpu_layers, p.verbosity, p.cache_ram_mib = 0, 0, 0
    p.cache_type_k = p.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{GGML_TYPES[dtype]}")
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # a part of it is fp16
    servers = []
    stack.callback(servers.clear)  # a server stops when its last reference goes

    def start():
        servers.append(xllamacpp.Server(p))
        run(torch.zeros(1, 1, dtype=torch.int64), 1)

    def run(prompt, max_new_tokens):
        times = servers[0].handle_completions({"prompt": prompt.tolist(), "n_predict": max_new_tokens, "temperature": 0,
                                               "ignore_eos": True, "cache_prompt": False})["timings"]
        assert (times["prompt_n"], times["predicted_n"]) == (prompt.shape[1], max_new_tokens)
        return times["prompt_ms"] / 1000, times["predicted_ms"] / 1000  # the first token is in prompt_ms

    with ThreadPoolExecutor(1) as pool:  # where Ctrl-C cannot stop the server before its first answer: it would hang
        pool.submit(start).result()
    return run


def main():
    a = parse()
    names, perplexities, protocol = short_names(a.ckpt), {}, {}
    opened = [cli.open_checkpoint(ckpt, a.device, a.dtype) for ckpt in a.ckpt]
    check_dtypes({name: model.dtype for name, (model, _) in zip(names, opened)})
    for (model, _), T in itertools.product(opened, a.lengths):
        check_length(model, T, a.max_new_tokens)
    for name, (model, tokenizer) in zip(names, opened):
        seq_len = cli.sequence_length(None, 2048, model)
        texts = evaluation_windows(a.eval, tokenizer, seq_len, a.windows, a.data_dir)
        batches = partial(cli.batches, size=cli.batch_size(None, seq_len))
        perplexities[name] = result_row(name, model, texts, batches)["perplexity"]
        protocol[protocols(texts)] = None  # once, unless tokenizers or windows differ
    with ExitStack() as stack:
        pairs, max_len = [], max(a.lengths) + a.max_new_tokens
        place = Path(stack.enter_context(TemporaryDirectory(prefix="grasp-")))
        for (name, (model, tokenizer)), engine in itertools.product(zip(names, opened), a.engines):
            found, folder = (None, None), place / f"{len(pairs)}"
            try:
                found = open_engine(engine, model, tokenizer, folder, max(a.batch_sizes), max_len, stack)
            except (ValueError, RuntimeError) as e:  # the second if llama.cpp cannot load the file
                protocol[f"{name} in {engine}: {e}"] = None
            pairs.append((name, engine, model, *found))
        print("\n" + throughput(pairs, perplexities, a.batch_sizes, a.lengths, a.max_new_tokens, a.repeats, a.seed))
    packages = ["torch", *(ENGINES[engine][0] for engine in a.engines if ENGINES[engine])]
    print("", *filter(None, protocol), f"greedy, {a.max_new_tokens} new tokens after a prompt of random ones (seed "
          f"{a.seed}); medians of {a.repeats} turn{'s' * (a.repeats > 1)}; threads: {torch.get_num_threads()}",
          "MiB: of the weights' files in the engine's layout; prefill: of all prompts, up to the first new tokens;",
          "decode: of all sequences, after these; multiply-adds: of one token that sees as many as the prompt has",
          ", ".join(f"{package} {version(package)}" for package in packages), sep="\n")


def parse():
    p = cli.Parser(__doc__)
    cli.model_flags(p, "what to measure", nargs="+", default=[cli.TINY])
    add = p.add_argument_group("how").add_argument
    add("--engines", nargs="+", choices=[*ENGINES], metavar="NAME", default=["this"],
        help=f"{', '.join(ENGINES)} (default: this)")
    add("--batch-sizes", type=cli.positive, nargs="+", metavar="B", default=[1, 8],
        help="sequences at a time (default: 1 8)")
    add("--lengths", type=cli.positive, nargs="+", metavar="T", default=[32, 128],
        help="tokens in a prompt (default: 32 128)")
    add("--max-new-tokens", type=partial(cli.between, kind=int, low=1, high=2 ** 31 - 1, expected="2 or more"),
        metavar="N", default=100, help="exactly so many (default: 100)")
    add("--repeats", type=cli.positive, metavar="N", default=3, help="turns that count (default: 3)")
    add("--seed", type=cli.seed, default=0, help="of random prompts (default: 0)")
    add = p.add_argument_group("evaluation").add_argument
    add("--eval", nargs="+", metavar="TEXT", default=[], help=f"{text_names('test')} or files (default: none)")
    add("--windows", type=cli.positive, metavar="N", help="only the first N windows of each text (default: all)")
    add("--data-dir", metavar="DIR", help="folder of the texts (default: $GRASP_DATA, else ~/.cache/grasp)")
    cli.machine_flags(p)
    a = p.parse_args()
    for engine in a.engines:
        for package in ENGINES[engine]:
            need(package, f"--engines {engine}")  # before the long work
    return a


if __name__ == "__main__":
    cli.command(main)
