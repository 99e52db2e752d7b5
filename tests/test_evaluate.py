"""The lesson: a perplexity is exp of a mean, and the mean is over the right tokens."""
import math

import pytest
import torch

from tests.conftest import random_model, random_tokens
from evaluate import evaluation_windows, perplexity, table


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


@pytest.mark.parametrize("batches", [[], iter([])])
def test_a_perplexity_without_batches_is_an_error(batches):
    with pytest.raises(ValueError, match="no batches"):
        perplexity(random_model(), batches)


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
