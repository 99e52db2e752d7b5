"""The model card, README.md of an exported folder: what the model is, what it was made from and how it is loaded."""
import re
from pathlib import Path

from data.checkpoint import ranks, widths
from data.files import error_prefix
from evaluate import markdown, protocols
from extras.export.dense import exported_params
from grasp import SCORES

TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
```"""
LOADING = {  # format -> how its folder is loaded
    "hf": TRANSFORMERS.replace("{trust}", ""),
    "hf-lowrank": TRANSFORMERS.replace("{trust}", ", trust_remote_code=True")
    + "\n\nThe code that this runs is `modeling_lowrank.py` in this folder.",
    "meta": """```python
from data.checkpoint import load_checkpoint
from data.tokenizer import load_tokenizer

model, tokenizer = load_checkpoint("{name}"), load_tokenizer("{name}")
```

This is the project that wrote the folder. Meta's own code for Llama 2 and 3 reads it too if it has a
`tokenizer.model`.""",
    "deci": """```
vllm serve {name} --trust-remote-code
mlx_lm.generate --model {name} --trust-remote-code --prompt "The capital of France"
```

The code that this runs is `configuration_decilm.py` in this folder.""",
    "gguf": """```
llama-cli --model {name}/model-*.gguf --prompt "The capital of France"
```""",
}


def card(model, report, layout, name, source=None):
    """The card's Markdown. No path is in it, only names of folders and files.

    report: report.json of the folder `source` that the model was read from, None without one. layout: a format.
    name: of the exported folder. Raises ValueError if the report lacks what this project writes.
    """
    with error_prefix(f"{source}: report.json, for the model card"):
        reports = chain(report)
        base, hub = base_model(model, reports, source)
        front = ["library_name: transformers"] * layout.startswith("hf")
        front += ["tags:", "- llama", *["- low-rank"] * (layout == "hf-lowrank"), *[f"base_model: {hub}"] * bool(hub)]
        facts = [f"Base model: `{base}`" if base else "Base model: not known, the folder had no report.json",
                 *(fact for r in reports for fact in made(r)), *changes(model), *sizes(model, reports, layout)]
        parts = ["\n".join(["---", *front, "---"]), f"# {name}", "\n".join(f"- {fact}" for fact in facts),
                 *(part for r in reports for part in results(r)),
                 f"## Loading\n\n{LOADING[layout].replace('{name}', name)}",
                 "## License\n\nThe license of the base model applies to these weights."]
    return "\n\n".join(parts) + "\n"


def chain(report):
    """A report and those of the folders before, the oldest first."""
    return [*chain(report.get("input")), report] if report else []


def base_model(model, reports, source):
    """(name of the dense model that all started from, its name on the hub), None for what is not known."""
    if reports:
        source = reports[0]["settings"]["ckpt"]
    elif source is None or model.n_params < model.n_params_dense:
        return None, None
    in_cache = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{source}/")
    hub = in_cache and "/".join(in_cache.groups())
    return hub or Path(source).name, hub


def made(report):
    """What was done by which method, on which calibration text; then the recovery training."""
    settings = report["settings"]
    if "control" in report:
        method = f"a control for comparison: {report['control']}"
    elif "kept" in report:
        asked = f"--remove {settings['remove']}" if settings.get("remove") else f"--budget {settings['budget']}"
        method = f"second-order pruning, `extras.fisher --shape {settings.get('shape', 'free')} {asked}`"
    elif "matrices" in report:
        method = SCORES[settings["score"]]
        method += " ([arXiv 2501.00339](https://arxiv.org/abs/2501.00339))" * method.startswith("GRASP")
        threshold = settings["threshold"]
        method += f", threshold {threshold}" if threshold else f", ratio {settings['ratio']:.4g}"
    else:
        method = report["results"][-1]["method"]
    facts = [f"Method: {method}"]
    if text := report.get("calibration"):
        names = settings["calibration"].split("+") if "parts" in text else [settings["calibration"]]
        facts.append(f"Calibration: {' + '.join(Path(name).name for name in names)}; {text['protocol']}")
    if training := report.get("recovery"):
        what, first, last = training["settings"], training["log"][0], training["log"][-1]
        facts.append(f"Then trained: {'adapters' if what['lora'] else 'the factors'}, {last['step']} steps; "
                     f"held-out loss {first['held_out']:.4f} to {last['held_out']:.4f} nats per token")
    return facts


def sizes(model, reports, layout):
    """Parameters before and after, and how many the exported folder has."""
    after, exported = model.n_params, exported_params(model, layout)
    before = reports[0].get("parameters_before", after) if reports else model.n_params_dense
    facts = [f"Parameters: {after:,}"]
    if before > after:
        facts = [f"Parameters: {before:,} before, {after:,} after, {100 * (1 - after / before):.1f} % removed"]
    if exported > after:
        facts.append(f"In this folder: {exported:,} parameters, because the weights are dense again: the logits of the "
                     "compressed model, not its size and speed")
    return facts


def changes(model):
    """Which layers have low-rank matrices and narrower feed-forwards."""
    low_rank = ranks(model)
    narrow = {i: n for i, n in enumerate(widths(model).values()) if n < model.args.hidden_dim}

    def of(layers, values):
        return f"layers {', '.join(map(str, sorted(layers)))}: {min(values):,} to {max(values):,}"

    if low_rank:
        layers = {int(name.split(".")[1]) for name in low_rank}
        yield f"Low-rank: {len(low_rank)} matrices, of {of(layers, low_rank.values())} components"
    if narrow:
        yield f"Narrower feed-forwards: {of(narrow, narrow.values())} of {model.args.hidden_dim:,} channels"


def results(report):
    """The table of perplexities and its protocol."""
    if texts := report.get("protocol"):
        names = [Path(text).name for text in texts]
        rows = [[row.get("model") or row["method"], *(f"{row['perplexity'][text]:.2f}" for text in texts)]
                for row in report["results"]]
        yield "## Perplexity"
        yield markdown(["model", *names], rows)
        yield "  \n".join(protocols({name: (None, about)}) for name, about in zip(names, texts.values()))
        yield (f"Measured in {report['settings']['dtype'].removeprefix('torch.')}, before the export"
               + " and before the training" * ("recovery" in report) + ".")
