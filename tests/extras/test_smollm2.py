"""The lesson: a real model, text and tokenizer together give what the `transformers` library gives."""
import pytest
import torch

from tests.conftest import random_tokens, smollm2_folder
from tests.test_tokenizer import TEXTS
from data.checkpoint import load_checkpoint, pair_rows
from data.tokenizer import load_tokenizer
from evaluate import evaluation_windows, perplexity


def test_gguf_rows_go_back_to_halves():
    """GGUF has wq and wk in Meta's order. The folder that extras.smollm2 writes has Hugging Face's."""
    quants = pytest.importorskip("gguf.quants", reason="pip install gguf")
    from extras.smollm2 import tensors
    W = torch.randn(12, 5)  # two heads of 6; with heads of 4 the reordering is its own inverse

    class Tensor:
        name, tensor_type, data = "blk.7.attn_k.weight", quants.GGMLQuantizationType.F32, W.numpy()

    class Reader:
        tensors = [Tensor]

    result = tensors(Reader, head_dim=6)["model.layers.7.self_attn.k_proj.weight"]
    assert not torch.equal(result, W) and torch.equal(pair_rows(result, 6), W)


@pytest.fixture(scope="module")
def theirs():
    """SmolLM2 in the `transformers` library, loaded once for this file."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder()).eval()


@pytest.fixture(scope="module")
def ours():
    return load_checkpoint(smollm2_folder())


def test_logits_equal_transformers(ours, theirs):
    tokens = random_tokens(ours, 1, 128)
    assert ours.n_params == 134_515_008
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, rtol=0, atol=2e-3)


def test_ids_equal_transformers(smollm2):
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(smollm2), load_tokenizer(smollm2)
    for text in TEXTS:
        assert ours.stream(text).tolist() == theirs(text)["input_ids"], text
    assert ours.ends == [theirs.eos_token_id] and ours.bos_id is None


def test_the_loss_on_wikitext2_equals_transformers(ours, theirs, smollm2, data_dir):
    """Text, tokenizer, windows and model together give the loss of `transformers` on the same window."""
    found = evaluation_windows(["wikitext2"], load_tokenizer(smollm2), 256, 1, data_dir)
    windows, protocol = found["wikitext2"]
    assert protocol["tokens"] == 304_978  # this tokenizer splits digits first; otherwise 304,986
    with torch.no_grad():
        expected = theirs(windows, labels=windows).loss.exp().item()
    assert perplexity(ours, [windows]) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(35.35, rel=0.01)  # 260 if GGUF's rows of q and k are not reordered
