"""The lesson: the same weights give the same logits, losses and gradients, and what is saved comes back.

The reference is the `transformers` library. It makes and saves small random models. This project loads them.
"""
import copy
import json

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from attribution import weight_gradients
from tests.conftest import MODELS, random_model, random_tokens, run, transformers_model
from data.checkpoint import load_checkpoint, pair_rows, save_checkpoint
from model import (LowRankLinear, RMSNorm, Transformer, apply_rotary, matrix_names, repeats_heads,
                   rotations)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_transformers(kind, tmp_path):
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    tokens = random_tokens(ours, 2, 300)
    assert ours.n_params == sum(p.numel() for p in theirs.parameters())  # both count tied ones once
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.1 and ours.dtype == torch.float64
        assert torch.allclose(ours(tokens), expected, rtol=0, atol=5e-4)  # their norms and angles are fp32


def test_gradients_equal_transformers(tmp_path):
    """Their loss shifts the labels itself. The weight gradients are the same."""
    theirs = transformers_model("llama")
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    tokens = random_tokens(ours, 3, 20)
    theirs(tokens, labels=tokens).loss.backward()
    G = weight_gradients(ours, ["layers.1.attention.wk", "layers.1.feed_forward.w2"], tokens.split(2))
    block = theirs.model.layers[1]
    for name, expected in (("attention.wk", pair_rows(block.self_attn.k_proj.weight.grad, 8)),
                           ("feed_forward.w2", block.mlp.down_proj.weight.grad)):
        assert torch.allclose(G[f"layers.1.{name}"], expected, rtol=0, atol=1e-6), name


def test_the_residual_stream_is_every_blocks_output(tmp_path):
    """Also the last block's, which their `hidden_states` shows only after the final norm."""
    theirs = transformers_model("llama")
    theirs.save_pretrained(tmp_path)
    ours, states = load_checkpoint(tmp_path), []
    for block in theirs.model.layers:
        block.register_forward_hook(lambda module, x, y: states.append(y if torch.is_tensor(y) else y[0]))
    tokens = random_tokens(ours, 2, 30)
    with torch.no_grad():
        theirs(tokens)
        for h, expected in zip(list(ours.residual_stream(tokens))[1:], states, strict=True):
            assert torch.allclose(h, expected, rtol=0, atol=1e-4)


def test_rotary_turns_by_position_only():
    """Dot products of turned vectors depend on the distance of positions only. Turning keeps lengths."""
    args = random_model().args
    rotary = rotations(args, 12, "cpu")
    q, k = torch.randn(2, 4, dtype=torch.float64)
    q, k = (apply_rotary(x.expand(1, 12, 1, 4), rotary)[0, :, 0] for x in (q, k))
    dots = q @ k.T
    assert torch.allclose(dots[5, 2], dots[9, 6], atol=1e-6)
    assert not torch.allclose(dots[5, 2], dots[9, 2], atol=1e-3)
    assert torch.allclose(q.norm(dim=1), q[0].norm().expand(12), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_taken_wide(dtype):
    """The mean square of a row, fp32 or bf16, is summed in fp32. The result is rounded once."""
    torch.manual_seed(0)
    norm, x = RMSNorm(512, 1e-5).bfloat16(), torch.randn(4, 512).to(dtype)
    wide = x.double()
    right = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    torch.testing.assert_close(norm(x), right, rtol=2 ** -7, atol=0)  # one unit in the last place
    assert (norm(x) != right).sum() <= 4  # of 2,048, those next to a rounding boundary; summed in bf16: 500


@pytest.mark.parametrize("dtype, capability, repeats", [
    (torch.float32, (9, 0), True), (torch.float64, (9, 0), True), (torch.bfloat16, (9, 0), False),
    (torch.float16, (8, 0), False), (torch.float16, (7, 5), True)])
def test_heads_are_repeated_where_cuda_has_no_fused_kernel_for_grouped_queries(
        dtype, capability, repeats, monkeypatch):
    """docs/numerics.md has the table of kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert repeats_heads(torch.device("cuda"), dtype) == repeats
    assert not repeats_heads(torch.device("cpu"), dtype)


# --------------------------------------------------------------------------------------------------- the loss

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
    h = model.final_state(tokens)
    loss = next(model.losses(h, tokens))
    logits = model.output(model.norm(h[:, :-1].flatten(0, 1)))  # of as many rows: others may be rounded otherwise
    log_p = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, 1:].flatten()[:, None])
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


# -------------------------------------------------------------------------------------------- grouped queries

def test_repeated_heads_give_the_same_output_and_gradients(monkeypatch):
    """Where fused attention takes no groups, key/value heads are repeated.

    Each repeat's gradient is added up.
    """
    heads, results, attention = [], [], F.scaled_dot_product_attention

    def spy(q, k, v, **how):
        heads.append(k.shape[1])
        return attention(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for repeated in (False, True):
        monkeypatch.setattr(model_file, "repeats_heads", lambda device, dtype: repeated)
        model = random_model(n_heads=6, n_kv_heads=2).requires_grad_(True)
        logits = model(random_tokens(model, 2, 9))
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert heads == [2] * 4 + [6] * 4  # in four blocks
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_keeps_no_attention_probabilities():
    """Without a fused kernel autograd would keep B x heads x T x T numbers in each block, here 512 MiB."""
    model = random_model(torch.float32, dim=128, n_heads=32, n_kv_heads=4, head_dim=16, hidden_dim=256)
    model.to("cuda")
    B, T = 1, 2048
    tokens = random_tokens(model, B, T).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight_gradients(model, matrix_names(0), [tokens])
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < B * 32 * T * T * 4 / 2  # of all four blocks together


# ---------------------------------------------------------------------------------------------------- threads

def test_only_small_models_run_on_one_thread(tmp_path):
    """A model of 10 million parameters or more, loaded after a small one, gets torch's own number again."""
    save_checkpoint(random_model(torch.bfloat16), tmp_path / "small")
    save_checkpoint(random_model(torch.bfloat16, vocab_size=320_000, tied=True, dim=32), tmp_path / "large")
    code = ("import torch; from data.checkpoint import load_checkpoint\n"
            "for name in ('small', 'large', 'small', 'large'):\n"
            "    print(load_checkpoint(name).n_params, torch.get_num_threads())")
    done = run("-c", code, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
    small, large, *again = map(str.split, done.stdout.splitlines())
    assert int(small[0]) < 10 ** 7 <= int(large[0]) and (small[1], large[1]) == ("1", "2"), done.stderr
    assert again == [small, large]


# -------------------------------------------------------------------------------------------- written folders

def low_rank_model(tied=True):
    model = random_model(torch.bfloat16, tied=tied)
    A, B = torch.randn(24, 5).bfloat16(), torch.randn(5, 16).bfloat16()
    model.set_submodule("layers.2.feed_forward.w1", LowRankLinear(A, B))
    return model


def test_a_compressed_folder_comes_back(tmp_path):
    model = low_rank_model()
    save_checkpoint(model, tmp_path / "out", {"some": "report"})
    loaded, tokens = load_checkpoint(tmp_path / "out"), random_tokens(model, 2, 11)
    assert torch.equal(loaded(tokens), model(tokens)) and loaded.dtype == torch.bfloat16
    assert loaded.args == model.args and loaded.n_params == model.n_params
    assert loaded.n_params_dense == loaded.n_params + 24 * 16 - 5 * (24 + 16)
    assert json.loads((tmp_path / "out/params.json").read_text())["ranks"] == {"layers.2.feed_forward.w1": 5}
    names = torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True).keys()
    assert "layers.2.feed_forward.w1.A" in names and "output.weight" not in names  # tied: written once


@pytest.mark.parametrize("change, message", [
    (lambda model: model.layers.__setitem__(1, torch.nn.Identity()), "layers.1.attention.wk.weight of torch.Size"),
    (lambda model: model.layers.append(copy.deepcopy(model.layers[0])), "layers.4.attention.wk.weight of torch.Size"),
    (lambda model: setattr(model, "more", torch.nn.Parameter(torch.zeros(3))), "more of torch.Size([3])"),
    (lambda model: setattr(model.layers[2].attention, "wq", torch.nn.Linear(16, 8, bias=False)),
     "layers.2.attention.wq.weight of torch.Size")])
def test_what_could_not_be_read_back_is_not_written(change, message, tmp_path):
    """A block that is gone, one too many, a tensor without a place, and one of another shape."""
    model = random_model()
    change(model)
    with pytest.raises(ValueError, match="out: not written: ") as error:
        save_checkpoint(model, tmp_path / "out")
    assert message in str(error.value) and not list(tmp_path.iterdir())


def test_a_file_is_no_larger_than_its_tensors(tmp_path):
    """torch.save writes whole storages, so a view into a big storage is copied first."""
    model = random_model(torch.float32)
    big = torch.zeros(10_000_000)
    big[:384] = model.layers[0].feed_forward.w1.weight.flatten()
    model.layers[0].feed_forward.w1.weight.data = big[:384].view(24, 16)
    save_checkpoint(model, tmp_path / "out")
    assert (tmp_path / "out/consolidated.00.pth").stat().st_size < 200_000


def test_a_failed_write_leaves_nothing(tmp_path):
    """The write fails half-way, because files may not grow past 8 KiB here.

    No target and no leftovers remain.
    """
    code = ("import resource, signal, sys\n"
            "from tests.conftest import random_model\n"
            "from data.checkpoint import save_checkpoint\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
            "try: save_checkpoint(random_model(), sys.argv[1])\n"
            "except ValueError as e: print('refused:', e)")
    done = run("-c", code, tmp_path / "out", cwd=tmp_path)
    assert "refused: " in done.stdout and "out: not written: " in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_unless_overwritten(tmp_path):
    out = tmp_path / "out"
    save_checkpoint(low_rank_model(), out, {"some": "report"})
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_checkpoint(random_model(), out)
    save_checkpoint(random_model(), out, {"another": "report"}, overwrite=True)
    assert load_checkpoint(out).n_params == random_model().n_params
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="replaces only a folder"):
        save_checkpoint(random_model(), out, overwrite=True)
    (tmp_path / "precious").mkdir()
    with pytest.raises(FileExistsError, match="replaces only a folder"):
        save_checkpoint(random_model(), tmp_path / "precious", overwrite=True)


def test_a_failed_overwrite_restores_the_old_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_checkpoint(low_rank_model(), out, {"some": "report"})

    def fail(self, target):
        raise OSError("the disk went away")

    monkeypatch.setattr(type(out), "replace", fail)
    with pytest.raises(ValueError, match="out: not written: the disk went away"):
        save_checkpoint(random_model(), out, overwrite=True)
    assert load_checkpoint(out).n_params == low_rank_model().n_params
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
