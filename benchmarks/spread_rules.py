"""Why `spread` has two rules: the N-step bound of each rule at every N, on held-out text.

    python -m benchmarks.spread_rules [--steps 2 3 4 6 8] [--blocks 32]

Both rules lock a block with the same rho. Prints nats per token and the paired difference with its standard error, and writes
`benchmarks/results/spread_rules.json`.
"""

import argparse
from unittest.mock import patch

from transformers import AutoTokenizer

from benchmarks.measuring import count, write_result
from evaluation import Bound, read_texts, step_bound, text_blocks
from modeling_mcd import sampling_mdlm
from modeling_mcd.loading import load_model
from modeling_mcd.locking_mdlm import locked_uniforms


RULES = {"golden ratio": None, "van der Corput": 1}  # the number of steps that makes `locked_uniforms` take each


def bound(model, blocks, steps: int, rule: str) -> Bound:
    def by_rule(locking, u, fillable, steps=None):
        return locked_uniforms(locking, u, fillable, RULES[rule])

    with patch.object(sampling_mdlm, "locked_uniforms", by_rule):
        return step_bound(model, blocks, steps=steps, locking="spread", batch_size=16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="recipes/tiny/teacher")
    parser.add_argument("--text", default="recipes/tiny/text/validation")
    parser.add_argument("--steps", type=count, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--blocks", type=count, default=32)
    parser.add_argument("--output", help="The result file; under benchmarks/results/ by default.")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model).eval(), AutoTokenizer.from_pretrained(options.model)
    length = model.config.max_position_embeddings
    blocks, rows = text_blocks(read_texts(options.text), tokenizer, length, options.blocks), []
    for steps in options.steps:
        golden, corput = (bound(model, blocks, steps, rule) for rule in RULES)
        difference, error = corput.minus(golden)
        row = {"steps": steps, **dict(zip(RULES, (golden.mean, corput.mean), strict=True))}
        rows.append(row | {"difference": difference, "standard_error": error})
        print(
            f"N = {steps}: golden ratio {golden.mean:.3f} ± {golden.error:.3f}, van der Corput {corput.mean:.3f}, "
            f"less by {-difference:.4f} ± {error:.4f}",
            flush=True,
        )
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    write_result("spread_rules", {"rows": rows, "settings": settings}, options.output)


if __name__ == "__main__":
    main()
