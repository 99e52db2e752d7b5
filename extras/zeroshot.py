"""Accuracy of folders of weights on the paper's seven tasks and GSM8K: `python -m extras.zeroshot --ckpt DENSE SMALL`.

What is asked and how answers are judged is EleutherAI's harness (lm-eval): its prompts, choices, metrics and standard
errors. This file gives it the answers, computed by the core's model as the harness's own `hf` backend would; but the
log-probabilities of half-precision logits are taken in fp32, as that one does with softmax_dtype="float32".

    context, continuation  token ids: what the model sees, and what it is asked the log-probability of
    acc, acc_norm          share of questions whose right choice has the largest log-probability (nats), as it is or
                           divided by the choice's characters
    exact_match            share of generated solutions that give the right "#### number" (GSM8K)

With --local DIR the questions come from DIR/TASK.jsonl, without a network: all zero-shot, because examples to show
would come from a training split (of the eight, only GSM8K shows any: five, from the hub).
"""
import argparse
import json
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import need
from data.checkpoint import read_folder
from evaluate import markdown
from extras import short_names
from extras.generate import generate
from model import upcast
from runtime import cli
from runtime.files import write_json

# What the harness reads of a record, in the hub's layout. `str` means: a string that is not blank; a string: one that
# contains it; a tuple: one of these values; a list: a list of such things.
ARC = {"question": "", "choices": {"text": [str], "label": [str]}, "answerKey": ""}
TASKS = {
    "openbookqa": {"question_stem": str, "choices": {"text": [str], "label": [str]}, "answerKey": ""},
    "arc_easy": ARC,
    "winogrande": {"sentence": "_", "option1": str, "option2": str, "answer": ("1", "2")},
    "hellaswag": {"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": [str], "label": ("0", "1", "2", "3")},
    "arc_challenge": ARC,
    "piqa": {"goal": "", "sol1": str, "sol2": str, "label": (0, 1)},
    "mathqa": {"Problem": "", "options": " ) ", "correct": ("a", "b", "c", "d", "e")},
    "gsm8k": {"question": "", "answer": "####"},
}
SEVEN = [name for name in TASKS if name != "gsm8k"]
AI2 = {"question": {"stem": "", "choices": [{"text": str, "label": str}]}, "answerKey": ""}  # ARC, OpenBookQA by AI2


# ----------------------------------------------------------------------------------------------------------- answers
@torch.no_grad()
def log_likelihoods(model, pairs, max_len, sequences=None, label="requests"):
    """[(log-probability of the continuation in nats, whether greedy decoding writes it)], in the order of `pairs`.

    pairs: [(context, continuation)], lists of ids; of what is longer than max_len + 1, the left end is cut off (the
    last token is only predicted). Batches of `sequences` (default: of 1,024 tokens), the longest first, are padded on
    the right, which changes nothing: no token sees what comes after it. ValueError if a context or a continuation is
    empty, or a continuation longer than max_len.
    """
    for context, continuation in pairs:
        if not context or not 0 < len(continuation) <= max_len:
            raise ValueError(f"{len(continuation)} tokens to predict after {len(context)}, expected 1 to {max_len} "
                             "after 1 or more")
    tell_cut(label, [len(context) + len(continuation) > max_len + 1 for context, continuation in pairs])
    ids = [torch.tensor((context + continuation)[-max_len - 1:]) for context, continuation in pairs]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    sizes, results = batch_sizes([len(ids[i]) - 1 for i in order], sequences), [None] * len(ids)
    for batch in cli.batches(torch.tensor(order), sizes, label):
        batch = batch.tolist()
        counts = [len(pairs[i][1]) for i in batch]
        ends = torch.tensor([len(ids[i]) - 1 for i in batch])[:, None]                       # (B, 1)
        tokens = pad_sequence([ids[i] for i in batch], batch_first=True).to(model.device)    # (B, T + 1)
        t = torch.arange(tokens.shape[1] - 1)
        asked = ((t < ends) & (t >= ends - torch.tensor(counts)[:, None])).to(model.device)  # (B, T): N are true
        h, targets = model.final_state(tokens[:, :-1])[asked], tokens[:, 1:][asked]          # (N, dim), (N,)
        parts = [score(model, *part) for part in zip(h.split(1024), targets.split(1024))]
        log_p, greedy = (torch.cat(part).cpu().split(counts) for part in zip(*parts))
        for i, p, g in zip(batch, log_p, greedy):
            results[i] = p.sum().item(), g.all().item()
    return results


def tell_cut(label, cut):
    """Say, if it is so, how many texts lose their left end; cut: whether each does."""
    if any(cut):
        print(f"{label}: the left end of {sum(cut)} of {len(cut)} texts is cut off, to fit into the model's positions")


def batch_sizes(lengths, sequences):
    """How many sequences each batch takes: `sequences`, or 1,024 tokens of them; lengths descend."""
    sizes, start = [], 0
    while start < len(lengths):
        sizes.append(min(cli.batch_size(sequences, lengths[start]), len(lengths) - start))
        start += sizes[-1]
    return sizes


def score(model, h, targets):
    """(log-probability (N,) of each target, whether it is the most probable (N,)) after final states h (N, dim)."""
    logits = upcast(model.output(model.norm(h)))
    return -F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def greedy_text(model, tokenizer, prompt, max_new_tokens, until):
    """What greedy decoding writes after prompt (a list of ids), up to an end token or any of the strings `until`."""
    text, ids = "", []
    for i in generate(model, torch.tensor([prompt]), max_new_tokens):
        if i.item() in tokenizer.ends:
            break
        ids.append(i.item())
        text = tokenizer.decode(ids)
        if any(end in text for end in until):
            break
    for end in until:
        text = text.split(end)[0]
    return text


def adapter(model, tokenizer, sequences=None, label="requests"):
    """The model as the harness wants to see it: a TemplateLM, whose base class turns texts into pairs for us."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        def __init__(self, model, tokenizer):  # not closed over: a class outlives its objects, a model should not
            super().__init__()
            self.model, self.tokenizer = model, tokenizer
            self.max_len = model.args.max_seq_len or DEFAULT_MAX_LENGTH

        @property
        def eot_token_id(self):
            return next(iter(self.tokenizer.ends), None)

        @property
        def prefix_token_id(self):
            """What stands before a continuation without a context."""
            prefix = self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
            if prefix is None:
                raise ValueError(f"{self.tokenizer.file}: neither BOS nor end, and an empty context needs one")
            return prefix

        def tok_encode(self, string, add_special_tokens=None, **_):
            """Ids, the BOS before them where the tokenizer has one and the text does not start with it."""
            ids, bos = self.tokenizer.encode(string), self.tokenizer.bos_id
            return ids if add_special_tokens is False or bos in (None, *ids[:1]) else [bos, *ids]

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(self.model, pairs, self.max_len, sequences, label)

        def loglikelihood_rolling(self, requests, **_):
            """Of whole texts: windows of max_len tokens, each token predicted once, with all the context that fits."""
            texts = [[(None, *make_disjoint_window(pair)) for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_len, 1)] for request in requests]
            found = iter(self._loglikelihood_tokens([window for text in texts for window in text]))
            return [sum(next(found)[0] for _ in text) for text in texts]

        def generate_until(self, requests, **_):
            asked, texts = [], []
            for text, settings in (request.args for request in requests):
                settings = normalize_gen_kwargs(settings)
                new, room = settings["max_gen_toks"], self.max_len - settings["max_gen_toks"]
                if settings["do_sample"]:
                    raise ValueError("asked to generate by chance, expected do_sample False")
                if room < 1:
                    raise ValueError(f"up to {new} tokens to generate, but this model has {self.max_len} positions")
                asked.append((self.tok_encode(text), room, new, [end for end in settings["until"] if end]))
            tell_cut(label, [len(prompt) > room for prompt, room, *_ in asked])
            for prompt, room, new, until in asked:
                texts.append(greedy_text(self.model, self.tokenizer, prompt[-room:], new, until))
                cli.show(f"{label}  {len(texts)}/{len(asked)} texts", last=len(texts) == len(asked))
            return texts

    return Adapter(model, tokenizer)


# --------------------------------------------------------------------------------------------------------- questions
def load_tasks(names, local, scratch):
    """The harness's tasks by their names, as its `evaluate` takes them; with `local`, their records from files there.

    scratch: a folder for what the harness writes on the way. FileNotFoundError, ValueError: the file, its line.
    """
    from lm_eval import tasks
    folders = {Path(tasks.__file__).parent / name.partition("_")[0]: None for name in names}  # arc_easy is in arc
    manager = tasks.TaskManager(include_defaults=False, include_path=list(folders))  # to index them all takes seconds
    loaded = manager.load({"group": "local", "task": [local_task(name, local, scratch) for name in names]}
                          if local else names)
    for task in loaded["tasks"].values():  # as the harness's own command does
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(1234)
    return loaded


def local_task(name, local, scratch):
    """What a task's definition has of its own when its records come from local/NAME.jsonl."""
    file = scratch / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in read_records(name, Path(local) / file.name)))
    return {"task": name, "dataset_path": "json", "dataset_name": None, "num_fewshot": 0,
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(scratch)},
            "training_split": None, "validation_split": None, "fewshot_split": None, "test_split": "test"}


def read_records(name, file):
    """The records of a JSONL file, in the hub's layout. FileNotFoundError; ValueError: the line and what is wrong."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --local DIR takes the task {name} from DIR/{name}.jsonl")
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            records += [hub_record(name, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{file}, line {number}: {e}") from None
    if not records:
        raise ValueError(f"{file}: no records")
    return records


def hub_record(name, record):
    """A record in the hub's layout, with the fields that the harness reads; ValueError where it does not have them.

    ARC and OpenBookQA may also come as AI2 publishes them.
    """
    fields = TASKS[name]
    if "choices" in fields and fits(record, AI2):
        choices = record["question"]["choices"]
        record = {"question": record["question"]["stem"], "question_stem": record["question"]["stem"],
                  "choices": {part: [choice[part] for choice in choices] for part in ("text", "label")},
                  "answerKey": record["answerKey"]}
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object")
    if name == "hellaswag" and type(record.get("label")) is int:  # as its authors publish it
        record = {**record, "label": str(record["label"])}
    for field, wanted in fields.items():
        if not fits(record.get(field), wanted):
            raise ValueError(f"{field} is {record.get(field)!r}, which is no {field} of the task {name}")
    right, choices = answer(name, record)
    if right not in choices:
        raise ValueError(f"the answer is {right!r}, which is not one of the choices {choices}")
    return {field: record[field] for field in fields}


def answer(name, record):
    """(what a record says the right answer is, what it could say); nothing where choices and labels are not as many."""
    if "choices" in TASKS[name]:
        labels, texts = record["choices"]["label"], record["choices"]["text"]
        return record["answerKey"], labels if len(labels) == len(texts) else []
    if name == "hellaswag":
        return record["label"], [str(i) for i in range(len(record["endings"]))]
    if name == "mathqa":  # one string, "a ) 3 , b ) 4 , ... e ) none": the harness takes it apart by the five letters
        whole = all(f"{letter} ) " in record["options"] for letter in "abcde")
        return record["correct"], list("abcde") if whole else []
    return None, [None]


def fits(value, wanted):
    """Whether a JSON value is what TASKS wants there."""
    if wanted is str:
        return isinstance(value, str) and bool(value.strip())
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(fits(value.get(name), w) for name, w in wanted.items())
    if isinstance(wanted, list):
        return isinstance(value, list) and bool(value) and all(fits(v, wanted[0]) for v in value)
    if isinstance(wanted, tuple):
        return type(value) is type(wanted[0]) and value in wanted
    return isinstance(value, str) and wanted in value


# ----------------------------------------------------------------------------------------------------------- results
def measure(lm, tasks, metric, limit=None):
    """{task: {metric: its name, value, stderr, shots, records, of}} of a harness model on what load_tasks gave.

    metric: acc or acc_norm; a task that lacks it has acc, or exact_match, instead. value and stderr are shares.
    """
    from lm_eval.evaluator import evaluate
    found, answers = evaluate(lm, tasks, limit=limit, log_samples=False), {}
    for name in tasks["tasks"]:
        result = found["results"][name]
        keys = [key for want in (metric, "acc", "exact_match") for key in result if key.startswith(f"{want},")]
        kind, filtered = keys[0].split(",")  # of several filters the first: GSM8K's is the strict one
        stderr, count = result[f"{kind}_stderr,{filtered}"], found["n-samples"][name]
        answers[name] = {"metric": kind, "value": result[keys[0]], "stderr": None if stderr == "N/A" else stderr,
                         "shots": found["n-shot"][name], "records": count["effective"], "of": count["original"]}
    return answers


def table(rows, names):
    """A Markdown table in % of rows {model, tasks: what `measure` gave}, the protocol of each task under it."""
    averages = [sum(row["tasks"][name]["value"] for name in names) / len(names) for row in rows]
    head = ["model", *names, "average", f"% of {rows[0]['model']}"]
    cells = [[row["model"], *(cell(row["tasks"][name]) for name in names), f"{100 * average:.1f}",
              f"{100 * average / averages[0]:.1f}" if averages[0] else "-"] for row, average in zip(rows, averages)]
    protocols = [f"{name}: {t['metric']}, {t['shots']}-shot, {'first ' * (t['records'] < t['of'])}{t['records']:,} "
                 f"of {t['of']:,} records" for name, t in rows[0]["tasks"].items()]
    return "\n".join([markdown(head, cells), "", *protocols])


def cell(answer):
    stderr = "" if answer["stderr"] is None else f" ± {100 * answer['stderr']:.1f}"
    return f"{100 * answer['value']:.1f}{stderr}"


def start_harness(scratch=None):
    """Import the harness, which from then on writes nothing on the terminal; its version.

    scratch: a folder; its data library then keeps all its files there and tries no network.
    """
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if scratch:
        os.environ.update(HF_HOME=str(scratch), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    version = need("lm_eval", "extras.zeroshot").__version__
    from lm_eval.api import model, task
    model.tqdm = task.tqdm = lambda items, **_: items  # its bars: the answers have a line of ours
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return version


def main():
    a = parse()
    for ckpt in a.ckpt:
        read_folder(ckpt)  # a folder that is not one is seen now, not after hours spent on those before it
    rows = []
    with TemporaryDirectory(prefix="grasp-zeroshot-") as folder:
        scratch = Path(folder)
        version = start_harness(scratch if a.local else None)
        print(f"harness      lm-eval {version}, records from {a.local or 'the hub'}")
        tasks = load_tasks(a.tasks, a.local, scratch)
        for name, ckpt in zip(short_names(a.ckpt), a.ckpt):
            model, tokenizer = cli.open_checkpoint(ckpt, a.device, a.dtype)
            rows.append({"model": name, "parameters": model.n_params, "tasks": measure(
                adapter(model, tokenizer, a.batch_size, name), tasks, a.metric, a.limit)})
            del model
    print("\n" + table(rows, a.tasks))
    if a.json:
        write_json(a.json, rows)


def parse():
    p = cli.Parser(__doc__)
    cli.model_flags(p, "what to evaluate", nargs="+", default=[cli.TINY], help="folders of weights of any kind; the "
                    "first is what the others are compared with (default: the embedded model)")
    add = p.add_argument_group("evaluation").add_argument
    add("--tasks", type=task_names, default=SEVEN, metavar="A,B",
        help=f"of {', '.join(TASKS)} (default: all but gsm8k)")
    add("--local", metavar="DIR", help="take TASK.jsonl there, no network (default: Hugging Face's hub)")
    add("--metric", choices=["acc", "acc_norm"], default="acc", help="where a task has it (default: acc)")
    add("--limit", type=cli.positive, metavar="N", help="only the first N records of each task (default: all)")
    add("--json", type=cli.json_file, metavar="FILE", help="write the results there too")
    cli.machine_flags(p).add_argument("--batch-size", type=cli.positive, metavar="N",
                                      help="sequences in a batch (default: of 1,024 tokens)")
    return p.parse_args()


def task_names(text):
    names = text.split(",")
    for name in names:
        if name not in TASKS or names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r}, expected each at most once of {', '.join(TASKS)}")
    return names


if __name__ == "__main__":
    cli.command(main)
