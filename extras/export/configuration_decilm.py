"""How transformers reads the config.json beside this file (nemotron-nas): `--trust-remote-code` in vLLM."""
from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """LLaMA's configuration and, for each layer, block_configs[i].attention and .ffn with their settings."""
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **settings):
        super().__init__(**settings)
        self.block_configs = [SimpleNamespace(**{part: SimpleNamespace(**table) for part, table in block.items()})
                              for block in block_configs]

    def to_dict(self):
        blocks = [{part: vars(table) for part, table in vars(block).items()} for block in self.block_configs]
        return {**super().to_dict(), "block_configs": blocks}
