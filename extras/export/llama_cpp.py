"""One GGUF file for llama.cpp and the tools around it, written by the package gguf.

    architecture llama    all feed-forwards have one width
    architecture deci     every feed-forward has its own

llama.cpp turns the neighbouring pairs of rows of wq and wk, as this project does: no row moves.
"""
import math
from dataclasses import replace

import numpy as np
import torch

from data.checkpoint import widths
from extras.export.deci import refuse_low_rank
from extras.export.hugging_face import hf_config
from extras.export.vocabulary import add_vocabulary
from model import finite, rotations

OUTTYPES = {"f32": ("ALL_F32", torch.float32), "f16": ("MOSTLY_F16", torch.float16),
            "bf16": ("MOSTLY_BF16", torch.bfloat16), "q8_0": ("MOSTLY_Q8_0", torch.float32)}  # q8_0 is made from fp32


def write_gguf(model, tokenizer, folder, outtype=None):
    """model-OUTTYPE.gguf. outtype: of the matrices; None takes the model's dtype, or f32. Vectors are fp32.

    One tensor after the other is converted in memory. Raises ValueError for a model or a tokenizer that llama.cpp does
    not have, and for weights that overflow in `outtype`.
    """
    import gguf
    refuse_low_rank(model, "gguf")
    outtype = outtype or next((name for name, (_, dtype) in OUTTYPES.items() if dtype == model.dtype), "f32")
    file_type, dtype = OUTTYPES[outtype]
    channels, config = [*widths(model).values()], hf_config(model, tokenizer)
    writer = gguf.GGUFWriter(None, "llama" if len({*channels}) == 1 else "deci")
    add_settings(writer, model.args, channels, config["max_position_embeddings"])
    add_vocabulary(writer, tokenizer, model.args.vocab_size, config)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    weights = gguf_tensors(model)
    stored = {name: storage_type(W, outtype) for name, W in weights.items()}
    for name, W in weights.items():
        shape = gguf.quant_shape_to_byte_shape(W.shape, stored[name])
        writer.add_tensor_info(name, shape, np.dtype("uint8"), math.prod(shape), stored[name])
    file = folder / f"model-{outtype}.gguf"
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, W in weights.items():
        W = W.detach().to("cpu", dtype if W.ndim > 1 else torch.float32)
        if not finite(W):
            raise ValueError(f"--outtype {outtype}: {name} overflows, use f32 or bf16")
        try:
            writer.write_tensor_data(gguf.quantize(W.float().numpy(), stored[name]))
        except OSError as e:
            raise OSError(f"{file.name}: could not be written: {e}") from None
    writer.close()


def add_settings(writer, args, channels, positions):
    """The hyper-parameters. The length of keys and values is head_dim, which need not be dim / n_heads."""
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(positions)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(channels if len({*channels}) > 1 else channels[0])
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)


def gguf_tensors(model):
    """{GGUF's name: tensor}. A tied head is not named: llama.cpp then takes the embeddings."""
    import gguf
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, model.args.n_layers)  # from Meta's; llama has the same
    weights = {names.get_name(name, (".weight",)): W for name, W in model.named_parameters()}
    if model.args.rope_scaling:
        weights["rope_freqs.weight"] = rope_factors(model.args)
    return weights


def rope_factors(args):
    """By what llama.cpp divides each frequency (head_dim / 2,) for Llama 3.1's scaling."""
    def frequencies(args):
        return rotations(args, 2, "cpu")[1, 0].angle()  # of position 1, at most 1 rad
    return frequencies(replace(args, rope_scaling=None)) / frequencies(args)


def storage_type(W, outtype):
    """GGUF's type of a tensor: q8_0 has blocks of 32 in a row, and other rows are stored as f16."""
    import gguf
    if W.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if outtype == "q8_0" and W.shape[1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[outtype.upper()]
