"""Masked diffusion language models for transformers. Importing this package registers them with the Auto classes,
and the pipeline "text-diffusion".

The files named `*_mdlm.py` travel to the Hub beside the weights, for `trust_remote_code=True`.
"""

from .requirements_mdlm import MINIMUM  # noqa: F401  (first: an old transformers lacks names that the others import)


# isort: split

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.pipelines import PIPELINE_REGISTRY

from .backbones import as_masked_diffusion
from .configuration_backbone_mdlm import MDLMBackboneConfig
from .configuration_mdlm import MDLMConfig
from .generation_mdlm import MDLMGenerationConfig, MDLMGenerationOutput
from .modeling_backbone_mdlm import MDLMBackboneForMaskedDiffusion
from .modeling_mdlm import MDLMForMaskedDiffusion, MDLMModel
from .text_diffusion_pipeline import TextDiffusionPipeline


__version__ = "0.2.0"


class NotCausal:
    """Registered with `AutoModelForCausalLM` so that asking it for one of these models names the right Auto class."""

    config_class = MDLMConfig

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise ValueError(
            "a masked diffusion model is not a causal language model: load it with AutoModel or AutoModelForMaskedLM"
        )

    _from_config = from_pretrained


class BackboneNotCausal(NotCausal):
    config_class = MDLMBackboneConfig


for config, model, refusal in (
    (MDLMConfig, MDLMForMaskedDiffusion, NotCausal),
    (MDLMBackboneConfig, MDLMBackboneForMaskedDiffusion, BackboneNotCausal),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForMaskedLM.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, refusal, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
PIPELINE_REGISTRY.register_pipeline(
    "text-diffusion", pipeline_class=TextDiffusionPipeline, pt_model=(AutoModel,), type="text"
)

__all__ = [
    "MDLMBackboneConfig",
    "MDLMBackboneForMaskedDiffusion",
    "MDLMConfig",
    "MDLMForMaskedDiffusion",
    "MDLMGenerationConfig",
    "MDLMGenerationOutput",
    "MDLMModel",
    "TextDiffusionPipeline",
    "as_masked_diffusion",
]
