"""Commands that go beyond the paper's method, a file or folder each: `python -m extras.NAME`. The core imports none."""
import ctypes
import math
import os
import resource
import sys
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from attribution import low_rank_factors, rank_for_ratio
from data.files import optional_json
from model import matrix_names, replace, upcast
from runtime.cli import open_checkpoint


DENSE = "Meta's, Mistral's or Hugging Face's folder, dense (default: the embedded model)"  # help of --ckpt


def keep(model, name, usv, kept):
    """Replace the matrix `name` by the factors of its kept components, in the model's dtype."""
    replace(model, name, *low_rank_factors(*usv, kept))


def shared_copy(model):
    """A copy that shares the model's weights. What is replaced in one of them stays in the other."""
    return deepcopy(model, {id(p): p for p in model.parameters()})


def linear(W):
    """A linear layer that holds W (m, n) and asks for no gradient."""
    layer = nn.Linear(*W.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(W.detach(), requires_grad=False)
    return layer


def product(factors):
    """A B (m, n) of a LowRankLinear, multiplied in fp32 at least, in the dtype of A."""
    return (upcast(factors.A) @ upcast(factors.B)).type_as(factors.A)


def held(shapes, ratio=None):
    """The parameters in matrices of these shapes, dense or, with a ratio, as grasp.compress leaves them."""
    return sum(m * n if ratio is None else min(m * n, rank_for_ratio(m, n, ratio) * (m + n)) for m, n in shapes)


def peak_bytes(device: torch.device) -> int:
    """Peak memory: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> bool:
    """Let peak_bytes start again from the memory in use now. Returns whether it can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see man 5 proc
    except (OSError, AttributeError, TypeError):  # not Linux, or not glibc
        return False
    return True


def short_names(paths):
    """The last part of each path; the paths as they are if two of these would be equal."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def check_dtypes(dtypes):
    """Raise ValueError if the folders {name: dtype} differ in dtype: their sizes and speeds could not be compared."""
    if len({*dtypes.values()}) > 1:
        each = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"--ckpt: folders of different dtypes: {each}; pass --dtype for one")


def read_report(folder):
    """Read and check report.json of a folder that grasp.py wrote.

    cosines is None if the folder was made with --layer-ids: then the number of layers is not known.
    Raises FileNotFoundError if there is no report, ValueError with the first field that grasp.py would not write.
    """
    file = Path(folder) / "report.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no report.json; expected a folder written by grasp.py")
    report = optional_json(file)
    for field, writer in (("kept", "fisher"), ("control", "controls")):
        if field in report and "matrices" not in report:
            raise ValueError(f"{file}: written by extras.{writer}; expected a folder that grasp.py wrote")
    settings, cosines, redundant, records = (report.get(n) for n in ("settings", "cosines", "redundant", "matrices"))

    def check(good, field):
        if not good:
            raise ValueError(f"{file}: {field} is missing or not as grasp.py writes it")

    check(isinstance(settings, dict) and all(isinstance(settings.get(n), str) for n in ("ckpt", "score", "dtype")),
          "settings, with ckpt, score and dtype,")
    check("cosines" in report and (cosines is None or isinstance(cosines, list) and cosines and all(
        type(c) in (int, float) and math.isfinite(c) for c in cosines)), "cosines")
    check(indices(redundant, len(cosines) if cosines else math.inf), "redundant")
    names = matrix_names(*redundant)
    check(isinstance(records, list) and all(is_record(r) and r["name"] in names for r in records), "matrices")
    return report


def is_record(r):
    """Whether r is what grasp.compress yields: {name, shape, rank, kept}, rank and kept None where it stays dense."""
    if not (isinstance(r, dict) and {"name", "shape", "rank", "kept"} <= r.keys() and isinstance(r["name"], str)
            and isinstance(r["shape"], list) and [type(size) for size in r["shape"]] == [int, int]):
        return False
    return r["rank"] is r["kept"] is None or indices(r["kept"], min(r["shape"])) and r["rank"] == len(r["kept"])


def indices(found, end):
    """Whether `found` is a list of ascending whole numbers, at least one, all from 0 to end - 1."""
    return (isinstance(found, list) and bool(found) and all(type(i) is int and 0 <= i < end for i in found)
            and found == sorted(set(found)))


def open_dense(ckpt, device, dtype):
    """Load the model and tokenizer of a dense folder. Raises ValueError if it is compressed."""
    model, tokenizer = open_checkpoint(ckpt, device, dtype)
    if model.n_params < model.n_params_dense:
        raise ValueError(f"{ckpt}: is compressed already, expected a dense folder")
    return model, tokenizer


def open_original(report, dense, device, dtype, names=()):
    """Load the dense weights that the folder of a report was made from: (folder, model, tokenizer).

    dense: their folder; None takes the one that the report names. dtype: as --dtype, "auto" takes the report's.
    Raises ValueError if the report is of other weights, or if one of `names` is not a dense matrix of theirs.
    """
    folder = Path(os.path.realpath(dense or report["settings"]["ckpt"]))
    if dense is None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, but the report was made from it; pass --dense FOLDER")
    made_in = report["settings"]["dtype"].removeprefix("torch.")
    model, tokenizer = open_checkpoint(folder, device, made_in if dtype == "auto" else dtype)
    n, cosines = model.args.n_layers, report["cosines"]
    if n != len(cosines) if cosines else n <= report["redundant"][-1]:
        of = len(cosines) if cosines else f"layers {report['redundant']}"
        raise ValueError(f"{folder}: a model of {n} layers, but the report is of {of}")
    shapes = {record["name"]: record["shape"] for record in report["matrices"]}
    for name in [*shapes, *names]:
        if name not in matrix_names(*range(n)):
            raise ValueError(f"{name}: expected a name like {matrix_names(n - 1)[0]}; this model has {n} layers, 0 to "
                             f"{n - 1}")
        matrix = model.get_submodule(name)
        shape = list(matrix.weight.shape) if isinstance(matrix, nn.Linear) else None
        if shape is None or name in shapes and shape != shapes[name]:
            expected = f" of shape {shapes[name]}" if name in shapes else ""
            raise ValueError(f"{folder}: {name} is {shape or 'low-rank'}, expected a dense matrix{expected}")
    return folder, model, tokenizer
