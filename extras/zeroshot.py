"""Accuracy of folders of weights on the harness's tasks: `python -m extras.zeroshot --ckpt DENSE SMALL`.

EleutherAI's harness (lm-eval) makes the prompts, judges the answers and computes the metrics. This file
answers its requests with the core's model, as the harness's own `hf` backend does. In half precision the
log-probabilities are computed in fp32, as that backend does with softmax_dtype="float32".

    in the paper    --tasks
    seven tasks     openbookqa arc_easy winogrande hellaswag arc_challenge piqa mathqa (the default)
    GSM8K           gsm8k (five-shot)
    Table 2         boolq wsc commonsense_qa race (RACE-high) mmlu cmmlu; it has no C3, CHID and CMNLI
    LongBench       longbench, its groups (longbench_single ...) or its tasks (longbench_qasper ...)

`lm-eval ls tasks` lists all names. LongBench's metrics need `pip install "lm_eval[longbench]"`.
"""
import argparse
import json
import logging
import os
import random
from collections import Counter
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import need
from data.checkpoint import read_folder
from data.files import error_prefix, write_json
from evaluate import markdown
from extras import check_dtypes, short_names
from extras.generate import generate
from model import upcast
from runtime import cli

SEVEN = ["openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "mathqa"]
SHARES = "acc", "acc_norm", "exact_match", "score"  # the metrics shown in %; `score` is LongBench's


# -------------------------------------------------------------------------------------------------- answers
@torch.no_grad()
def log_likelihoods(model, pairs, max_len: int, sequences: int | None = None, label: str = "requests"):
    """Compute the log-probability of each continuation after its context.

    Args:
        pairs: [(context, continuation)], lists of ids. The left end is cut off a pair longer than
            max_len + 1: the last token is only predicted.
        sequences: in a batch (default: as many as make 1,024 tokens), the longest first. Padding on the
            right changes nothing, because no token sees what comes after it.

    Returns [(log-probability in nats, whether greedy decoding writes the continuation)], in the order of
    pairs. Raises ValueError if a context or continuation is empty, or a continuation longer than max_len.
    """
    for context, continuation in pairs:
        if not context or not 0 < len(continuation) <= max_len:
            raise ValueError(f"{len(continuation)} tokens to predict after {len(context)}, expected 1 to "
                             f"{max_len} after 1 or more")
    tell_cut(label, ["left" * (len(context) + len(new) > max_len + 1) for context, new in pairs])
    ids = [torch.tensor((context + continuation)[-max_len - 1:]) for context, continuation in pairs]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    sizes, results = batch_sizes([len(ids[i]) - 1 for i in order], sequences), [None] * len(ids)
    for batch in cli.batches(torch.tensor(order), sizes, label):
        batch = batch.tolist()
        counts = [len(pairs[i][1]) for i in batch]
        ends = torch.tensor([len(ids[i]) - 1 for i in batch])[:, None]                     # (B, 1)
        tokens = pad_sequence([ids[i] for i in batch], batch_first=True).to(model.device)  # (B, T + 1)
        t = torch.arange(tokens.shape[1] - 1)
        asked = (t < ends) & (t >= ends - torch.tensor(counts)[:, None])                   # (B, T), N true
        h = model.final_state(tokens[:, :-1])[asked.to(model.device)]                      # (N, dim)
        targets = tokens[:, 1:][asked.to(model.device)]                                    # (N,)
        parts = [score(model, *part) for part in zip(h.split(1024), targets.split(1024))]
        log_p, greedy = (torch.cat(part).cpu().split(counts) for part in zip(*parts))
        for i, p, g in zip(batch, log_p, greedy):
            results[i] = p.sum().item(), g.all().item()
    return results


def tell_cut(label: str, places: list[str]) -> None:
    """Print how many texts are cut. places: where each is cut, "left" or "middle"; "" if it is not cut."""
    for place, count in Counter(filter(None, places)).items():
        print(f"{label}: {count} of {len(places)} texts are cut ({place}) to fit into the model's positions")


def batch_sizes(lengths: list[int], sequences: int | None) -> list[int]:
    """Return the size of each batch: `sequences`, or 1,024 tokens of them. lengths: descending."""
    sizes, start = [], 0
    while start < len(lengths):
        sizes.append(min(cli.batch_size(sequences, lengths[start]), len(lengths) - start))
        start += sizes[-1]
    return sizes


def score(model, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From states h (N, dim): log-probability (N,) of each target, and whether it is the largest (N,)."""
    logits = upcast(model.output(model.norm(h)))
    return -F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def generate_texts(lm, requests, label: str) -> list[str]:
    """Decode greedily what each request of the harness asks for, up to one of its `until` strings.

    A prompt that does not fit into the model's positions is cut: LongBench's in the middle, as its own code
    does; others on the left, as the `hf` backend does. Raises ValueError if a task asks for sampled text.
    """
    from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
    asked, places, texts = [], [], []
    for request in requests:
        task, ids = request.task_name, lm.tok_encode(request.args[0])
        settings = normalize_gen_kwargs(request.args[1])
        new, until = settings["max_gen_toks"], [end for end in settings["until"] if end]
        if settings["do_sample"] or new >= lm.max_len:
            raise ValueError(f"task {task}: {new} tokens to generate, do_sample {settings['do_sample']}; "
                             f"expected less than {lm.max_len} (the model's positions) and False")
        side = "middle" if (task or "").startswith("longbench") else "left"
        prompt, _ = maybe_truncate(ids, new, lm.max_len, side=side, verbose=False)
        places.append(side * (len(prompt) < len(ids)))
        asked.append((prompt, new, until))
    tell_cut(label, places)
    for prompt, new, until in asked:
        ids, text, drawn = [], "", map(int, generate(lm.model, torch.tensor([prompt]), new))
        for i in takewhile(lambda i: i not in lm.tokenizer.ends, drawn):
            ids.append(i)
            text = lm.tokenizer.decode(ids)
            if any(end in text for end in until):
                break
        texts.append(postprocess_generated_text(text, until, think_end_token=None))
        cli.show(f"{label}  {len(texts)}/{len(asked)} texts", last=len(texts) == len(asked))
    return texts


def adapter(model, tokenizer, sequences: int | None = None, label: str = "requests"):
    """Make a TemplateLM of the harness that answers with this model. Its base class encodes the texts."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        def __init__(self, model, tokenizer):  # no closure: the class outlives the model
            super().__init__()
            self.model, self.tokenizer = model, tokenizer
            self.max_len = model.args.max_seq_len or DEFAULT_MAX_LENGTH

        @property
        def eot_token_id(self):
            return next(iter(self.tokenizer.ends), None)

        @property
        def prefix_token_id(self):
            """The token before a continuation without a context: BOS, even if texts do not begin with it."""
            t, found = self.tokenizer, json.loads(self.tokenizer.files.get("tokenizer_config.json", "{}"))
            bos = found.get("bos_token")
            named = t.special.get(bos["content"] if isinstance(bos, dict) else bos)
            for token in filter(lambda token: token is not None, (t.bos_id, named, self.eot_token_id)):
                return token
            raise ValueError(f"{t.file}: no BOS and no end token, one of which an empty context needs")

        def tok_encode(self, string, add_special_tokens=None, **_):
            """Encode, with BOS before a text that does not start with it, if the tokenizer has BOS."""
            ids, bos = self.tokenizer.encode(string), self.tokenizer.bos_id
            return ids if add_special_tokens is False or bos in (None, *ids[:1]) else [bos, *ids]

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(self.model, pairs, self.max_len, sequences, label)

        def loglikelihood_rolling(self, requests, **_):
            """Score whole texts in windows of max_len tokens. Each token is predicted once."""
            windows = partial(get_rolling_token_windows, prefix_token=self.prefix_token_id,
                              max_seq_len=self.max_len, context_len=1)
            texts = [[(None, *make_disjoint_window(pair)) for pair in windows(self.tok_encode(*request.args))]
                     for request in requests]
            found = iter(self._loglikelihood_tokens([window for text in texts for window in text]))
            return [sum(next(found)[0] for _ in text) for text in texts]

        def generate_until(self, requests, **_):
            return generate_texts(self, requests, label)

    return Adapter(model, tokenizer)


# ------------------------------------------------------------------------------------------------ questions
def load_tasks(names: list[str], local=None, scratch=None, include=None, num_fewshot=None) -> dict:
    """Load tasks, groups and tags by their names in the harness, as its `evaluate` takes them.

    Args:
        local: a folder. The records then come from local/NAME.jsonl, through copies in the folder scratch.
        include: a folder of YAML files in the harness's form. Python code that they name is run.
        num_fewshot: examples in a prompt (default: the task's own number). A task that sets 0 keeps it.

    Raises FileNotFoundError and ValueError: the file or task, and the record, at fault.
    """
    from lm_eval import tasks
    include = [include] if include else []
    near = {Path(tasks.__file__).parent / name.partition("_")[0] for name in names}  # arc_easy is in arc
    manager = tasks.TaskManager(include_defaults=False, include_path=[*near, *include])
    if not {*names} <= {*manager.all_subtasks}:  # a group, or elsewhere: index all, in about 10 seconds
        manager = tasks.TaskManager(include_path=include)
    known = manager.all_subtasks if local else manager.all_tasks
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--tasks: no {'task' if local else 'task or group'} {unknown[0]!r} in the harness; "
                         "`lm-eval ls tasks` lists all (a file of --include that is not YAML is skipped)")
    parts = []
    for name in names:
        spec = {"group": "local", "task": [local_task(name, local, scratch)]} if local else name
        with error_prefix(f"task {name}"):
            part = manager.load(spec)
        parts += [part["groups"][name]] if name in part["groups"] else part["tasks"].values()
    loaded = manager.load(parts)
    for name, task in loaded["tasks"].items():  # the first two lines: as the harness's own command does
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", (own if own == 0 or num_fewshot is None else num_fewshot) or 0)
        for number, record in enumerate(task.eval_docs, 1):
            with error_prefix(f"task {name}, record {number}"):
                check_record(task, record)
    return loaded


def check_record(task, record: dict) -> None:
    """Raise an error if the harness cannot make a question and an answer of this record."""
    task.doc_to_text(record)
    target = task.doc_to_target(record)
    choices = task.doc_to_choice(record) if task.OUTPUT_TYPE == "multiple_choice" else []
    if None in choices or choices and type(target) is int and target >= len(choices):
        raise ValueError(f"the answer is choice {target}, counted from 0, of {choices}")


def local_task(name: str, local: str, scratch: Path) -> dict:
    """Define a task whose records come from local/NAME.jsonl. Zero-shot: examples need another split."""
    file = scratch / f"{name}.jsonl"
    records = read_records(Path(local) / file.name)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"task": name, "dataset_path": "json", "dataset_name": None, "num_fewshot": 0,
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(scratch)},
            "training_split": None, "validation_split": None, "fewshot_split": None, "test_split": "test"}


def read_records(file: Path) -> list[dict]:
    """Read a JSONL file. Records of ARC and OpenBookQA as AI2 publishes them get the hub's layout.

    Raises OSError; ValueError with the record that is not JSON or has other fields than the first.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--local: no {file}; expected DIR/TASK.jsonl for each task")
    records = []
    for number, line in enumerate(filter(bytes.strip, file.read_bytes().splitlines()), 1):
        with error_prefix(f"{file}, record {number}"):
            record = json.loads(line)
            if isinstance(question := record.get("question"), dict):
                choices = {part: [c[part] for c in question["choices"]] for part in ("text", "label")}
                record = {"question": question["stem"], "question_stem": question["stem"], "choices": choices,
                          "answerKey": record["answerKey"]}
            records.append(record)
            if record.keys() != records[0].keys():
                raise ValueError(f"fields {[*record]}, expected {[*records[0]]} as in record 1")
    return records


# -------------------------------------------------------------------------------------------------- results
def measure(lm, tasks: dict, metric: str | None = None, limit: int | None = None) -> tuple[dict, dict]:
    """Evaluate a harness model on what load_tasks gave. A group with a metric stands for its tasks.

    metric: the one to show. A task that lacks it has acc, exact_match or its own first metric instead. If a
    metric has several filters, the first counts: GSM8K's is the strict one.
    Returns ({name: {metric, value, stderr, shots, records, of}}, the harness's results of tasks and groups).
    """
    from lm_eval.evaluator import evaluate
    seed(tasks)
    found, answers = evaluate(lm, tasks, limit=limit, log_samples=False), {}
    ranks = {"exact_match": 2, "acc": 1, metric: 0}
    groups = {name: group for name, group in tasks["groups"].items() if group.has_aggregation}
    inside = {child for group in groups.values() for part in (group, *group.get_all_groups())
              for child in part.child_names}
    for name, result in found["results"].items():
        keys = [key for key in result if "," in key and "_stderr," not in key]  # "metric,filter"
        if keys and name not in inside:
            of = [task.task_name for task in groups[name].get_all_tasks()] if name in groups else [name]
            key = min(keys, key=lambda key: ranks.get(key.split(",")[0], 3))
            stderr = result.get(key.replace(",", "_stderr,"))
            answers[name] = {"metric": key.split(",")[0], "value": result[key],
                             "stderr": None if stderr == "N/A" else stderr, "records": result["sample_len"],
                             "of": sum(found["n-samples"][task]["original"] for task in of),
                             "shots": sorted({found["n-shot"][task] for task in of})}
    return answers, found["results"]


def seed(tasks: dict) -> None:
    """Seed as the harness's own command does, so that every folder sees the same examples and choices."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def table(rows: list[dict]) -> str:
    """Make a Markdown table of main's rows. Each task's protocol and the dtype are under it.

    The metrics in SHARES are in %, and their average is a column. Others are as the harness gives them.
    """
    tasks = rows[0]["tasks"]
    shares = [name for name in tasks if tasks[name]["metric"] in SHARES]
    head, cells = ["model", *tasks], [[row["model"], *map(cell, row["tasks"].values())] for row in rows]
    if shares:
        head += ["average", f"% of {rows[0]['model']}"]
        averages = [sum(row["tasks"][name]["value"] for name in shares) / len(shares) for row in rows]
        for line, average in zip(cells, averages):
            line += [f"{100 * average:.1f}", f"{100 * average / averages[0]:.1f}" if averages[0] else "-"]
    protocols = [f"{name}: {t['metric']}{' in %' * (name in shares)}, {'/'.join(map(str, t['shots']))}-shot, "
                 f"{'first ' * (t['records'] < t['of'])}{t['records']:,} of {t['of']:,} records"
                 for name, t in tasks.items()]
    return "\n".join([markdown(head, cells), "", *protocols, f"dtype of all rows: {rows[0]['dtype']}"])


def cell(answer: dict) -> str:
    factor, digits = (100, 1) if answer["metric"] in SHARES else (1, 4)
    stderr = "" if answer["stderr"] is None else f" ± {factor * answer['stderr']:.{digits}f}"
    return f"{factor * answer['value']:.{digits}f}{stderr}"


def start_harness(scratch: Path | None = None) -> str:
    """Import the harness without its progress bars and its log. Returns its version.

    scratch: a folder; the harness's data library then keeps all its files there and tries no network.
    """
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if scratch:
        os.environ.update(HF_HOME=str(scratch), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    version = need("lm_eval", "extras.zeroshot").__version__
    from lm_eval.api import model, task
    model.tqdm = task.tqdm = lambda items, **_: items  # our own progress line replaces its bars
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return version


def main() -> None:
    a, rows = parse(), []
    dtypes = [read_folder(ckpt)[2][0]["tok_embeddings.weight"].dtype for ckpt in a.ckpt]  # or an error, early
    if a.dtype == "auto":
        check_dtypes(dict(zip(short_names(a.ckpt), dtypes)))
    with TemporaryDirectory(prefix="grasp-zeroshot-") as folder:
        version = start_harness(Path(folder) if a.local else None)
        print(f"harness      lm-eval {version}, records from {a.local or 'where each task says'}")
        tasks = load_tasks(a.tasks, a.local, Path(folder), a.include, a.num_fewshot)
        known = {metric for task in tasks["tasks"].values() for metric in task.aggregation()}
        if a.metric and a.metric not in known:
            raise ValueError(f"--metric {a.metric}: no task has it; they have {', '.join(sorted(known))}")
        for name, ckpt in zip(short_names(a.ckpt), a.ckpt):
            model, tokenizer = cli.open_checkpoint(ckpt, a.device, a.dtype)
            lm = adapter(model, tokenizer, a.batch_size, name)
            answers, results = measure(lm, tasks, a.metric, a.limit)
            rows.append({"model": name, "parameters": model.n_params, "dtype": str(model.dtype),
                         "tasks": answers, "results": results})
            del model, lm  # two models are never in memory at once
            print(f"done         {name}  " + ", ".join(f"{task} {cell(t)}" for task, t in answers.items()))
            if a.json:
                write_json(a.json, rows)
    print("\n" + table(rows))


def parse() -> argparse.Namespace:
    p = cli.Parser(__doc__)
    cli.model_flags(p, "what to evaluate", nargs="+", default=[cli.TINY], help="folders of weights of any "
                    "kind; the others are compared with the first (default: the embedded model)")
    add = p.add_argument_group("evaluation").add_argument
    add("--tasks", type=lambda text: text.split(","), default=SEVEN, metavar="A,B", help="of the "
        "harness, tasks and groups; the paper's others are gsm8k, boolq, wsc, commonsense_qa, race, mmlu, "
        "cmmlu and longbench (there is no C3, CHID, CMNLI); `lm-eval ls tasks` lists all (default: "
        f"{','.join(SEVEN)})")
    add("--include", metavar="DIR", help="also your own YAML files in the harness's form; their code is run")
    add("--local", metavar="DIR", help="records from DIR/TASK.jsonl, without a network and zero-shot")
    add("--num-fewshot", metavar="N", help="examples in a prompt (default: the task's own number)",
        type=partial(cli.between, kind=int, low=-1, high=1000, expected="a whole number from 0 to 1,000"))
    add("--metric", metavar="NAME", help="where a task has it (default: acc, exact_match or its first)")
    add("--limit", type=cli.positive, metavar="N", help="only each task's first N records (default: all)")
    add("--json", type=cli.json_file, metavar="FILE", help="also write the results there, after each folder")
    cli.machine_flags(p).add_argument("--batch-size", type=cli.positive, metavar="N",
                                      help="sequences in a batch (default: of 1,024 tokens)")
    a = p.parse_args()
    if a.include and not Path(a.include).is_dir():
        raise FileNotFoundError(f"--include {a.include}: no such folder")
    if a.local and a.num_fewshot:
        raise ValueError("--num-fewshot: --local has no examples to show")
    return a


if __name__ == "__main__":
    cli.command(main)
