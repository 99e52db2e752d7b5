"""The lesson: a cache changes the work, not the text; and what is drawn follows the probabilities it is drawn from.

The independent implementation is `transformers`, whose own cache and own greedy decoding must give the same tokens.
"""
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT, error_of, random_model, random_tokens
from data.checkpoint import HF_TENSORS, load_checkpoint
from data.tokenizer import load_tokenizer
from extras import generate as command
from extras.generate import check_length, empty_cache, generate, pieces, sample, step
from model import LowRankLinear, rotations
from runtime import cli
from tests.test_model import transformers_model


def low_rank_model(**changes):
    """A random model with factors of rank 3 where an attention matrix and a feed-forward one stood."""
    model = random_model(**changes)
    for name in ("layers.1.attention.wk", "layers.2.feed_forward.w2"):
        m, n = model.get_submodule(name).weight.shape
        model.set_submodule(name, LowRankLinear(*(torch.randn(s, dtype=model.dtype) for s in ((m, 3), (3, n)))))
    return model


def greedy(model, prompt, n):
    return torch.stack(list(generate(model, prompt, n)), dim=1)


def greedy_of(theirs, prompt, n):
    """What transformers' own generate appends to prompt (B, T), with no token that ends a text: (B, n)."""
    theirs.generation_config.eos_token_id = None
    return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False,
                           use_cache=True, pad_token_id=0)[:, prompt.shape[1]:]


# ------------------------------------------------------------------------------------------------ the cache

@pytest.mark.parametrize("kind", ["llama", "tied", "llama 3.1", "mistral"])
def test_greedy_equals_transformers(kind, tmp_path):
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    prompt = random_tokens(ours, 3, 20)
    expected = greedy_of(theirs, prompt, 60)
    assert torch.equal(greedy(ours, prompt, 60), expected) and expected.unique().numel() > 20


def test_greedy_equals_transformers_on_smollm2(smollm2):
    transformers = pytest.importorskip("transformers", reason="the independent implementation: pip install -r requirements-test.txt")
    ours, theirs = load_checkpoint(smollm2), transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = load_tokenizer(smollm2)
    prompt = tokenizer.stream("The capital of France is")[None]
    expected = greedy_of(theirs, prompt, 40)
    assert torch.equal(greedy(ours, prompt, 40), expected) and "Paris" in tokenizer.decode(expected[0].tolist())


def test_stories260k_tells_its_story_and_transformers_the_same(data_dir):
    transformers = pytest.importorskip("transformers", reason="the independent implementation: pip install -r requirements-test.txt")
    folder = data_dir.parent / "checkpoints/stories260K"
    ours, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    prompt = tokenizer.stream("")[None]
    ids = greedy(ours, prompt, 200)
    assert tokenizer.decode(ids[0].tolist()).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.")
    a = ours.args
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=a.dim, intermediate_size=a.hidden_dim, num_hidden_layers=a.n_layers, num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_kv_heads, vocab_size=a.vocab_size, rms_norm_eps=a.norm_eps,
        max_position_embeddings=a.max_seq_len, tie_word_embeddings=True)).eval()
    table = {}
    for name, W in ours.state_dict().items():
        if name.endswith(("wq.weight", "wk.weight")):  # pairs (2i, 2i+1) to halves
            W = W.view(-1, a.head_dim // 2, 2, a.dim).transpose(1, 2).reshape(W.shape)
        for their_part, our_part in HF_TENSORS[1:]:
            name = name.replace(our_part, their_part)
        table[name if name == "lm_head.weight" else f"model.{name}"] = W
    theirs.load_state_dict(table)
    assert torch.equal(ids, greedy_of(theirs, prompt, 200))


@pytest.mark.parametrize("T", [1, 7])
def test_cached_logits_equal_the_whole_forwards(T):
    """The prompt at once, then one token at a time: at every step what the model says of the whole sequence."""
    model = low_rank_model()
    tokens = random_tokens(model, 3, 20)
    expected, rotary = model(tokens), rotations(model.args, 20, "cpu")
    cache = empty_cache(model, 3, 20)
    for keys, values in cache:  # what no token has filled yet must not be read
        keys.fill_(torch.nan), values.fill_(torch.nan)
    for start, new in [(0, tokens[:, :T]), *((t, tokens[:, t:t + 1]) for t in range(T, 20))]:
        logits = step(model, new, cache, start, rotary)
        assert torch.allclose(logits, expected[:, start + new.shape[1] - 1], rtol=0, atol=1e-10)


def test_several_tokens_never_join_a_filled_cache():
    """The causal mask of a step starts at the first key, which would be wrong there."""
    model = random_model()
    with pytest.raises(AssertionError):
        step(model, random_tokens(model, 1, 2), empty_cache(model, 1, 5), 3, rotations(model.args, 5, "cpu"))


def test_generate_feeds_every_token_back():
    """Greedy, without a cache: the argmax of the whole forward, again and again."""
    model = low_rank_model()
    tokens = prompt = random_tokens(model, 2, 4)
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy(model, prompt, 12), tokens[:, 4:])


def test_the_cache_has_the_models_dtype():
    model = low_rank_model(dtype=torch.bfloat16)
    keys, values = empty_cache(model, 5, 9)[0]
    assert keys.shape == values.shape == (5, 2, 9, 4) and keys.dtype == torch.bfloat16
    assert greedy(model, random_tokens(model, 5, 4), 5).shape == (5, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_the_same_text():
    model = low_rank_model()
    prompt = random_tokens(model, 2, 9)
    assert torch.equal(greedy(model, prompt, 30), greedy(model.cuda(), prompt, 30).cpu())


def test_what_has_no_place_is_refused():
    model = random_model(max_seq_len=12)
    assert len(list(generate(model, random_tokens(model, 1, 8), 4))) == 4
    with pytest.raises(ValueError, match="a prompt of 8 tokens and 5 new ones: this model's positions end at 12"):
        next(generate(model, random_tokens(model, 1, 8), 5))
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generate(model, random_tokens(model, 1, 0), 5))
    check_length(random_model(), 10 ** 6, 10 ** 6)  # a folder that names no limit has none


# ------------------------------------------------------------------------------------------------ sampling

PROBS = torch.tensor([0.07, 0.50, 0.03, 0.25, 0.15], dtype=torch.float64)  # by rank: tokens 1 3 4 0 2


def frequencies(**how):
    """How often each of five tokens is drawn in 20,000 draws: (5,); 0.011 is three standard deviations."""
    logits = PROBS.log().expand(20000, -1) + 3.0  # softmax does not see a constant
    ids = sample(logits, torch.Generator().manual_seed(0), **how)
    return ids.bincount(minlength=5) / 20000


@pytest.mark.parametrize("how, among", [
    (dict(), [0, 1, 2, 3, 4]),
    (dict(top_k=2), [1, 3]),
    (dict(top_k=9), [0, 1, 2, 3, 4]),
    (dict(top_p=0.74), [1, 3]),
    (dict(top_p=0.76), [1, 3, 4]),
    (dict(top_p=0.01), [1]),              # never none
    (dict(top_p=1.0), [0, 1, 2, 3, 4]),
    (dict(top_k=3, top_p=0.54), [1]),     # of the three that top_k leaves, token 1 has 0.50 / 0.90 = 0.56
    (dict(top_k=3, top_p=0.57), [1, 3]),
])
def test_draws_follow_softmax_among_those_left(how, among):
    expected = torch.zeros(5, dtype=torch.float64)
    expected[among] = PROBS[among] / PROBS[among].sum()
    found = frequencies(temperature=1.0, **how)
    assert ((found > 0) == (expected > 0)).all() and torch.allclose(found.double(), expected, rtol=0, atol=0.011)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = PROBS ** (1 / temperature) / (PROBS ** (1 / temperature)).sum()
    assert torch.allclose(frequencies(temperature=temperature).double(), expected, rtol=0, atol=0.011)


def test_the_coldest_draws_are_the_greedy_ones():
    model = random_model()
    prompt = random_tokens(model, 3, 5)
    expected = list(generate(model, prompt, 20))
    for how in (dict(temperature=1.5, top_k=1), dict(temperature=1e-300), dict(temperature=1.0, top_p=1e-9)):
        assert all(torch.equal(a, b) for a, b in zip(expected, generate(model, prompt, 20, **how), strict=True)), how


def test_a_seed_is_a_text():
    model = random_model()
    prompt = random_tokens(model, 2, 5)
    once, again, other = (torch.stack(list(generate(model, prompt, 30, temperature=1.0, seed=s))) for s in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)


# ------------------------------------------------------------------------------------------------ text

def test_a_character_of_many_bytes_comes_whole():
    text = "naïve € 😀"
    told = list(pieces(lambda ids: bytes(ids).decode(errors="replace"), list(b"> "), text.encode()))
    assert told[0] == "> " and "".join(told) == "> " + text and "\ufffd" not in "".join(told)
    assert told[3:5] == ["", "ï"] and len(told) == 2 + len(text.encode())  # as soon as its last byte is there


def test_bytes_that_become_no_character_are_told_at_the_end():
    told = list(pieces(lambda ids: bytes(ids).decode(errors="replace"), [], b"a\xe2\x82"))
    assert told == ["", "a", "", "", "\ufffd"]


def test_the_pieces_of_sentencepiece_are_its_text():
    """Alone, each token would lose the space it starts with."""
    tokenizer = load_tokenizer(ROOT / "data/tiny")
    text = "for x in range(10):\n    print(x)  # ünïcode → 😀\n"
    ids = tokenizer.stream(text).tolist()
    assert "".join(pieces(tokenizer.decode, ids[:4], ids[4:])) == text


def run(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, words)])
    cli.command(command.main)
    return capsys.readouterr()


def test_standard_output_is_the_text_alone(monkeypatch, capsys):
    model, tokenizer = load_checkpoint(ROOT / "data/tiny"), load_tokenizer(ROOT / "data/tiny")
    out, err = run(["--prompt", "The with statement", "--max-new-tokens", 30], monkeypatch, capsys)
    ids = greedy(model, tokenizer.stream("The with statement")[None], 30)[0].tolist()
    assert out == "The with statement" + tokenizer.decode(tokenizer.encode("The with statement") + ids)[18:] + "\n"
    assert "8 layers, dim 96" in err and re.search(r"^30 tokens in \d+\.\d\d s, [\d.]+ tokens/s$", err, re.M)


def test_an_end_token_ends_it(monkeypatch, capsys):
    letters = SimpleNamespace(stream=lambda text: torch.tensor([1, 2]), ends=(7,),
                              decode=lambda ids: "".join(chr(96 + i) for i in ids))
    monkeypatch.setattr(command, "generate", lambda *given: map(torch.tensor, [[3], [4], [7], [5]]))
    command.write(None, letters, "", 4)
    out, err = capsys.readouterr()
    assert out == "abcd\n" and err.startswith("3 tokens in ")


def test_sampling_flags_reach_the_draws(monkeypatch, capsys):
    def text(*words):
        return run(["--max-new-tokens", 40, *words], monkeypatch, capsys).out

    hot = text("--temperature", 1.5, "--seed", 1)
    assert hot == text("--temperature", 1.5, "--seed", 1) != text("--temperature", 1.5, "--seed", 2)
    assert text() == text("--temperature", 1.5, "--top-k", 1) == text("--temperature", 1.5, "--top-p", 1e-6) != hot


# ------------------------------------------------------------------------------------------------ mistakes

@pytest.mark.parametrize("words, message", [
    ("--ckpt nowhere", "nowhere: no such folder"),
    ("--ckpt a b", "unrecognized arguments: b"),
    ("--max-new-tokens 0", "--max-new-tokens: '0', expected"),
    ("--temperature -1", "--temperature: '-1', expected 0 or more"),
    ("--temperature nan", "--temperature: 'nan', expected 0 or more"),
    ("--temperature 1 --top-p 0", "--top-p: '0', expected more than 0 and at most 1"),
    ("--temperature 1 --top-k 0", "--top-k: '0', expected"),
    ("--top-k 5", "nothing is drawn at --temperature 0"),
    ("--seed -1", "argument --seed: '-1', expected a whole number from 0 to 2^63 - 1"),
])
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(command.main, words, monkeypatch, capsys)


def test_a_text_without_a_place_is_refused_under_the_settings(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--max-new-tokens", 256], monkeypatch, capsys)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.splitlines()[3:] == ["error: a prompt of 1 tokens and 256 new ones: this model's positions end at 256"]
