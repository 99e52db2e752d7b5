"""Export a folder for other tools: `python -m extras.export --ckpt COMPRESSED --out FOLDER`.

    --format hf           config.json, model*.safetensors, tokenizer.json: what transformers and tools around it read
    --format hf-lowrank   the same with factors and narrow feed-forwards as they are, and the code for them
    --format meta         params.json, consolidated.00.pth, tokenizer.model: what Meta's code reads of its Llama 2 and 3
    --format deci         Hugging Face's layout with a width for each feed-forward (nemotron-nas): vLLM, mlx-lm
    --format gguf         one GGUF file, with a width for each feed-forward: llama.cpp

hf and meta are dense: every product A B becomes W (m, n) again, and every lost channel becomes zeros, unless all
feed-forwards have lost equally many and nothing is low-rank. deci and gguf keep the widths and refuse low-rank
matrices. A dense folder is only converted. A README.md, the model card, says what the model is.

hf, hf-lowrank and deci need the packages safetensors, huggingface_hub and tokenizers; gguf needs gguf and tokenizers. A
sliding window is not exported: the positions of the exported model end where the window does, and up to there full
attention gives the same logits.
"""
from pathlib import Path

from data.files import atomic_write, check_output, optional_json
from extras.export import deci
from extras.export.card import card
from extras.export.dense import narrowed
from extras.export.hugging_face import CODE, low_rank_config, write_hf
from extras.export.llama_cpp import write_gguf
from extras.export.meta import write_meta


def export(model, tokenizer, out, layout="hf", shard="5GB", source=None, outtype=None):
    """Write `model` as a new folder `out`, atomically; layout: as --format.

    shard: how large a safetensors file may be, and so about the memory that this takes besides the model.
    source: the folder that the model was read from, whose report.json the model card cites. outtype: as --outtype.
    ValueError where the layout cannot say what the model is, OSError where `out` cannot be written.
    """
    check_output(out)
    text = card(model, source and optional_json(Path(source) / "report.json"), layout, Path(out).name, source)
    model = narrowed(model)
    with atomic_write(out) as folder:
        folder.mkdir()
        if layout == "meta":
            write_meta(model, tokenizer, folder)
        elif layout == "gguf":
            write_gguf(model, tokenizer, folder, outtype)
        elif layout == "deci":
            write_hf(model, tokenizer, folder, shard, deci.changes(model), deci.CODE)
        elif layout == "hf-lowrank":
            write_hf(model, tokenizer, folder, shard, low_rank_config(model), CODE)
        else:
            write_hf(model, tokenizer, folder, shard)
        (folder / "README.md").write_text(text, encoding="utf-8")
