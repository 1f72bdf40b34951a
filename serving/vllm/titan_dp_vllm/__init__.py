"""A plugin of vLLM's: it serves what `titan-dp export --format remote-code` writes, n_h > 1 included."""


def register() -> None:
    """vLLM calls this in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    ModelRegistry.register_model("TitanDPForCausalLM", "titan_dp_vllm.model:TitanDPForCausalLM")
    MODELS_CONFIG_MAP["TitanDPForCausalLM"] = MambaModelConfig  # a page of the cache for each request, not for each block
