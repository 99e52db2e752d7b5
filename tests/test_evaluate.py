"""The lesson: a perplexity is exp of a mean, and the mean is over the right tokens."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import random_model, random_tokens
from data.corpus import consecutive_windows
from evaluate import (TINY, batch_size, load_windows, open_checkpoint, peak_bytes, perplexity, pick_device,
                      sequence_length, table, timed)
from model import CrossEntropy, Transformer, load_checkpoint, upcast


def test_uniform_logits_give_the_vocabulary_size():
    model = random_model()
    model.output.weight.data.zero_()
    assert perplexity(model, [random_tokens(model, 3, 20)]) == pytest.approx(model.args.vocab_size, rel=1e-12)


def test_perplexity_by_hand():
    """Each window predicts its tokens 1..T-1; token 0 is given, and nothing is predicted across windows."""
    model = random_model()
    tokens = random_tokens(model, 3, 12)
    p = torch.softmax(model(tokens), dim=-1)
    nll = [-math.log(p[b, t - 1, tokens[b, t]]) for b in range(3) for t in range(1, 12)]
    expected = math.exp(sum(nll) / len(nll))
    assert perplexity(model, [tokens]) == pytest.approx(expected, rel=1e-12)
    assert perplexity(model, tokens.split(2)) == pytest.approx(expected, rel=1e-12)  # batches of unequal size too


def test_losses_in_chunks_are_the_same_sum(monkeypatch):
    model = random_model()
    tokens = random_tokens(model, 2, 15)
    h = model.final_state(tokens)
    whole, = model.losses(h, tokens)
    monkeypatch.setattr(Transformer, "head_chunk", 5)
    parts = list(model.losses(h, tokens))
    assert len(parts) == 6 and sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_half_precision_logits_are_summed_wide():
    """Their logarithm is taken in fp32: in bf16 each position would lose all but 8 bits."""
    model = random_model(torch.bfloat16)
    tokens = random_tokens(model, 2, 40)
    loss = next(model.losses(model.final_state(tokens), tokens))
    log_p = torch.log_softmax(model(tokens)[:, :-1].double(), -1).gather(2, tokens[:, 1:, None])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-log_p.sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_the_cross_entropy_and_its_gradient_are_torchs(dtype, tolerance):
    """Where a target is -100 nothing is counted, and its logits get no gradient."""
    torch.manual_seed(0)
    logits = torch.randn(9, 30).to(dtype).requires_grad_()
    targets = torch.randint(30, (9,))
    targets[[2, 5]] = -100
    theirs = F.cross_entropy(logits.double(), targets, reduction="sum")
    expected, = torch.autograd.grad(3 * theirs, logits)
    ours = CrossEntropy.apply(upcast(logits), targets)
    found, = torch.autograd.grad(3 * ours, logits)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6) and found.dtype == dtype
    assert torch.allclose(found, expected, rtol=0, atol=3 * tolerance) and found[2].abs().max() == 0


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    tokens = torch.arange(11)
    assert consecutive_windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert consecutive_windows(tokens, 4, limit=1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="11 tokens, too few for one window of 12"):
        consecutive_windows(tokens, 12)


def test_the_protocol_says_what_was_read(tmp_path):
    class Letters:
        bos_id = None

        def stream(self, text):
            return torch.tensor([ord(c) for c in text])

    (tmp_path / "text").write_text("abcdefghij")
    name = str(tmp_path / "text")
    windows, protocol = load_windows([name], Letters(), 3, None, limit=2)["text"]
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert protocol == {"text": "the file as it stands", "tokens": 10, "windows": 2, "all_windows": 3, "seq_len": 3,
                        "bos": False}


def test_the_table_is_markdown_with_its_protocol():
    protocol = {"text": "some text", "tokens": 9000, "windows": 4, "all_windows": 8, "seq_len": 1024, "bos": True}
    rows = [{"model": "dense", "parameters": 2000, "perplexity": {"t": 5.472}, "seconds": None, "peak_bytes": 2 ** 30},
            {"model": "GRASP", "parameters": 1500, "perplexity": {"t": 9.0}, "seconds": 12.34, "peak_bytes": 2 ** 29}]
    assert table(rows, {"t": (None, protocol)}, 2000).splitlines() == [
        "| model | parameters | kept % | t ppl | seconds | peak GiB |",
        "| ----- | ---------: | -----: | ----: | ------: | -------: |",
        "| dense |      2,000 |  100.0 |  5.47 |       - |     1.00 |",
        "| GRASP |      1,500 |   75.0 |  9.00 |    12.3 |     0.50 |",
        "",
        "t: some text; 9,000 tokens, first 4 windows of 1,024, BOS once at the start"]


def test_sequence_length_fits_the_model():
    model = random_model(max_seq_len=64)
    assert sequence_length(None, 2048, model) == 64 and sequence_length(32, 2048, model) == 32
    assert sequence_length(None, 2048, random_model()) == 2048
    for wrong in (1, 65):
        with pytest.raises(ValueError, match="expected 2 to 64"):
            sequence_length(wrong, 2048, model)


def test_devices_and_clocks():
    with pytest.raises(ValueError, match="--device nonsense"):
        open_checkpoint(TINY, "nonsense", "auto")
    with pytest.raises(ValueError, match="--device meta: expected auto, cpu, cuda or cuda:N"):
        open_checkpoint(TINY, "meta", "auto")
    seconds = {"work": 1.0}
    with timed(seconds, "work"):
        pass
    assert seconds["work"] > 1.0 and peak_bytes(torch.device("cpu")) > 2 ** 20
    assert [batch_size(None, 256), batch_size(None, 2048), batch_size(3, 256)] == [4, 1, 3]


def test_smollm2_on_wikitext2(smollm2, data_dir):
    """Text, tokenizer, windows and model together, against the loss of `transformers` on the same window."""
    transformers = pytest.importorskip("transformers", reason="the witness: pip install -r requirements-test.txt")
    from data.tokenizer import load_tokenizer
    model = load_checkpoint(smollm2)
    windows, protocol = load_windows(["wikitext2"], load_tokenizer(smollm2), 1024, smollm2, 1,
                                     data_dir)["wikitext2"]
    assert protocol["tokens"] == 304_978  # 304,986 for a tokenizer that does not split digits first, as this one must
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    with torch.no_grad():
        expected = theirs(windows, labels=windows).loss.exp().item()
    assert perplexity(model, [windows]) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(14.09, abs=0.01)  # 447 where GGUF's q and k rows were not turned back


def test_a_cuda_device_has_a_number(monkeypatch):
    """Without one torch refuses to make it the current device; torchrun numbers those of one machine."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    assert pick_device("auto") == ("cuda:0", "auto: CUDA is here")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("cuda") == ("cuda:2", "as asked") and chosen == [0, 2]
