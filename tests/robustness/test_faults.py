"""The lesson: a broken checkpoint folder is read rightly or refused in one line, and the judge can say no."""
import base64
import json
import shutil
import time
import warnings
import zipfile
from functools import partial

import pytest
import torch

import evaluate
from tests.conftest import ROOT, error_of, random_model, start
from data import checkpoint
from data.checkpoint import load_checkpoint, read_pth, read_tensors
from data.corpus import embedded_text
from data.tokenizer import load_tokenizer
from tests.robustness import damage, faults
from data.files import read_bytes, read_json

pytest.importorskip("safetensors", reason="pip install safetensors")
tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
TEXT = embedded_text("test")[:20000]


def test_a_few_hundred_broken_folders():
    """The command of the README, with fewer cases. Two processes share them."""
    for package in ("tiktoken", "huggingface_hub"):
        pytest.importorskip(package, reason=f"pip install {package}")
    halves = [start("-m", "tests.robustness.faults", "--count", 100, "--seed", seed, cwd=ROOT)
              for seed in (5, 6)]
    for process in halves:
        out, err = process.communicate()
        assert process.returncode == 0 and "100 cases, 0 failures" in out, out + err


# ------------------------------------------------------------------------------------------------ the judge

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good folder of Meta's, and the (perplexity, peak memory) of evaluate.py on it."""
    root = tmp_path_factory.mktemp("undamaged")
    damage.write_good("meta", root / "good")
    faults.reference(root / "good", TEXT)  # what torch imports at first use, no child has to
    return root / "good", faults.measure({"meta": root / "good"}, root, TEXT)["meta", False]


@pytest.fixture
def tried(good, tmp_path, monkeypatch):
    """(outcome, failure) of evaluate.py on a folder of Meta's that `spoil` has changed, judged in the same way."""
    folder, numbers = good

    def attempt(spoil, method=False):
        work = tmp_path / "work"
        faults.prepare(work, folder, TEXT)
        spoil(work / "in/model")
        before = faults.tree(work / "in")
        return faults.judge(work, method, numbers, before, faults.run_command(work, method))

    monkeypatch.chdir(tmp_path)
    return attempt


def edit(folder, name="params.json", **changes):
    table = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**table, **changes}))


def rewrite(file, changes):
    """The archive with some of its records changed, and right checksums."""
    records = damage.read_records(file)
    root = next(iter(records)).partition("/")[0]
    records.update({f"{root}/{name}": content for name, content in changes.items()})
    damage.write_records(file, records.items())


def flip_weight(folder):
    file = folder / "consolidated.00.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def put_code(folder):
    rewrite(folder / "consolidated.00.pth", {"data.pkl": damage.PICKLES["system, protocol 2"]})


def test_the_three_right_outcomes(tried, tmp_path):
    for spoil, outcome in ((lambda f: None, "same"), (partial(edit, norm_eps=1e-3), "other"),
                           (partial(edit, norm_eps=-1), "refused")):
        assert tried(spoil) == (outcome, None)
        shutil.rmtree(tmp_path / "work")


def test_a_reader_that_misses_a_damaged_byte_is_caught(tried, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: None)
    outcome, failure = tried(flip_weight)
    assert outcome in ("same", "other") and "the reference reader has None" in failure


def test_a_reader_that_passes_over_a_field_is_caught(tried, monkeypatch):
    read = checkpoint.read_json
    monkeypatch.setattr(checkpoint, "read_json", lambda file: {**read(file), "norm_eps": 1e-5})
    outcome, failure = tried(partial(edit, norm_eps=1e-3))
    assert outcome == "same" and "the reference reader has" in failure


def test_code_that_is_run_is_caught(tried, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_pth", lambda file: torch.load(file, weights_only=False))
    assert tried(put_code)[0] == "wrote"


@pytest.mark.parametrize("fault, outcome", [(KeyError("k"), "crash"), (TypeError("two\nlines"), "crash"),
                                            (ValueError("without a name"), "refused"), ("a table", "refused"),
                                            ("sleep", "hang"), ("nan", "not finite")])
def test_other_ways_to_fail_are_caught(fault, outcome, tried, monkeypatch):
    def fail(*words):
        if isinstance(fault, Exception):
            raise fault
        if fault == "sleep":
            time.sleep(60)
        if fault == "nan":
            return float("nan")
        print("| model |")
        raise ValueError("work/in/model")

    monkeypatch.setattr(evaluate, "perplexity", fail)
    monkeypatch.setattr(faults, "BOUND", 2 if fault == "sleep" else 30)
    found, failure = tried(lambda folder: None)
    assert found == outcome and failure


# ------------------------------------------------------------------------------------------------ archives

def saved(tensors, folder):
    torch.save(tensors, folder / "a.pth")
    return folder / "a.pth"


def test_plain_files_of_every_make_are_read(tmp_path):
    """A table, an OrderedDict with torch's attribute, parameters."""
    model = random_model(torch.float32)
    for tensors in (dict(model.state_dict()), model.state_dict(), dict(model.named_parameters())):
        assert set(read_tensors(saved(tensors, tmp_path))) == set(tensors)
    with pytest.raises(ValueError, match="a.pth: not readable"):
        read_tensors(saved({1: torch.ones(2)}, tmp_path))


def test_tensors_that_share_a_storage_are_read(tmp_path):
    whole = torch.arange(10.)
    file = saved({"a": whole.view(2, 5).T, "b": torch.ones(3), "c": whole, "d": whole[2:4]}, tmp_path)
    ours, theirs = read_pth(file), torch.load(file, weights_only=True)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_flipped_bit_of_a_pth_is_seen(tmp_path):
    file = saved({"w": torch.ones(10 ** 5)}, tmp_path)
    content = bytearray(file.read_bytes())
    content[200_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="a.pth: not readable as plain tensors .*CRC-32"):
        read_tensors(file)


@pytest.mark.parametrize("name", damage.PICKLES)
def test_no_pickle_runs_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    file = saved({"w": torch.ones(10)}, tmp_path)
    rewrite(file, {"data.pkl": damage.PICKLES[name]})
    with pytest.raises(ValueError, match="a.pth: "):
        read_tensors(file)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.pth", "model"]


@pytest.mark.filterwarnings("error")
def test_torchscript_is_refused_and_a_newer_pickle_read_without_torchs_warnings(tmp_path):
    with warnings.catch_warnings():  # of torch.jit itself
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pth"))
    with pytest.raises(ValueError, match="a.pth: not readable"):
        read_tensors(tmp_path / "a.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "b.pth", pickle_protocol=3)
    assert read_tensors(tmp_path / "b.pth")["a"].tolist() == [1, 1]


def test_a_training_checkpoint_is_not_weights(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "step": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: not readable as plain tensors .*: model is a dict, expected a tensor"):
        read_tensors(tmp_path / "a.pth")


def test_what_is_read_is_mapped_and_the_file_stays_as_it_is(tmp_path):
    file = saved({"a": torch.ones(10)}, tmp_path)
    before = file.read_bytes()
    read_pth(file)["a"].fill_(7)
    assert file.read_bytes() == before


def test_records_are_as_long_as_the_table_says_and_lie_open(tmp_path):
    """What is mapped lies at a record's place: were it short or packed, that would be other bytes."""
    file = saved({"w": torch.ones(1000), "v": torch.ones(10)}, tmp_path)
    records = damage.read_records(file)
    long, short = records["a/data/0"], records["a/data/1"]
    for changes in ({"a/data/0": short}, {"a/data/1": long}, {"a/data/0": short, "a/data/1": long},
                    {"a/data/2": b"more"}):
        damage.write_records(file, {**records, **changes}.items())
        with pytest.raises(ValueError, match="a.pth: not readable"):
            read_tensors(file)
    damage.write_records(file, records.items(), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="a.pth: not readable"):
        read_tensors(file)


# ------------------------------------------------------------------------------------------------ JSON and files

@pytest.mark.parametrize("content, message", [
    ('{"a":' * 10 ** 5, "not JSON"), ("1" * 10 ** 5, "not JSON"), ("\ufeff{}", "not JSON"), ("[1]", "a JSON list")])
def test_json_that_is_not_ours(content, message, tmp_path):
    (tmp_path / "params.json").write_text(content)
    with pytest.raises(ValueError, match=f"params.json: .*{message}|params.json: {message}"):
        read_json(tmp_path / "params.json")


def test_a_disk_that_fails_names_the_file(tmp_path):
    (tmp_path / "a").symlink_to("/proc/self/mem")  # opens, and gives an I/O error when it is read
    with pytest.raises((OSError, ValueError), match="/a: .*Input/output error"):
        read_bytes(tmp_path / "a")


def test_links_to_good_files_work_and_loops_are_one_line(tmp_path, monkeypatch, capsys):
    damage.write_good("hf", tmp_path / "good")
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "good").iterdir():
        (tmp_path / "links" / file.name).symlink_to(f"../good/{file.name}")
    assert load_checkpoint(tmp_path / "links").args == load_checkpoint(tmp_path / "good").args
    (tmp_path / "links/model.safetensors").unlink()
    (tmp_path / "links/model.safetensors").symlink_to("model.safetensors")
    assert "looked for config.json with model.safetensors" in error_of(
        evaluate.main, f"--ckpt {tmp_path / 'links'}", monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------ tokenizers

@pytest.fixture
def json_tokenizer(tmp_path):
    """A function that writes a tokenizer.json, changed, and loads it."""
    damage.write_json_tokenizer(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())

    def load(change):
        change(table)
        (tmp_path / "tokenizer.json").write_text(json.dumps(table))
        return load_tokenizer(tmp_path)

    return load


def test_a_library_that_panics_is_one_error(tmp_path):
    """A Rust panic is no Exception in Python: here over a million spaces."""
    pytest.importorskip("tiktoken", reason="pip install tiktoken")
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="tokenizer.model: fails on this text.*StackOverflow"):
        load_tokenizer(tmp_path).stream(" " * 10 ** 6)


def test_a_token_beyond_the_vocabulary_is_refused(json_tokenizer):
    tokenizer = json_tokenizer(lambda table: table["post_processor"]["special_tokens"]["<s>"].update(ids=[700]))
    tokenizer.rows = 600
    with pytest.raises(ValueError, match="tokenizer.json: token 700 .* of this text has no row in the model"):
        tokenizer.stream("a")
