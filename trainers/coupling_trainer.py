"""Teaches a coupling: a hidden Markov chain over the head of a frozen network, by maximum likelihood.

Each step does, for every sequence x_0:

    N ~ uniform on `plan_steps`,  k ~ uniform on 0 .. N - 1
    plan of N steps from u (`locking`); z = x_0 with every token masked that steps k, k + 1, ... reveal;  G = what step k reveals
    loss = -N log p_coupled(x_G | z),     log p_coupled = sum_G log p_i(x_i | z) + log Z(evidence with x_G) - log Z(evidence)

Its expectation is the mean of the N-step bounds (docs/likelihood.md) over `plan_steps`. The tokens that later steps reveal are
summed out. Only the chain has a gradient; the network runs as it would for a sample. See `coupling_mdlm.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

from modeling_mcd.checks_mdlm import COUNT, check_choices, check_number
from modeling_mcd.configuration_mdlm import EMISSIONS
from modeling_mcd.coupling_mdlm import Chains
from modeling_mcd.forward_process_mdlm import mask_tokens
from modeling_mcd.head_mdlm import HeadRows, in_chunks
from modeling_mcd.locking_mdlm import locked_uniforms
from modeling_mcd.reveal_grid_mdlm import ancestral_reveal_steps
from trainers.batches import maskable_tokens
from trainers.distillation_trainer import DistillationArguments, DistillationTrainer
from trainers.divergences import cross_entropy
from trainers.step_meter import trunk_of


@dataclass
class CouplingTrainingArguments(DistillationArguments):
    """The shape of a new chain, and the plans that it is taught for.

    A model that has a chain of this shape goes on with it. A shared one is separated under `shared: false`: each level then has
    a chain of its own, which begins as what the level had.
    """

    num_rounds: int = field(default=1, metadata={"help": "Equal parts of the run; the model is exported after each."})
    steps_per_round: int = field(default=2000, metadata={"help": "Steps in a round."})
    states: int = field(default=128, metadata={"help": "Hidden states S of the chain."})
    levels: int = field(
        default=4, metadata={"help": "Equal parts of the visible fraction; the chain is another one in each."}
    )
    emission: Literal[EMISSIONS] = field(
        default="table",
        metadata={"help": "What a token tells about the state: a table, or of low rank against the token embedding."},
    )
    window: int | None = field(default=None, metadata={"help": "Positions after which the chain begins anew."})
    shared: bool = field(
        default=True,
        metadata={
            "help": "One chain, which each level takes to powers of its own; false: one for each level, and a model's shared "
            "chain is separated."
        },
    )
    plan_steps: list[int] | None = field(
        default_factory=lambda: [1, 2, 4],
        metadata={"help": "Numbers of steps N to teach for; null: every noise level, all masked tokens at once."},
    )
    learning_rate: float = field(default=3e-2, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=0, metadata={"help": "Steps of linear warm-up."})
    locking: Literal["independent", "spread"] = field(
        default="spread", metadata={"help": "The locking of the samples that the chain is for, see docs/locking.md."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        if self.plan_steps is not None and not self.plan_steps:
            raise ValueError("plan_steps must be one or more numbers of steps, or null for every noise level, not []")
        for steps in self.plan_steps or ():
            check_number("plan_steps", steps, COUNT)
        if self.spread_fraction not in (None, 1):
            raise ValueError(
                f"spread_fraction ({self.spread_fraction}) is for teaching networks: a chain has one locking"
            )

    def coupling(self) -> dict:
        """The `coupling` of a model's configuration."""
        return {name: getattr(self, name) for name in ("states", "levels", "emission", "window", "shared")}


class CouplingTrainer(DistillationTrainer):
    """Trains the chain of a masked diffusion model, and nothing else. A model without one is given one.

    Raises:
        ValueError: the model has a chain of another shape than the arguments say, other than a shared one under
            `shared: false`; or it cannot have one.
    """

    has_teacher = False
    trains_network = False

    def choose_parameters(self, model, args: CouplingTrainingArguments):
        if not hasattr(model, "add_coupling"):
            raise ValueError(f"a {type(model).__name__} cannot have a coupling: give a model of this library")
        wanted = args.coupling()
        if model.coupling is None:
            model.add_coupling(wanted)
        elif model.config.coupling["shared"] and model.config.coupling | {"shared": False} == wanted:
            model.coupling.separate()
            model.config.coupling = wanted
        elif model.config.coupling != wanted:
            raise ValueError(
                f"the model's coupling is {model.config.coupling}, but the recipe says {wanted}: give its settings, or a model "
                "without a chain (only a shared one can change, by `shared: false`)"
            )
        model.generation_config.locking = args.locking  # what it is taught for is how it samples
        if args.plan_steps is not None:
            model.generation_config.steps = max(args.plan_steps)
        model.requires_grad_(False)
        model.coupling.requires_grad_(True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x_0, maskable = inputs["input_ids"], maskable_tokens(inputs, self.process)
        trunk_of(self.model).eval()  # the trunk is as in sampling: without dropout
        times, u = self.noise_of_batch(maskable)
        masked, revealed, gamma, weights = self.plan(times, u, maskable)
        z = mask_tokens(x_0, masked, self.mask_token_id)
        rows = self.compute_rows(model, masked, z, gamma, inputs)

        nats = torch.zeros(x_0.shape, device=x_0.device, dtype=weights.dtype)
        with torch.no_grad():
            nats[revealed] = cross_entropy(rows.at(revealed[masked]), x_0[revealed]).to(nats)
        present = self.process.maskable(x_0) & inputs.get("attention_mask", torch.ones_like(x_0)).bool()
        with torch.autocast(x_0.device.type, enabled=False):
            gain = self.log_gain(rows, x_0, masked, revealed, present, gamma)
        mean = self.batch_mean(maskable, inputs)
        loss = mean.total_of_rows(weights * (nats.sum(dim=1) - gain)) / mean.count

        self.record(
            round=self.args.round_of(self.state.global_step),
            factorised=mean.total_of_rows(weights * nats.sum(dim=1)) / mean.count,
            masked_fraction=masked.double().mean(),
        )
        return (loss, {}) if return_outputs else loss

    def plan(self, times, u, maskable) -> tuple[torch.BoolTensor, torch.BoolTensor, torch.Tensor, torch.Tensor]:
        """One step of a plan for each row: what is masked before it and what it reveals [B, L], gamma and the weight [B]."""
        numbers, locking = self.args.plan_steps, self.args.locking
        if numbers is None:
            gamma = self.schedule.gamma(times)
            masked = (locked_uniforms(locking, u, maskable) > gamma[:, None]) & maskable
            return masked, masked, gamma, maskable.sum(dim=1) / masked.sum(dim=1).clamp(min=1)
        place = times * len(numbers)
        steps = torch.tensor(numbers, device=times.device)[place.long()]
        step = (place % 1 * steps).long()
        plan = torch.zeros_like(maskable, dtype=torch.long)
        for number in set(numbers):  # rho, the u of a row's first maskable token, is the same under every locking
            locked = locked_uniforms(locking, u, maskable, number)
            plan = ancestral_reveal_steps(locked, number, self.schedule).where((steps == number)[:, None], plan)
        gamma = self.schedule.gamma(1 - step / steps.double())
        return maskable & (plan >= step[:, None]), maskable & (plan == step[:, None]), gamma, steps.double()

    def log_gain(self, rows: HeadRows, x_0, masked, revealed, present, gamma) -> torch.Tensor:
        """`Chain.log_gain` of each row [B], level by level; 0 where nothing is revealed."""
        chains = Chains(rows.coupling, self.model.config.coupling["window"], rows.coupling[0].dtype)
        gain, levels = torch.zeros_like(gamma), chains.levels_of(gamma)
        for level in levels.unique().tolist():
            here, chain = levels == level, chains.at(level)
            evidence = chain.emission[x_0[here]]
            evidence[masked[here]] = summed_out(rows.at(here[:, None].expand_as(masked)[masked]), chain.emission)
            found = chain.log_gain(evidence, present[here], revealed[here], x_0[here])
            gain[here] = found.where(revealed[here].any(dim=1), 0).to(gain)
        return gain


def summed_out(rows: HeadRows, emission: torch.Tensor) -> torch.Tensor:
    """Evidence of masked positions, [R, S]: probabilities @ emission, with a gradient for the emission [V, S] alone.

    The backward computes the probabilities again, a chunk at a time: [R, V] is never held.
    """
    own = rows.to(rows.matmul_dtype())

    def of_chunk(part: slice) -> torch.Tensor:
        def product(emission: torch.Tensor) -> torch.Tensor:
            return own.at(part).log_probabilities().exp().to(emission.dtype) @ emission

        return checkpoint(product, emission, use_reentrant=False, preserve_rng_state=False)

    return in_chunks(of_chunk, len(rows.hidden), len(rows.weight), rows.hidden.device)
