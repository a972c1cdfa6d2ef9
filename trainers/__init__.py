"""How a model is taught: pre-training and distillation, each a `Trainer` subclass with its arguments."""

from . import check_packages as check_packages  # first: it may end the process
from .coupling_trainer import CouplingTrainer, CouplingTrainingArguments
from .dcd_trainer import DCDTrainer, DCDTrainingArguments
from .dscd_trainer import DSCDTrainer, DSCDTrainingArguments
from .mcd_trainer import MCDTrainer, MCDTrainingArguments
from .mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from .mpdc_trainer import MPDCTrainer, MPDCTrainingArguments
from .sdtt_trainer import SDTTTrainer, SDTTTrainingArguments


__all__ = [
    "CouplingTrainer",
    "CouplingTrainingArguments",
    "DCDTrainer",
    "DCDTrainingArguments",
    "DSCDTrainer",
    "DSCDTrainingArguments",
    "MCDTrainer",
    "MCDTrainingArguments",
    "MDLMTrainer",
    "MDLMTrainingArguments",
    "MPDCTrainer",
    "MPDCTrainingArguments",
    "SDTTTrainer",
    "SDTTTrainingArguments",
]
