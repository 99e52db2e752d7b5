"""The lesson: our answers to the harness's questions are those of its own `hf` backend, request by request."""
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tests.conftest import ROOT
from data.tokenizer import load_tokenizer
from evaluate import markdown
from extras import zeroshot
from model import load_checkpoint
from runtime.cli import TINY

POSITIONS = 300  # more than the 256 tokens that GSM8K generates, fewer than the longest question below has


def ai2(stem, texts, labels, answer):
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    return {"id": "x1", "question": {"stem": stem, "choices": choices}, "answerKey": answer}


COLOURS = "red", "green as grass", "blue", "a very pale yellow", "black"
LONG = "The fox ran on and on, over hills and under trees, until the night came. " * 24
RECORDS = {  # made up, in each layout that a file may have
    "openbookqa": [ai2("Grass is", COLOURS[:4], "ABCD", "B"), ai2("The sky is", COLOURS[:4], "ABCD", "C")],
    "arc_easy": [ai2("What colour is snow at night?", COLOURS[:4], "1234", "4"), ai2("Coal?", COLOURS, "ABCDE", "E"),
                 ai2("What colour is blood?", COLOURS[:3], "ABC", "A")],
    "arc_challenge": [{"question": "Which colour has the sea?", "answerKey": "C",
                       "choices": {"text": list(COLOURS[:4]), "label": list("ABCD")}}],  # the hub's layout
    "winogrande": [{"sentence": "The box did not fit in the bag as the _ was too big.", "option1": "box",
                    "option2": "bag", "answer": "1"}],
    "hellaswag": [{"activity_label": "Running", "ctx_a": "A fox runs.", "ctx_b": "the fox", "label": "3",
                   "endings": ["[title] stops.", "flies away.", "sings  a song.", "jumps over a dog."]}],
    "piqa": [{"goal": "Open a door", "sol1": "push it", "sol2": "eat it with a big spoon", "label": 0},
             {"goal": LONG, "sol1": "sleep", "sol2": "go on running", "label": 1}],  # its left end is cut off
    "mathqa": [{"Problem": "what is 2 + 3 ?", "options": "a ) 4 , b ) 5 , c ) 6 , d ) 7 , e ) none", "correct": "b"}],
    "gsm8k": [{"question": "Tom has 3 apples and finds 4 more. How many?", "answer": "3 + 4 = 7\n#### 7"}],
}


@pytest.fixture(scope="module", params=["BOS", "no BOS"])
def folder(request, tmp_path_factory):
    """A Hugging Face folder: random weights, and a tokenizer that does or does not start a text with <s>."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([json.dumps(RECORDS)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if request.param == "BOS":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>"} if request.param == "BOS" else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **special).save_pretrained(path)
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3, bos_token_id=0,
        eos_token_id=1)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder of JSONL files, as --local takes it."""
    path = tmp_path_factory.mktemp("local")
    for name, records in RECORDS.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ours(folder, sequences=None):
    return zeroshot.adapter(load_checkpoint(folder), load_tokenizer(folder), sequences)


def ask(lm, kind, *arguments):
    """An adapter's answers to requests of one kind: a list."""
    return getattr(lm, kind)([Instance(kind, {}, tuple(a), 0) for a in arguments])


def same(answers, expected):
    """Log-probabilities to 1e-4 nats, greedy flags exactly."""
    return len(answers) == len(expected) > 0 and all(
        a == pytest.approx(e, abs=1e-4) and greedy == flag for (a, greedy), (e, flag) in zip(answers, expected))


def compare(lm, reference, tasks, limit=None):
    """Both through the harness: every answer to every request, then every accuracy and standard error, are equal."""
    found, expected = ({name: evaluate(adapter, tasks, limit=limit)[name] for name in ("samples", "results")}
                       for adapter in (lm, reference))
    for name in tasks["tasks"]:
        a, e = ([answer for sample in run["samples"][name] for request in sample["resps"] for answer in request]
                for run in (found, expected))
        assert a == e if name == "gsm8k" else same(a, e), name
    assert found["results"] == expected["results"]


@pytest.mark.parametrize("sequences", [None, 1, 5])
def test_every_task_is_answered_as_the_hf_backend_does(folder, local, tmp_path, sequences):
    tasks = zeroshot.load_tasks(list(zeroshot.TASKS), local, tmp_path)
    assert list(tasks["tasks"]) == list(zeroshot.TASKS)
    compare(ours(folder, sequences), HFLM(str(folder), device="cpu"), tasks)


def test_half_precision_is_scored_in_fp32(folder):
    lm = zeroshot.adapter(load_checkpoint(folder, torch.bfloat16), load_tokenizer(folder))
    reference = HFLM(str(folder), device="cpu", dtype="bfloat16", softmax_dtype="float32")
    (a,), (b,) = (ask(model, "loglikelihood", ("the fox", " ran over the hill")) for model in (lm, reference))
    assert a[0] == pytest.approx(b[0], rel=5e-3)  # their products are bf16's
    assert torch.tensor(a[0], dtype=torch.bfloat16).item() != a[0]  # more digits than bf16 has


def test_a_tokenizer_without_bos_and_end_cannot_begin(folder):
    lm = zeroshot.adapter(load_checkpoint(folder), replace(load_tokenizer(folder), before=[], ends=[]))
    with pytest.raises(ValueError, match="neither BOS nor end"):
        ask(lm, "loglikelihood", ("", " the fox"))


def test_the_edges_of_a_request(folder, capsys):
    """No context at all, spaces at its end, a text that brings its own BOS, and one that the positions cut."""
    lm, reference = ours(folder), HFLM(str(folder), device="cpu")
    pairs = [("", " the fox"), ("the fox  ", "ran"), ("<s>the fox", " ran"), (LONG, " the end"), ("a", LONG[:400])]
    assert len(reference.tok_encode(LONG)) > POSITIONS
    assert same(ask(lm, "loglikelihood", *pairs), ask(reference, "loglikelihood", *pairs))
    assert capsys.readouterr().out == ("requests: the left end of 1 of 5 texts is cut off, to fit into the model's "
                                       "positions\n")
    texts = [("the fox ran",), (LONG,)]
    assert ask(lm, "loglikelihood_rolling", *texts) == pytest.approx(ask(reference, "loglikelihood_rolling", *texts))
    with pytest.raises(ValueError, match=f"expected 1 to {POSITIONS} after 1 or more"):
        ask(lm, "loglikelihood", ("a", LONG))


def test_the_greedy_flag_is_true_where_it_should_be(folder):
    """For random continuations the flag is hardly ever true: so ask for what the model itself writes."""
    lm, reference = ours(folder), HFLM(str(folder), device="cpu")
    context = reference.tok_encode("the fox ran on")
    (new,) = reference.model.generate(torch.tensor([context]), max_new_tokens=8)[:, len(context):].tolist()
    pairs = [(None, context, new), (None, context, new[:-1] + [new[-1] - 1])]
    answers = lm._loglikelihood_tokens(pairs)
    assert [greedy for _, greedy in answers] == [True, False]
    assert same(answers, reference._loglikelihood_tokens(pairs))


def test_a_model_leaves_with_its_adapter(folder):
    """The command opens one folder after the other: two models are never in memory at once."""
    lm = ours(folder)
    model = weakref.ref(lm.model)
    del lm
    assert model() is None


def test_generation_stops_where_it_should(folder):
    lm, reference = ours(folder), HFLM(str(folder), device="cpu")
    prompt, settings = "Question: how many?\nAnswer:", {"do_sample": False, "max_gen_toks": 24}
    (free,) = ask(lm, "generate_until", (prompt, {**settings, "until": []}))
    assert len(free) > 8
    for until in ([], [free[5:7]], ["never", free[8:10]]):
        requests = (prompt, {**settings, "until": until}), (LONG, {**settings, "until": until})
        assert ask(lm, "generate_until", *requests) == ask(reference, "generate_until", *requests)

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(free)  # now let a token that comes in the middle be one that ends a text
    end = reference.model.generation_config.eos_token_id = ids[len(ids) // 2]
    stopped = zeroshot.adapter(load_checkpoint(folder), replace(tokenizer, ends=[end]))
    (text,) = ask(stopped, "generate_until", requests[0])
    assert len(text) < len(free) and free.startswith(text)
    for bad, message in (({"do_sample": True}, "by chance"), ({"max_gen_toks": POSITIONS}, "positions")):
        with pytest.raises(ValueError, match=message):
            ask(lm, "generate_until", (prompt, {**settings, "until": [], **bad}))


def test_smollm2_on_real_questions(smollm2, data_dir, tmp_path):
    reference = HFLM(str(smollm2), device="cpu", batch_size=4)
    tasks = zeroshot.load_tasks(["winogrande", "piqa", "arc_easy"], data_dir / "commonsense", tmp_path)
    compare(ours(smollm2), reference, tasks, limit=2)


def test_ai2s_layout_becomes_the_hubs():
    asked = {"choices": {"text": list(COLOURS[:3]), "label": ["1", "2", "3"]}, "answerKey": "2"}
    record = ai2("Grass is", COLOURS[:3], "123", "2")
    assert zeroshot.hub_record("arc_easy", record) == {"question": "Grass is", **asked}
    assert zeroshot.hub_record("openbookqa", record) == {"question_stem": "Grass is", **asked}
    assert zeroshot.hub_record("arc_easy", {"question": "Grass is", **asked}) == {"question": "Grass is", **asked}


@pytest.mark.parametrize("name, line, message", [
    ("piqa", '{"goal": "x", "sol1": "y", "sol2": "z"', "line 2: Expecting"), ("piqa", "[1]", "line 2: a JSON list"),
    ("piqa", '{"goal": "x", "sol1": "y", "sol2": "z", "label": true}', "label is True"),
    ("piqa", '{"goal": "x", "sol1": "y", "label": 0}', "sol2 is None"), ("gsm8k", b"\xff", "line 2: 'utf-8'"),
    ("winogrande", '{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}', "sentence is 'no gap'"),
    ("hellaswag", '{"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": [], "label": "0"}', r"endings is \[\]"),
    ("arc_easy", json.dumps(ai2("Grass is", COLOURS, "ABCDE", "1")), "the answer is '1', which is not one of"),
    ("arc_easy", json.dumps(ai2("Grass is", COLOURS, [1, 2, 3, 4, 5], "1")), "question is {"),
    ("arc_easy", json.dumps(ai2("Grass is", ["green", " ", "blue"], "ABC", "A")), "question is {"),
    ("openbookqa", '{"question_stem": "x", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}',
     "the answer is 'A', which is not one of the choices"),
    ("hellaswag", '{"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a", "b"], "label": "2"}',
     "the answer is '2', which is not one of"),
    ("mathqa", '{"Problem": "x", "options": "a ) 1 , b ) 2", "correct": "b"}', "the answer is 'b', which is not one"),
    ("piqa", '{"goal": "x", "sol1": "", "sol2": "z", "label": 1}', "sol1 is ''"),
])
def test_a_bad_record_is_named_by_file_and_line(tmp_path, name, line, message):
    file = tmp_path / f"{name}.jsonl"
    file.write_bytes(b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=rf"{name}.jsonl, line 2: .*{message.removeprefix('line 2: ')}"):
        zeroshot.read_records(name, file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no records"):
        zeroshot.read_records(name, file)


@pytest.mark.parametrize("words, message", [
    (["--tasks", "piqa,poetry"], "'poetry', expected each at most once of openbookqa"),
    (["--tasks", "piqa,piqa"], "'piqa', expected each at most once"),
    (["--local", "nowhere"], "nowhere/openbookqa.jsonl: no such file"),
    (["--limit", "0"], "--limit"), (["--metric", "f1"], "--metric"), (["--json", "."], "--json"),
    (["--ckpt", "nowhere"], "nowhere: no such folder"), (["--frobnicate"], "--frobnicate"),
])
def test_bad_words_are_refused(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["zeroshot", *words])
    with pytest.raises((ValueError, OSError), match=message):
        zeroshot.main()


def test_the_table_by_hand():
    def row(model, *answers):
        kinds = zip(("piqa", "gsm8k"), ("acc", "exact_match"), answers)
        return {"model": model, "tasks": {name: {"metric": kind, "value": value, "stderr": stderr, "shots": 0,
                                                 "records": 5, "of": 9} for name, kind, (value, stderr) in kinds}}

    rows = [row("dense", (0.8, 0.05), (0.2, None)), row("small", (0.6, 0.06), (0.0, 0.0))]
    assert zeroshot.table(rows, ["piqa", "gsm8k"]) == markdown(
        ["model", "piqa", "gsm8k", "average", "% of dense"],
        [["dense", "80.0 ± 5.0", "20.0", "50.0", "100.0"], ["small", "60.0 ± 6.0", "0.0 ± 0.0", "30.0", "60.0"]]
    ) + "\n\npiqa: acc, 0-shot, first 5 of 9 records\ngsm8k: exact_match, 0-shot, first 5 of 9 records"


def test_the_command_tries_no_network_and_leaves_nothing_behind(local, tmp_path):
    home, scratch, path = (tmp_path / name for name in ("home", "scratch", "path"))
    for new in (home, scratch, path):
        new.mkdir()
    (path / "sitecustomize.py").write_text("import socket\nsocket.socket.connect = socket.getaddrinfo = None\n")
    done = subprocess.run(
        [sys.executable, "-m", "extras.zeroshot", "--ckpt", TINY, TINY, "--local", local, "--tasks",
         "hellaswag,winogrande,arc_easy", "--metric", "acc_norm", "--limit", "1", "--json", tmp_path / "out.json"],
        cwd=ROOT, capture_output=True, text=True, env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))},
            "HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not list(home.iterdir()) and not list(scratch.iterdir())
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows[0] == rows[1] and zeroshot.table(rows, list(rows[0]["tasks"])) in done.stdout
    assert [answer["metric"] for answer in rows[0]["tasks"].values()] == ["acc_norm", "acc", "acc_norm"]
    assert [answer["records"] for answer in rows[0]["tasks"].values()] == [1, 1, 1]
