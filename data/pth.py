"""What torch.save wrote (.pth), read without running it: a zip archive of one pickle and a record for each storage.

A pickle is a program for a machine with a stack [pickletools]. The steps that plain tensors need are taken here, on
names, numbers, tuples and tables; there are no others, so that nothing in a file can import, call or copy anything.
"""
import functools
import math
import pickletools
import zipfile

import torch

from data import processes

LARGEST = 2 ** 20  # bytes of names and sizes: of 405 billion parameters they are 200,000
STORAGES = {"torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16,
            "torch FloatStorage": torch.float32, "torch DoubleStorage": torch.float64}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "TUPLE": 0, "SETITEMS": 0}  # from the stack; 0: to a mark


def read_pth(file):
    """{name: memory-mapped tensor} of a file. Where it is anything else it raises exceptions of many kinds.

    Process 0 compares every record's checksum, unless torch was told to write none.
    """
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        places = {info.filename.partition("/")[2]: info for info in infos}
        if len(places) < len(infos) or any(info.compress_type for info in infos):
            raise ValueError("two records have one name, or one is compressed")
        if sum(info.file_size for info in infos) > file.stat().st_size:
            raise ValueError("its records lie over each other")
        for info in infos:
            archive.open(info).close()  # which compares what the directory and the record itself say
        if not processes.rank() and any(info.CRC for info in infos) and (bad := archive.testzip()):
            raise ValueError(f"wrong CRC-32 of {bad}")
    content = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)  # mapped

    @functools.cache
    def record(name):
        header = max(0, places[name].header_offset)  # 30 bytes, of which the last four are the lengths of what follows
        a, b, c, d = content[header + 26:header + 30].tolist()
        start = header + 30 + a + 256 * b + c + 256 * d
        part = content[start:start + places[name].file_size]
        return part.clone() if start % 8 else part  # it is where no float can be: another tool has packed it anew

    def storage(_, kind, name, place, numel):
        if not (isinstance(name, str) and len(name) < 9 and isinstance(kind, str) and kind in STORAGES):
            raise ValueError("a storage is not of floats")
        flat = record(f"data/{name}").view(STORAGES[kind])
        if len(flat) != numel:
            raise ValueError(f"record data/{name} holds {len(flat)} numbers, expected {numel}")
        return flat

    if "byteorder" in places and bytes(record("byteorder").numpy()) != b"little":
        raise ValueError("its numbers are not little-endian")
    pickled = record("data.pkl")
    if len(pickled) > LARGEST:
        raise ValueError(f"its pickle has {len(pickled):,} bytes, {LARGEST:,} at most")
    return take_steps(bytes(pickled.numpy()), storage)


def take_steps(pickled, storage):
    """What a pickled table of tensors leaves on the stack; storage(*key): the numbers (n,) that a key stands for."""
    stack, marks, memo, calls = [], [], {}, {**CALLS, "BINPERSID": storage}
    for op, arg, _ in pickletools.genops(pickled):
        step = op.name
        if step == "GLOBAL" and arg not in (*CALLS, *STORAGES):
            raise ValueError(f"it asks for {arg[:80]}")
        if step in ("GLOBAL", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(arg)
        elif step in CONSTANTS:
            stack.append(CONSTANTS[step])
        elif step == "EMPTY_DICT":
            stack.append({})
        elif step == "MARK":
            marks.append(len(stack))
        elif step in TAKES:
            start = len(stack) - TAKES[step] if TAKES[step] else marks.pop()
            items = stack[start:]
            del stack[start:]
            if step.startswith("TUPLE"):
                stack.append(tuple(items))
            elif all(isinstance(name, str) for name in items[::2]):
                stack[-1].update(zip(items[::2], items[1::2]))
            else:
                raise ValueError("the name of a tensor is no string")
        elif step in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif step in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif step in ("BINPERSID", "REDUCE"):
            args = stack.pop()
            name = step if step == "BINPERSID" else stack.pop()
            if not isinstance(name, str) or name not in calls or not isinstance(args, tuple):
                raise ValueError("it calls what cannot be called, or with something else than a tuple")
            stack.append(calls[name](*args))
        elif step == "BUILD":
            stack.pop()  # what torch notes of a module
        elif step not in ("PROTO", "STOP"):
            raise ValueError(f"its pickle has the step {step}")
    return stack.pop()


def strided(flat, offset, size, stride, requires_grad, hooks):
    """The tensor that lies in flat (n,) from `offset` on. One that torch has only marked as negative has more parts."""
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) > 4:
        raise ValueError("the shape of a tensor is no tuple of a few numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if not 0 <= offset <= last < len(flat) or math.prod(size) > len(flat):
        raise ValueError("a tensor is not within its storage")
    return flat.as_strided(size, stride, flat.storage_offset() + offset)


CALLS = {"collections OrderedDict": lambda: {}, "torch._utils _rebuild_tensor_v2": strided,
         "torch._utils _rebuild_parameter": lambda tensor, requires_grad, hooks: tensor}
