"""Masked diffusion language models for transformers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from .configuration_mdlm import MDLMConfig
from .generation_mdlm import MDLMGenerationConfig, MDLMGenerationOutput
from .modeling_mdlm import MDLMForMaskedDiffusion, MDLMModel


AutoConfig.register(MDLMConfig.model_type, MDLMConfig, exist_ok=True)
AutoModel.register(MDLMConfig, MDLMForMaskedDiffusion, exist_ok=True)
AutoModelForMaskedLM.register(MDLMConfig, MDLMForMaskedDiffusion, exist_ok=True)
MDLMConfig.register_for_auto_class()
MDLMForMaskedDiffusion.register_for_auto_class("AutoModel")

__all__ = ["MDLMConfig", "MDLMForMaskedDiffusion", "MDLMGenerationConfig", "MDLMGenerationOutput", "MDLMModel"]
