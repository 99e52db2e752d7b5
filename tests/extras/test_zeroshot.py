"""The lesson: our answers to the harness's questions are those of its own `hf` backend, request by request."""
import json
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tests.conftest import ROOT
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from evaluate import markdown
from extras import zeroshot
from runtime.cli import TINY

HOLD = [*zeroshot.SEVEN, "gsm8k"]  # what the tests give records of
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


@pytest.fixture(scope="module", params=["BOS", "unused BOS", "no BOS"])
def folder(request, tmp_path_factory):
    """A Hugging Face folder: random weights, and a tokenizer that starts a text with <s>, only knows <s>, or has none."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([json.dumps(RECORDS)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if request.param == "BOS":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>"} if request.param != "no BOS" else {}
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


TREES = ["oak", "ash", "elm", "fir"]
MADE_UP = {  # {name: its definition in the harness's own form}; the data are records of local files
    "colour": {"output_type": "multiple_choice", "training_split": "train", "num_fewshot": 2,
               "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}",
               "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "tree": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": TREES, "doc_to_target": "{{label}}",
             "metric_list": [{"metric": "acc"}]},
    "animal": {"output_type": "generate_until", "doc_to_text": "{{question}} It is", "doc_to_target": "{{text}}",
               "generation_kwargs": {"until": ["."], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}]},
    "longbench_tale": {"output_type": "generate_until", "doc_to_text": "{{tale}} What is it?", "doc_to_target": "{{text}}",
                       "generation_kwargs": {"until": [], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}]},
    "prose": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{tale}}",
              "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "plants": {"group": "plants", "task": ["colour", "tree"], "aggregate_metric_list": [{"metric": "acc"}]},
    "plain": {"group": "plain", "task": ["animal", "prose"]},  # no metric of its own: its tasks are shown
}


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """A folder of YAML files, as --include takes it."""
    path = tmp_path_factory.mktemp("include")
    records = [{"question": f"Which one is number {i}?", "choices": list(COLOURS[:4]), "label": i % 4, "text": COLOURS[i],
                "tale": LONG[:700 * i + 9]} for i in range(5)]
    (path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {split: str(path / "data.jsonl") for split in ("train", "test")}
    for name, own in MADE_UP.items():
        data = {"task": name, "dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": files, "cache_dir": str(path / "cache")}}
        (path / f"{name}.yaml").write_text(yaml.safe_dump(own if "group" in own else {**data, **own}))
    return path


def ours(folder, sequences=None):
    return zeroshot.adapter(load_checkpoint(folder), load_tokenizer(folder), sequences)


def ask(lm, kind, *arguments):
    """An adapter's answers to requests of one kind: a list."""
    return getattr(lm, kind)([Instance(kind, {}, tuple(a), 0) for a in arguments])


def same(answers, expected):
    """Log-probabilities to 1e-3 nats, or 1e-5 of a long text's, greedy flags exactly."""
    return len(answers) == len(expected) > 0 and all(
        a == pytest.approx(e, rel=1e-5, abs=1e-3) and greedy == flag for (a, greedy), (e, flag) in zip(answers, expected))


def compare(lm, reference, tasks, limit=None):
    """Both through the harness: every answer to every request, then every metric and standard error, are equal."""
    found, expected = (zeroshot.seed(tasks) or evaluate(adapter, tasks, limit=limit) for adapter in (lm, reference))
    for name in tasks["tasks"]:
        a, e = ([answer for sample in run["samples"][name] for request in sample["resps"] for answer in request]
                for run in (found, expected))
        kind = tasks["tasks"][name].OUTPUT_TYPE
        assert same(a, e) if kind == "multiple_choice" else a == (
            e if kind == "generate_until" else pytest.approx(e, rel=1e-5, abs=1e-3)), name
        if kind != "loglikelihood_rolling":
            assert found["results"][name] == expected["results"][name], name


@pytest.mark.parametrize("sequences", [None, 1, 5])
def test_every_task_is_answered_as_the_hf_backend_does(folder, local, tmp_path, sequences):
    tasks = zeroshot.load_tasks(HOLD, local, tmp_path)
    assert list(tasks["tasks"]) == HOLD
    compare(ours(folder, sequences), HFLM(str(folder), device="cpu"), tasks)


def test_half_precision_is_scored_in_fp32(folder):
    lm = zeroshot.adapter(load_checkpoint(folder, torch.bfloat16), load_tokenizer(folder))
    reference = HFLM(str(folder), device="cpu", dtype="bfloat16", softmax_dtype="float32")
    (a,), (b,) = (ask(model, "loglikelihood", ("the fox", " ran over the hill")) for model in (lm, reference))
    assert a[0] == pytest.approx(b[0], rel=2e-2)  # their products are bf16's
    assert torch.tensor(a[0], dtype=torch.bfloat16).item() != a[0]  # more digits than bf16 has


def test_a_tokenizer_without_bos_and_end_cannot_begin(folder):
    lm = zeroshot.adapter(load_checkpoint(folder), replace(load_tokenizer(folder), before=[], ends=[], files={}))
    with pytest.raises(ValueError, match="no BOS and no end"):
        ask(lm, "loglikelihood", ("", " the fox"))


def test_the_edges_of_a_request(folder, capsys):
    """No context at all, spaces at its end, a text that brings its own BOS, and one that the positions cut."""
    lm, reference = ours(folder), HFLM(str(folder), device="cpu")
    pairs = [("", " the fox"), ("the fox  ", "ran"), ("<s>the fox", " ran"), (LONG, " the end"), ("a", LONG[:400])]
    assert len(reference.tok_encode(LONG)) > POSITIONS
    assert same(ask(lm, "loglikelihood", *pairs), ask(reference, "loglikelihood", *pairs))
    assert capsys.readouterr().out == "requests: 1 of 5 texts are cut (left) to fit into the model's positions\n"
    texts = [("the fox ran",), (LONG,)]
    expected = ask(reference, "loglikelihood_rolling", *texts)
    assert ask(lm, "loglikelihood_rolling", *texts) == pytest.approx(expected, rel=1e-5)
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
    for bad, message in (({"do_sample": True}, "do_sample True"), ({"max_gen_toks": POSITIONS}, "less than 300")):
        with pytest.raises(ValueError, match=message):
            ask(lm, "generate_until", (prompt, {**settings, "until": [], **bad}))


def test_smollm2_on_real_questions(smollm2, data_dir, tmp_path):
    reference = HFLM(str(smollm2), device="cpu", batch_size=4)
    tasks = zeroshot.load_tasks(["winogrande", "piqa", "arc_easy"], data_dir / "commonsense", tmp_path)
    compare(ours(smollm2), reference, tasks, limit=2)


@pytest.fixture(scope="module")
def made_up(include):
    """The made-up tasks and groups, as load_tasks gives them."""
    return zeroshot.load_tasks(["plants", "longbench_tale", "plain"], include=include)


def test_tasks_of_ones_own_are_answered_as_the_hf_backend_does(folder, made_up):
    """Few-shot multiple choice, generated and rolling texts, and groups, from YAML files and local data alone."""
    whole = {**made_up, "tasks": {name: task for name, task in made_up["tasks"].items() if name != "longbench_tale"}}
    reference, lm = HFLM(str(folder), device="cpu"), ours(folder)
    compare(lm, reference, whole)
    answers, results = zeroshot.measure(lm, made_up)
    zeroshot.seed(whole)
    expected = evaluate(reference, whole)
    assert [*answers] == ["longbench_tale", "animal", "prose", "plants"]  # the group stands for its two tasks
    assert [t["metric"] for t in answers.values()] == ["exact_match", "exact_match", "word_perplexity", "acc"]
    assert answers["plants"] == {"metric": "acc", "value": expected["groups"]["plants"]["acc,none"],
                                 "stderr": expected["groups"]["plants"]["acc_stderr,none"], "records": 10, "of": 10,
                                 "shots": [0, 2]}
    bits = expected["results"]["prose"]["bits_per_byte,none"]
    assert results["prose"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    answers, _ = zeroshot.measure(lm, made_up, "bits_per_byte", 3)
    assert answers["prose"]["metric"] == "bits_per_byte" and answers["plants"]["records"] == 6


def test_longbench_loses_the_middle_of_a_prompt(folder, made_up, capsys):
    """As in its own code: the first half and the last half of what fits are kept [arXiv 2308.14508]."""
    lm, reference = ours(folder), HFLM(str(folder), device="cpu")
    task = {**made_up, "tasks": {"longbench_tale": made_up["tasks"]["longbench_tale"]}, "groups": {}}
    samples = evaluate(lm, task)["samples"]["longbench_tale"]
    cut, half = 0, (POSITIONS - 12) // 2
    for sample in samples:
        ids = reference.tok_encode(sample["arguments"][0][0])
        cut += len(ids) > 2 * half
        ids = ids if len(ids) <= 2 * half else ids[:half] + ids[-half:]
        (new,) = reference.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[:, len(ids):]
        assert sample["resps"] == [[reference.tok_decode(new)]]
    assert cut and f"requests: {cut} of 5 texts are cut (middle)" in capsys.readouterr().out


@pytest.mark.parametrize("asked, shots", [(None, {"colour": 2, "tree": 0}), (1, {"colour": 1, "tree": 1}), (0, {"colour": 0, "tree": 0})])
def test_examples_are_the_tasks_own_number_or_as_asked(asked, shots, include):
    tasks = zeroshot.load_tasks(["colour", "tree"], include=include, num_fewshot=asked)
    assert {name: task.config.num_fewshot for name, task in tasks["tasks"].items()} == shots


def test_the_papers_tasks_are_in_the_harness_under_the_names_in_help():
    names = set()
    for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        names |= {*re.findall(r"^(?:task|group): *[\"']?([\w-]+)", file.read_text(errors="replace"), re.MULTILINE)}
    assert {*HOLD, "boolq", "wsc", "commonsense_qa", "race", "mmlu", "cmmlu", "longbench", "longbench_single",
            "longbench_qasper", "wikitext"} <= names
    assert not [name for name in names if re.search("(?i)^c3|chid$|cmnli", name)]


def test_ai2s_layout_becomes_the_hubs(tmp_path):
    asked = {"choices": {"text": list(COLOURS[:3]), "label": ["1", "2", "3"]}, "answerKey": "2"}
    for record, expected in ((ai2("Grass is", COLOURS[:3], "123", "2"), {
            "question": "Grass is", "question_stem": "Grass is", **asked}), ({"question": "Grass is", **asked},) * 2):
        (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n\n")
        assert zeroshot.read_records(tmp_path / "x.jsonl") == [expected]


PIQA = {"goal": "x", "sol1": "y", "sol2": "z", "label": 1}


@pytest.mark.parametrize("name, records, message", [
    ("piqa", [PIQA, '{"goal": "x"'], "piqa.jsonl, record 2: Expecting"), ("piqa", ["[1]"], "piqa.jsonl, record 1: 'list'"),
    ("piqa", [PIQA, {**PIQA, "more": 1}], r"piqa.jsonl, record 2: fields \['goal', .*, expected"),
    ("piqa", [PIQA, {**PIQA, "sol2": None}], "task piqa, record 2: the answer is choice 1, counted from 0, of"),
    ("piqa", [PIQA, {**PIQA, "label": 2}], "task piqa, record 2: the answer is choice 2"),
    ("piqa", [{"goal": "x", "sol1": "y", "label": 0}], "task piqa: "),  # the harness tries the first record
    ("arc_easy", [ai2("Grass is", COLOURS, "ABCDE", answer) for answer in "A1"], "task arc_easy, record 2: '1' is not in list"),
    ("arc_easy", [{"question": {"stem": "x"}}], "arc_easy.jsonl, record 1: 'choices'"),
    ("winogrande", [{"sentence": "a _", "option1": "a", "option2": "b", "answer": i} for i in "13"], "task winogrande, record 2: '3'"),
    ("hellaswag", [{"activity_label": "", "ctx_a": ""}], "task hellaswag: 'ctx_b'"), ("piqa", [], "task piqa: "),
])
def test_a_bad_record_is_named(tmp_path, name, records, message):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (tmp_path / "local").mkdir()
    (tmp_path / f"local/{name}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        zeroshot.load_tasks([name], tmp_path / "local", tmp_path)


@pytest.mark.parametrize("words, message", [
    (["--tasks", "piqa,poetry", "--include", "."], "no task or group 'poetry' in the harness"),
    (["--include", "nowhere"], "--include nowhere: no such folder"),
    (["--local", "nowhere"], "nowhere/openbookqa.jsonl"),
    (["--local", ".", "--num-fewshot", "2"], "--num-fewshot: --local has no examples"), (["--num-fewshot", "-1"], "0 to 1,000"),
    (["--limit", "0"], "--limit"),
    (["--ckpt", "nowhere"], "nowhere: no such folder"), (["--frobnicate"], "--frobnicate"),
])
def test_bad_words_are_refused(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zeroshot", *words])
    with pytest.raises((ValueError, OSError), match=message):
        zeroshot.main()


def test_a_metric_that_no_task_has_is_refused(include, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["zeroshot", "--include", str(include), "--tasks", "colour", "--metric", "f1"])
    with pytest.raises(ValueError, match="--metric f1: no task has it; they have acc, acc_norm"):
        zeroshot.main()


def test_folders_of_different_dtypes_need_one_dtype(include, tmp_path, monkeypatch, capsys):
    """Before the harness is loaded, and so before anything that takes long."""
    model = load_checkpoint(TINY, torch.bfloat16)
    save_checkpoint(model, tmp_path / "half", tokenizer=load_tokenizer(TINY).files)
    words = ["zeroshot", "--ckpt", str(TINY), str(tmp_path / "half")]
    with monkeypatch.context() as early, pytest.raises(ValueError) as error:
        early.setattr(sys, "argv", words)
        early.setattr(zeroshot, "start_harness", None)
        zeroshot.main()
    assert str(error.value) == ("--ckpt: folders of different dtypes: tiny torch.float32, half torch.bfloat16; "
                                "pass --dtype for one")
    monkeypatch.setattr(sys, "argv", [*words, "--dtype", "bfloat16", "--include", str(include), "--tasks", "tree"])
    zeroshot.main()
    out = capsys.readouterr().out
    assert out.endswith("\ndtype of all rows: torch.bfloat16\n") and out.count("of the weights") == 0
    rows = [line.split("|")[2:] for line in out.splitlines() if line.startswith(("| tiny", "| half"))]
    assert rows[0] == rows[1] != []  # the same weights after rounding


def test_the_table_by_hand():
    """Shares are in %, and their average is a column; a perplexity is no part of it."""
    def row(model, *answers):
        kinds = zip(("piqa", "mmlu", "wikitext"), ("acc", "exact_match", "word_perplexity"), ([0], [0, 5], [0]), answers)
        return {"model": model, "dtype": "torch.float16", "tasks": {
            name: {"metric": kind, "value": value, "stderr": stderr, "shots": shots, "records": 5, "of": 9}
            for name, kind, shots, (value, stderr) in kinds}}

    rows = [row("dense", (0.8, 0.05), (0.2, None), (20.5, None)), row("small", (0.6, 0.06), (0.0, 0.0), (30.25, 1.5))]
    assert zeroshot.table(rows) == markdown(
        ["model", "piqa", "mmlu", "wikitext", "average", "% of dense"],
        [["dense", "80.0 ± 5.0", "20.0", "20.5000", "50.0", "100.0"],
         ["small", "60.0 ± 6.0", "0.0 ± 0.0", "30.2500 ± 1.5000", "30.0", "60.0"]]
    ) + ("\n\npiqa: acc in %, 0-shot, first 5 of 9 records\nmmlu: exact_match in %, 0/5-shot, first 5 of 9 records\n"
         "wikitext: word_perplexity, 0-shot, first 5 of 9 records\ndtype of all rows: torch.float16")


def test_a_row_is_told_and_written_as_each_folder_is_done(include, tmp_path, monkeypatch, capsys):
    """The second folder cannot be loaded: the first one's results are there all the same."""
    def load_one(ckpt, *settings):
        if ckpt != TINY:
            raise ValueError("the second fails")
        return open_checkpoint(ckpt, *settings)

    open_checkpoint = zeroshot.cli.open_checkpoint
    (tmp_path / "second").symlink_to(TINY)
    monkeypatch.setattr(zeroshot.cli, "open_checkpoint", load_one)
    monkeypatch.setattr(sys, "argv", ["zeroshot", "--ckpt", str(TINY), str(tmp_path / "second"), "--include", str(include), "--tasks",
                                      "animal,prose", "--json", str(tmp_path / "out.json")])
    with pytest.raises(ValueError, match="the second fails"):
        zeroshot.main()
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["model"] == "tiny" and row["dtype"] == "torch.float32" and row["parameters"] > 0
    assert row["results"]["prose"]["word_perplexity,none"] == row["tasks"]["prose"]["value"]
    assert f"\ndone         tiny  animal 0.0 ± 0.0, prose {row['tasks']['prose']['value']:.4f}\n" in capsys.readouterr().out


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
    assert rows[0] == rows[1] and done.stdout.endswith(f"\n\n{zeroshot.table(rows)}\n")
    assert [answer["metric"] for answer in rows[0]["tasks"].values()] == ["acc_norm", "acc", "acc_norm"]
    assert [answer["records"] for answer in rows[0]["tasks"].values()] == [1, 1, 1]
