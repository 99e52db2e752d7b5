"""Export a folder for other tools, with dense matrices: `python -m extras.export --ckpt COMPRESSED --out FOLDER`.

Every product A B becomes W (m, n) again, and every lost channel becomes zeros. A dense folder is only converted.

    --format hf     config.json, model*.safetensors, tokenizer.json: what transformers and the tools around it read
    --format meta   params.json, consolidated.00.pth, tokenizer.model: what Meta's own code reads of its Llama 2 and 3

hf needs the packages safetensors, huggingface_hub and tokenizers. A sliding window is not exported: the positions of the
exported model end where the window does, and up to there full attention gives the same logits.
"""
from extras.export.hugging_face import write_hf
from extras.export.meta import write_meta
from runtime.files import atomic_write, check_output


def export(model, tokenizer, out, layout="hf", shard="5GB"):
    """Write `model` with dense matrices as a new folder `out`, atomically; layout: "hf" or "meta".

    shard: how large a safetensors file may be, and so about the memory that this takes besides the model.
    ValueError where the layout cannot say what the model is, OSError where `out` cannot be written.
    """
    check_output(out)
    with atomic_write(out) as folder:
        folder.mkdir()
        if layout == "hf":
            write_hf(model, tokenizer, folder, shard)
        else:
            write_meta(model, tokenizer, folder)
