"""A Llama with low-rank matrices and feed-forwards of different widths.

`ranks` in config.json names what differs from a dense Llama: a matrix with its rank k, y = A (B x), or a feed-forward
("model.layers.3.mlp") with its channels. `python -m extras.export --format hf-lowrank` writes this file and the table.
from_pretrained(folder, trust_remote_code=True) runs it; it needs transformers 4.48 or later.
"""
from collections import OrderedDict
from copy import copy

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class LowRankConfig(LlamaConfig):
    model_type = "llama-lowrank"
    base_model_tp_plan = None  # tensor parallelism would split the factors like dense matrices
    ranks: dict | None = None

    def validate_architecture(self):
        """Accept heads that do not divide the width: head_dim is their size."""


class LowRankModel(LlamaModel):
    config_class = LowRankConfig

    def __init__(self, config):
        super().__init__(config)
        for name, k in sorted((config.ranks or {}).items()):  # a feed-forward comes before its matrices
            name = name.removeprefix("model.")
            module = self.get_submodule(name)
            if name.endswith(".mlp"):
                narrow = copy(config)
                narrow.intermediate_size = k
                self.set_submodule(name, type(module)(narrow))
            else:
                factors = {"B": nn.Linear(module.in_features, k, bias=False),
                           "A": nn.Linear(k, module.out_features, bias=False)}
                self.set_submodule(name, nn.Sequential(OrderedDict(factors)))
                # vLLM fuses by class and child names: the names must tell low-rank from dense
                parent, _, matrix = name.rpartition(".")
                self.get_submodule(parent).add_module(f"low_rank_{matrix}", nn.Identity())
        self.post_init()


class LowRankForCausalLM(LlamaForCausalLM):
    config_class = LowRankConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LowRankModel(config)
        self.post_init()
