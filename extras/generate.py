"""Text from a folder of weights, dense or compressed: `python -m extras.generate --ckpt FOLDER`.

The keys (turned) and values of all tokens so far are kept, so that a new token costs one token's work.

    cache    for each block (keys, values), each (B, n_kv_heads, max_len, head_dim), in the model's dtype
    start    how many tokens the cache holds before a step
    step     the first is over the whole prompt, start 0, and each later one over one new token
"""
import argparse
import itertools
import math
import sys
import time
from contextlib import redirect_stdout

import torch

from model import apply_rotary, attend, rotations, upcast
from runtime import cli


def generate(model, prompt, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=0):
    """An iterator over the next token ids (B,) int64, max_new_tokens times; what ends a text is the caller's to see.

    prompt (B, T) int64: B sequences of equal length. temperature 0 is greedy, the rest as in `sample`. ValueError if
    the prompt is empty or the new tokens do not fit into max_seq_len.
    """
    check_length(model, prompt.shape[1], max_new_tokens)  # now, not when the first token is asked for
    return new_tokens(model, prompt, max_new_tokens, temperature, top_k, top_p, seed)


@torch.no_grad()
def new_tokens(model, prompt, max_new_tokens, temperature, top_k, top_p, seed):
    max_len = prompt.shape[1] + max_new_tokens
    cache = empty_cache(model, len(prompt), max_len)
    rotary = rotations(model.args, max_len, model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens, start = prompt.to(model.device), 0
    for _ in range(max_new_tokens):
        logits = step(model, tokens, cache, start, rotary)
        start += tokens.shape[1]
        tokens = sample(logits, generator, temperature, top_k, top_p)[:, None]
        yield tokens[:, 0]


def check_length(model, T, max_new_tokens):
    """ValueError unless a prompt of T tokens and what is to follow have a place in the model."""
    limit = model.args.max_seq_len
    if T == 0:
        raise ValueError("the prompt is empty: expected one token at least (a tokenizer without BOS needs some text)")
    if limit and T + max_new_tokens > limit:
        raise ValueError(f"a prompt of {T} tokens and {max_new_tokens} new ones: this model's positions end at {limit}")


def empty_cache(model, B, max_len):
    shape = B, model.args.n_kv_heads, max_len, model.args.head_dim
    return [torch.empty(2, *shape, dtype=model.dtype, device=model.device).unbind() for _ in model.layers]


def step(model, tokens, cache, start, rotary):
    """Logits (B, vocab_size) of the token after tokens (B, t), which come after the `start` tokens in the cache.

    Their keys and values join the cache. rotary: `rotations` of all positions up to max_len.
    """
    rotary = rotary[start:start + tokens.shape[1]]
    h = upcast(model.tok_embeddings(tokens))
    for block, (keys, values) in zip(model.layers, cache):
        h = h + attend_cached(block.attention, block.attention_norm(h), rotary, keys, values, start)
        h = h + block.feed_forward(block.ffn_norm(h))
    return model.output(model.norm(h[:, -1]))


def attend_cached(attention, x, rotary, keys, values, start):
    """model.Attention's forward for new tokens x (B, t, dim), which see the cached ones too: (B, t, dim)."""
    end = start + x.shape[1]
    assert start == 0 or end == start + 1  # is_causal takes the first query to stand with the first key
    q, k, v = (w(x).unflatten(-1, (-1, attention.head_dim)) for w in (attention.wq, attention.wk, attention.wv))
    q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
    keys[:, :, start:end], values[:, :, start:end] = k.transpose(1, 2), v.transpose(1, 2)
    y = attend(q.transpose(1, 2), keys[:, :, :end], values[:, :, :end], is_causal=start == 0)
    return attention.wo(y.transpose(1, 2).flatten(2))


def sample(logits, generator, temperature=0.0, top_k=None, top_p=None):
    """A token id for each row of logits (B, vocab_size), drawn from softmax(logits / temperature): (B,) int64.

    temperature 0: the most probable. top_k: only among the k most probable. top_p: only among the fewest, the most
    probable first, whose probabilities (made to sum to 1 after top_k) reach top_p [arXiv 1904.09751].
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits.double().sort(descending=True, stable=True)
    logits = (logits - logits[:, :1]) / temperature  # the largest becomes 0: no temperature, however low, overflows
    probs = logits[:, :top_k].softmax(-1)
    if top_p is not None:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # those before it reach top_p already
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def pieces(decode, prompt, ids):
    """Yield the text of prompt (a list of ids), then of each of ids (an iterable) what is sure of it, then the rest.

    A token's text depends on its neighbours (SentencePiece's spaces, characters of several byte tokens). So all tokens
    so far are decoded every time, and an end that is no character yet (U+FFFD) waits.
    """
    seen, told = [], 0
    for new in itertools.chain([prompt], ([i] for i in ids)):
        seen += new
        text = decode(seen)
        sure = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        yield text[told:sure]
        told = max(told, sure)
    yield text[told:]


def write(model, tokenizer, text, max_new_tokens, *sampling):
    """Print text and what follows as it comes, up to an end token or max_new_tokens; then on stderr how fast it was."""
    prompt, start, count = tokenizer.stream(text), time.perf_counter(), 0
    drawn = generate(model, prompt[None], max_new_tokens, *sampling)

    def ids():
        nonlocal count
        for i in map(int, drawn):
            count += 1
            if i in tokenizer.ends:
                return
            yield i

    for piece in pieces(tokenizer.decode, prompt.tolist(), ids()):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    print(flush=True)
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


def main():
    a = parse()
    with redirect_stdout(sys.stderr):  # standard output is for the text
        model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype)
    write(model, tokenizer, a.prompt, a.max_new_tokens, a.temperature, a.top_k, a.top_p, a.seed)


def parse():
    p = cli.Parser(__doc__)
    add = cli.model_flags(p, "what to generate").add_argument
    add("--prompt", metavar="TEXT", default="", help="text to continue (default: none but the tokenizer's BOS)")
    add("--max-new-tokens", type=cli.positive, metavar="N", default=100, help="at most (default: 100)")
    add("--temperature", type=temperature, metavar="X", default=0.0, help="0 is greedy (default: 0)")
    add("--top-k", type=cli.positive, metavar="K", help="draw among the K most probable (default: all)")
    add("--top-p", type=cli.fraction, metavar="P", help="draw among the fewest that reach P (default: all)")
    add("--seed", type=cli.seed, default=0, help="of the draws (default: 0)")
    cli.machine_flags(p)
    a = p.parse_args()
    if (a.top_k or a.top_p) and not a.temperature:
        raise ValueError("--top-k, --top-p: nothing is drawn at --temperature 0, the default")
    return a


def temperature(text):
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 0 or more")
    return float(text)


if __name__ == "__main__":
    cli.command(main)
