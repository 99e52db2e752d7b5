"""The lesson: a perplexity is exp of a mean, and the mean is over the right tokens."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random_model, random_tokens
from data.corpus import consecutive_windows
from data.tokenizer import load_tokenizer
from evaluate import evaluation_windows, perplexity, table
from model import ModelArgs, Transformer, load_checkpoint
from runtime.cli import (TINY, batch_size, introduce, open_checkpoint, peak_memory, pick_device,
                         sequence_length, timed)


def test_uniform_logits_give_the_vocabulary_size():
    model = random_model()
    model.output.weight.data.zero_()
    assert perplexity(model, [random_tokens(model, 3, 20)]) == pytest.approx(model.args.vocab_size, rel=1e-12)


def test_perplexity_by_hand():
    """Each window predicts its tokens 1..T-1. Token 0 is given. Nothing is predicted across windows."""
    model = random_model()
    tokens = random_tokens(model, 3, 12)
    p = torch.softmax(model(tokens), dim=-1)
    nll = [-math.log(p[b, t - 1, tokens[b, t]]) for b in range(3) for t in range(1, 12)]
    expected = math.exp(sum(nll) / len(nll))
    assert perplexity(model, [tokens]) == pytest.approx(expected, rel=1e-12)
    assert perplexity(model, tokens.split(2)) == pytest.approx(expected, rel=1e-12)  # batches of unequal size


def test_losses_in_chunks_are_the_same_sum(monkeypatch):
    model = random_model()
    tokens = random_tokens(model, 2, 15)
    h = model.final_state(tokens)
    whole, = model.losses(h, tokens)
    monkeypatch.setattr(Transformer, "head_chunk", 5)
    parts = list(model.losses(h, tokens))
    assert len(parts) == 6 and sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_half_precision_logits_are_summed_wide():
    """Their log-softmax is taken in fp32. In bf16 only 8 bits of each position's would be left."""
    model = random_model(torch.bfloat16)
    tokens = random_tokens(model, 2, 40)
    loss = next(model.losses(model.final_state(tokens), tokens))
    log_p = torch.log_softmax(model(tokens)[:, :-1].double(), -1).gather(2, tokens[:, 1:, None])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-log_p.sum().item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_chunked_losses_and_their_gradient_are_torchs(chunk, monkeypatch):
    """Positions whose label is -100 are not counted and have no gradient."""
    monkeypatch.setattr(Transformer, "head_chunk", chunk)
    model = random_model()
    tokens = random_tokens(model, 2, 12)
    labels = tokens.clone()
    labels[0, 3] = labels[1, 1:6] = -100
    h = model.final_state(tokens).requires_grad_()
    model.output.weight.requires_grad_(True)
    logits = model.output(model.norm(h))[:, :-1]
    whole = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    ours = sum(model.losses(h, labels))
    assert ours.item() == pytest.approx(whole.item(), rel=1e-12)
    gradients, expected = (torch.autograd.grad(loss, [h, model.output.weight]) for loss in (ours, whole))
    for found, right in zip(gradients, expected):
        assert torch.allclose(found, right, rtol=0, atol=1e-12)
    assert not gradients[0][1, :5].any() and gradients[0][1, 5].any()


@pytest.mark.parametrize("batches", [[], iter([])])
def test_a_perplexity_without_batches_is_an_error(batches):
    with pytest.raises(ValueError, match="no batches"):
        perplexity(random_model(), batches)


def test_a_sequence_of_minus_100_is_not_counted():
    model = random_model()
    tokens, idle = random_tokens(model, 3, 8), torch.full((1, 8), -100)
    for batches in ([tokens, idle], [torch.cat((idle, tokens))]):
        assert perplexity(model, batches) == pytest.approx(perplexity(model, [tokens]), rel=1e-13)


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    tokens = torch.arange(11)
    assert consecutive_windows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert consecutive_windows(tokens, 4, limit=1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="11 tokens.* 12"):
        consecutive_windows(tokens, 12)


def test_the_protocol_describes_the_text(tmp_path):
    class Letters:
        bos_id = None

        def stream(self, text):
            return torch.tensor([ord(c) for c in text])

    (tmp_path / "text").write_text("abcdefghij")
    name = str(tmp_path / "text")
    assert evaluation_windows([], Letters(), 3) == {}
    windows, protocol = evaluation_windows([name], Letters(), 3, limit=2)["text"]
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert protocol == {"text": "the file as it stands", "tokens": 10, "windows": 2, "all_windows": 3,
                        "seq_len": 3, "bos": False}


def test_the_table_is_markdown_with_its_protocol():
    protocol = {"text": "some text", "tokens": 9000, "windows": 4, "all_windows": 8, "seq_len": 1024,
                "bos": True}
    rows = [{"model": "dense", "parameters": 2000, "perplexity": {"t": 5.472}, "seconds": None},
            {"model": "GRASP", "parameters": 1500, "perplexity": {"t": 9.0}, "seconds": 12.34}]
    assert table(rows, {"t": (None, protocol)}, 2000).splitlines()[:6] == [
        "| model | parameters | kept % | t ppl | seconds |",
        "| ----- | ---------: | -----: | ----: | ------: |",
        "| dense |      2,000 |  100.0 |  5.47 |       - |",
        "| GRASP |      1,500 |   75.0 |  9.00 |    12.3 |",
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
    assert seconds["work"] > 1.0 and 0.1 < float(peak_memory().partition(" GiB")[0]) < 100
    assert [batch_size(None, 256), batch_size(None, 2048), batch_size(3, 256)] == [4, 1, 3]


def test_smollm2_on_wikitext2(smollm2, data_dir):
    """Text, tokenizer, windows and model together give the loss of `transformers` on the same window."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    model = load_checkpoint(smollm2)
    windows, protocol = evaluation_windows(["wikitext2"], load_tokenizer(smollm2), 1024, 1,
                                           data_dir)["wikitext2"]
    assert protocol["tokens"] == 304_978  # this tokenizer splits digits first; otherwise 304,986
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    with torch.no_grad():
        expected = theirs(windows, labels=windows).loss.exp().item()
    assert perplexity(model, [windows]) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(14.09, abs=0.01)  # 447 if GGUF's rows of q and k are not reordered


def test_a_cuda_device_has_a_number(monkeypatch):
    """Without a number torch does not make it the current device. Under torchrun the number is LOCAL_RANK."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    assert pick_device("auto") == ("cuda:0", "auto: CUDA is here")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("cuda") == ("cuda:2", "as asked") and chosen == [0, 2]


# ------------------------------------------------------------------------------------------- batches on a GPU

GIB = 2 ** 30
SHAPES = {
    "LLaMA-2-7B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32000),
    "Llama-3-8B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256),
    "LLaMA-2-13B": dict(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824, vocab_size=32000),
}


def on_a_gpu(model, free, monkeypatch, capability=(8, 0)):
    """Let the model seem to be on a GPU that has so many bytes free, one GiB of them in torch's cache."""
    monkeypatch.setattr(Transformer, "device", property(lambda self: torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])  # with the second, grouped heads are repeated
@pytest.mark.parametrize("card", [24, 40, 80])
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu_no_more_tokens_than_fit(name, card, capability, monkeypatch):
    """A sweep with the chosen micro-batch fits into the free memory, whichever layers are redundant.

    Where nothing fits, one sequence is chosen.
    """
    from extras.bench import sweep_bytes
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SHAPES[name], head_dim=128, norm_eps=1e-5)).bfloat16()
    free, n, T = card * GIB - 2 * model.n_params, model.args.n_layers, 512
    if free < 0:
        return  # the weights alone need more
    on_a_gpu(model, free, monkeypatch, capability)
    size = batch_size(None, T, model, 7)
    assert T <= size * T <= 8192
    for layers in (range(7), range(n - 7, n), range(9, 16), range(0, n, n // 6), [0, 1, 2, 3, 4, 5, n - 1]):
        need = sweep_bytes(model, layers, size, T)
        assert size == 1 or need["gradients"] + need["activations"] <= free, layers


def test_on_a_large_gpu_micro_batches_are_larger(monkeypatch, capsys):
    """The free memory is printed with the device."""
    model = random_model()
    on_a_gpu(model, 60 * GIB, monkeypatch)
    assert batch_size(None, 512, model, 2) == 16 and batch_size(3, 512, model, 2) == 3
    introduce("model", model, "as asked", "as asked")
    assert "memory       60.0 GiB are free beside the weights" in capsys.readouterr().out
    assert batch_size(None, 512, random_model(), 2) == 16
    on_a_gpu(model, GIB // 1000, monkeypatch)
    assert batch_size(None, 512, model, 2) == 1 and batch_size(None, 2048, model, 2) == 1


def test_a_low_rank_layer_does_not_hide_the_gradients_of_the_dense_ones(monkeypatch):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SHAPES["LLaMA-2-7B"], head_dim=128, norm_eps=1e-5)).bfloat16()
    on_a_gpu(model, 12 * GIB, monkeypatch)
    dense = batch_size(None, 512, model, 7)
    model.layers[0] = torch.nn.Identity()  # without parameters
    assert batch_size(None, 512, model, 7) == dense < batch_size(None, 512, model, 1)
