import re
from pathlib import Path

from setuptools import find_namespace_packages, setup


EXTRAS = {
    "deepspeed": ["deepspeed>=0.19"],
    "peft": ["peft>=0.21"],
    "eval": ["evaluate>=0.4.6"],
    "lm-eval": ["lm-eval>=0.4.13"],
    "demo": ["gradio>=6.31"],
    "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
    "tracking": ["tensorboard>=2.20", "trackio>=0.43", "wandb>=0.31"],
}
EXTRAS["dev"] = [
    *EXTRAS["deepspeed"],
    *EXTRAS["peft"],
    *EXTRAS["eval"],
    "tensorboard>=2.20",
    "ninja>=1.13",
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "scipy>=1.17",
]

setup(
    name="mcd-diffusion",  # "mcd" is another project's
    version=re.search(r'^__version__ = "(.+)"', Path("modeling_mcd/__init__.py").read_text(encoding="utf-8"), re.M)[1],
    description="Masked diffusion language models that write well in a few steps: Masked Consistency Distillation and its kin",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",  # as transformers and numpy of constraints.txt; nothing is tested on an older one
    packages=find_namespace_packages(include=["modeling_mcd*", "trainers*", "evaluation*", "recipes*"]),
    package_data={"": ["*.yaml", "*.json", "*.jsonl", "*.parquet", "*.txt", "*.safetensors", "*.md", "py.typed"]},
    install_requires=[
        "torch>=2.9",
        "transformers>=5.17,<6",
        "accelerate>=1.15",
        "psutil",
        "datasets>=5.0",
        "huggingface-hub>=1.33",
        "safetensors>=0.7",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "pyyaml>=6.0",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "mcd-distill=trainers.run_mcd:main",
            "mcd-pretrain=trainers.run_mdlm:main",
            "mcd-judge=trainers.run_judge:main",
            "mcd-evaluate=evaluation.run_eval:main",
            "mcd-frontier=evaluation.run_frontier:main",
            "mcd-plan=evaluation.search_plan:main",
            "mcd-lm-eval=evaluation.lm_eval_adapter:main",
            "mcd-eval-results=evaluation.eval_results:main",
            "mcd-generate=modeling_mcd.generate_text:main",
            "mcd-chat=modeling_mcd.chat:main",
            "mcd-convert=modeling_mcd.convert_checkpoints:main",
        ]
    },
)
