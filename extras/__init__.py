"""What goes further, one file each, run as `python -m extras.NAME`; it stands on the core, which knows none of it."""
import math
from pathlib import Path

from data.checkpoint import read_json
from grasp import matrices


def read_report(folder):
    """report.json of a folder that grasp.py wrote: settings, cosines, redundant and matrices are there and sound.

    FileNotFoundError without one, ValueError with the field that is not what grasp.py writes.
    """
    file = Path(folder) / "report.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no report.json; expected a folder written by grasp.py")
    report = read_json(file)
    settings, cosines, redundant, records = (report.get(n) for n in ("settings", "cosines", "redundant", "matrices"))

    def check(good, field):
        if not good:
            raise ValueError(f"{file}: {field} is missing or not as grasp.py writes it")

    check(isinstance(settings, dict) and all(isinstance(settings.get(name), str) for name in ("ckpt", "score")),
          "settings, with ckpt and score,")
    check(isinstance(cosines, list) and cosines and all(type(c) in (int, float) and math.isfinite(c) for c in cosines),
          "cosines")
    check(indices(redundant, len(cosines)), "redundant")
    names = {name for layer in redundant for name in matrices(layer)}
    check(isinstance(records, list) and all(is_record(r) and r["name"] in names for r in records), "matrices")
    return report


def is_record(r):
    """Whether r is what grasp.replace gives: {name, shape, rank, kept}, rank and kept None where it stays dense."""
    if not (isinstance(r, dict) and {"name", "shape", "rank", "kept"} <= r.keys() and isinstance(r["name"], str)
            and isinstance(r["shape"], list) and [type(size) for size in r["shape"]] == [int, int]):
        return False
    return r["rank"] is r["kept"] is None or indices(r["kept"], min(r["shape"])) and r["rank"] == len(r["kept"])


def indices(found, end):
    """Whether `found` is a list of ascending whole numbers, at least one, all from 0 to end - 1."""
    return (isinstance(found, list) and bool(found) and all(type(i) is int and 0 <= i < end for i in found)
            and found == sorted(set(found)))
