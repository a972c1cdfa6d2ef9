"""What a chain gains and why: by steps, by single tokens' laws and jointly; and what changes of it would gain at four steps.

    python -m benchmarks.coupling_levers MODEL --text FOLDER --train_text FOLDER [--updates 160]

MODEL has a chain of four levels, or of a multiple of four. A chain changes the law of each token as well as what tokens know of
each other: its gain is split into what independent draws from these single laws gain (at the first and last token of a block,
which are special tokens, and at the others), and the rest, which is joint. Under spread locking each of four steps has a level of its own, so a change of
a level is trained on its step of N = 4 alone, on the same blocks and plans as the others; two changes train the network too, by
LoRA. Figures are nats per token of all the text, so those of the four steps add up. Every level is saved in
`benchmarks/results/coupling_levers_NAME.json` as soon as it is measured, and the tables in `coupling_levers_NAME.md`: a command
that was killed goes on where it was.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoTokenizer

from benchmarks.coupling_bound import ROOT, bound_of, saved
from benchmarks.measuring import circumstances, count
from evaluation import Bound, read_texts, text_blocks
from evaluation.judge import fingerprint
from modeling_mcd.coupling_mdlm import Chain
from modeling_mcd.files import write_atomically
from modeling_mcd.forward_process_mdlm import mask_tokens, process_of
from modeling_mcd.head_mdlm import exclude_mask
from modeling_mcd.loading import load_model
from modeling_mcd.locking_mdlm import locked_uniforms
from modeling_mcd.reveal_grid_mdlm import ancestral_reveal_steps
from trainers.adapters import with_adapter


STEPS = 4
FINER = (8, 16)  # numbers of steps whose plans refine those of four
RATE, RATE_OF_CONTEXT, RATE_OF_NETWORK = 3e-2, 3e-3, 2e-3
RANK = 8  # of an update of the network
FIRST = "goes on"
NEW = {"new, 256 states": (256, 1), "new, 512 states": (512, 1), "new, 4 topics of 64 states": (256, 4)}
SEEING = ("begins as level 0", "sees the context", "the context, without a chain")
UPDATING = ("updates the network", "updates it, without a chain")


class Level(nn.Module):
    """One level of a chain: a, T and W, as `MDLMCoupling` has them, and what the levers add.

    Args:
        start, transition, emission: [S], [S, S], [S, V].
        width: of the network's hidden states, which then shift the evidence of a masked position i by <U_s, h_i>: it is exact all
            the same, since the evidence may depend on all that is visible. 0: they do not.
        topics: equal groups of states that the chain never leaves, a mixture of as many chains.
        joins: False leaves T and a at one, so that no token knows of another.
        network: the network under the chain, if it is trained with it; None: the frozen one.
    """

    def __init__(self, start, transition, emission, width=0, topics=1, joins=True, network: nn.Module | None = None):
        super().__init__()
        self.network = network
        states = len(start)
        self.start = nn.Parameter(start.clone() if joins else torch.zeros(states), requires_grad=joins)
        self.transition = nn.Parameter(
            transition.clone() if joins else torch.zeros(states, states), requires_grad=joins
        )
        self.emission = nn.Parameter(emission.clone())
        self.context = nn.Parameter(torch.zeros(states, width)) if width else None
        topic = torch.arange(states) * topics // states
        self.allowed = (topic[:, None] == topic).float()

    def gain(self, texts, masked, revealed, p, hidden) -> torch.Tensor:
        """Nats of each text [n] by which this is better than the frozen network alone, whose p and hidden states are given."""
        if self.network is None:
            return self.log_gain(texts, masked, revealed, p, hidden)
        own, own_hidden = seen(self.network, texts, masked)
        updated = (log_of(own, texts, masked) - log_of(p, texts, masked)) * revealed
        return updated.sum(dim=1) + self.log_gain(texts, masked, revealed, own, own_hidden)

    def log_gain(self, texts, masked, revealed, p, hidden) -> torch.Tensor:
        """`Chain.log_gain` of texts [n, L], for the probabilities [R, V] and hidden states [R, d] of the masked positions.

        Where everything is masked they are those of one row, [L, V] and [L, d].
        """
        chain, known, evidence = self.evidence(texts, masked, p, hidden)
        known = torch.where(revealed[..., None], known, evidence)
        joint, total = chain.log_sum(torch.cat([known, evidence]), torch.ones_like(masked).repeat(2, 1)).chunk(2)
        return joint - total

    def log_gain_of_single_tokens(self, texts, masked, revealed, p, hidden) -> torch.Tensor:
        """What each token gains [n, L] if it is drawn from its own law under the chain, independently of the others."""
        with torch.no_grad():
            chain, known, evidence = self.evidence(texts, masked, p, hidden)
        log_evidence = evidence.log().requires_grad_()
        with torch.enable_grad():
            total = chain.log_sum(log_evidence.exp(), torch.ones_like(masked)).sum()
        (states,) = torch.autograd.grad(total, log_evidence)  # the law of each position's state
        return ((states * known / evidence).sum(dim=-1).log() * revealed).detach()

    def evidence(self, texts, masked, p, hidden) -> tuple[Chain, torch.Tensor, torch.Tensor]:
        """The chain; the evidence [n, L, S] if every token is known; and if the masked ones are summed out."""
        chain = Chain(self.start.exp(), self.transition.exp() * self.allowed, self.emission.T.log_softmax(dim=-1))
        known, told = chain.emission[texts], p @ chain.emission
        if self.context is not None:
            shift = (hidden @ self.context.T).exp()
            known, told = known.masked_scatter(masked[..., None], known[masked] * shift), told * shift
        repeats = int(masked.sum()) // len(told)
        return chain, known, known.masked_scatter(masked[..., None], told.repeat(repeats, 1))

    def parameter_groups(self) -> list[dict]:
        slow = [] if self.context is None else [{"params": [self.context], "rate": RATE_OF_CONTEXT}]
        if self.network is not None:
            factors = [p for p in self.network.parameters() if p.requires_grad]
            slow.append({"params": factors, "rate": RATE_OF_NETWORK})
        own = [self.start, self.transition, self.emission]
        return [{"params": [p for p in own if p.requires_grad], "rate": RATE}, *slow]


def levels_of(model, level: int) -> dict[str, Level]:
    """What is compared at the level of one step of four, by name."""

    def own(index: int) -> list[torch.Tensor]:
        weights = model.coupling(model.get_input_embeddings().weight)
        return weights.at(index * weights.levels // STEPS, torch.float32)

    def updated() -> nn.Module:
        return with_adapter(copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=RANK))

    changed = (Level(*own(level), network=updated()), Level(*own(level), joins=False, network=updated()))
    cells = {FIRST: Level(*own(level)), **dict(zip(UPDATING, changed, strict=True))}
    width = model.config.hidden_size
    if level == 0:  # the hidden states are the same in every text: they have nothing to tell
        generator = torch.Generator().manual_seed(0)
        for name, (states, topics) in NEW.items():
            emission = torch.randn(states, model.config.vocab_size, generator=generator).unflatten(0, (topics, -1))
            emission = (emission - emission.logsumexp(dim=1, keepdim=True)).flatten(0, 1)  # no token prefers a topic
            cells[name] = Level(torch.zeros(states), torch.zeros(states, states), emission, topics=topics)
        return cells
    start, transition, emission = own(0)
    changed = (
        Level(0.3 * start, 0.3 * transition, emission),
        Level(*own(level), width=width),
        Level(*own(level), width=width, joins=False),
    )
    return cells | dict(zip(SEEING, changed, strict=True))


def plans(model, texts: torch.LongTensor, steps: int, seed: int) -> torch.LongTensor:
    """The step that reveals each token, [n, L], under spread locking; of one seed for every N."""
    rho = torch.rand(texts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    locked = locked_uniforms("spread", rho, torch.ones_like(texts, dtype=torch.bool), steps)
    return ancestral_reveal_steps(locked, steps, process_of(model.config).schedule)


def seen(model, texts: torch.LongTensor, masked: torch.BoolTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's probabilities [R, V] and hidden states [R, d] at the masked positions; of one row if all is masked.

    With a gradient where the network is trained, which `HeadRows.log_probabilities` has not.
    """
    if masked.all():
        texts, masked = texts[:1], masked[:1]
    z = mask_tokens(texts, masked, model.config.mask_token_id)
    parts = [model(input_ids=a, hidden_rows=b) for a, b in zip(z.split(16), masked.split(16), strict=True)]
    logits = torch.cat([torch.addmm(rows.bias, rows.hidden, rows.weight.T) for rows in parts])
    p = exclude_mask(logits, model.config.mask_token_id, -math.inf).softmax(dim=-1)
    return p, torch.cat([rows.hidden for rows in parts])


def log_of(p: torch.Tensor, texts: torch.LongTensor, masked: torch.BoolTensor) -> torch.Tensor:
    """Log-probability of each masked token, [n, L], 0 elsewhere; of the network's probabilities as `seen` returns them."""
    p = p.repeat(int(masked.sum()) // len(p), 1).gather(1, texts[masked][:, None])[:, 0]
    return torch.zeros(texts.shape, dtype=torch.float64).masked_scatter(masked, p.double().log())


@torch.no_grad()
def nats_of_quarters(model, texts: torch.LongTensor, steps: int) -> torch.Tensor:
    """Nats of each text [4, n] without a chain, of the steps of each quarter of a plan."""
    plan, nats = plans(model, texts, steps, seed=0), torch.zeros(STEPS, len(texts), dtype=torch.float64)
    for step in range(steps):
        masked, revealed = plan >= step, plan == step
        nats[step * STEPS // steps] -= (log_of(seen(model, texts, masked)[0], texts, masked) * revealed).sum(dim=1)
    return nats


def taught(model, cells: dict[str, Level], level: int, blocks: torch.LongTensor, updates: int):
    """Trains what is compared at one level, side by side: each update has so many blocks, [updates, n, L]."""
    optimizers = {name: torch.optim.Adam(cell.parameter_groups()) for name, cell in cells.items()}
    for update in range(updates):
        texts = blocks[update]
        plan = plans(model, texts, STEPS, seed=1 + update)
        masked, revealed = plan >= level, plan == level
        told = seen(model, texts, masked)
        for name, cell in cells.items():
            for group in optimizers[name].param_groups:
                group["lr"] = (
                    group["rate"] * min(1, (update + 1) / 10) * (1 + math.cos(math.pi * update / updates)) / 2
                )
            loss = -cell.gain(texts, masked, revealed, *told).sum() / texts.numel()
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
        if (update + 1) % 40 == 0:
            print(f"level {level}, update {update + 1}", flush=True)


@torch.no_grad()
def gains_of(model, texts: torch.LongTensor, steps: int) -> dict[str, torch.Tensor]:
    """What the chain gains at each of some steps, [steps, n] each: in all, and by single laws at the ends and elsewhere."""
    plan, found = plans(model, texts, steps, seed=0), {"chain": [], "ends": [], "others": []}
    for step in range(steps):
        canvas = texts, plan >= step, plan == step, *seen(model, texts, plan >= step)
        level = levels_of(model, step * STEPS // steps)[FIRST]
        single = level.log_gain_of_single_tokens(*canvas)
        found["chain"].append(level.log_gain(*canvas))
        found["ends"].append(single[:, [0, -1]].sum(dim=1))
        found["others"].append(single[:, 1:-1].sum(dim=1))
    return {name: torch.stack(values) for name, values in found.items()}


def table(content: dict, tokens: int) -> str:
    """What the chain gains and why, where the dependence lies, and what each change gains."""

    def bound(nats) -> Bound:
        return bound_of({"nats": torch.as_tensor(nats).tolist()}, tokens)

    def value(nats) -> str:
        return f"{bound(nats).mean:.4f} ± {bound(nats).error:.4f}"

    def line(*cells) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    def parts(gains: dict[str, torch.Tensor]) -> list[str]:
        joint = gains["chain"] - gains["ends"] - gains["others"]
        return [value(nats) for nats in (gains["chain"], joint, gains["ends"], gains["others"])]

    gains = {n: {k: torch.tensor(v, dtype=torch.float64) for k, v in of.items()} for n, of in content["gains"].items()}
    quarters = {n: torch.tensor(content["nats"][n], dtype=torch.float64) for n in map(str, (STEPS, *FINER))}
    split = ("the chain gains", "jointly", "first and last token's laws", "other single laws")
    lines = [
        f"Nats per token of {quarters['4'].shape[1]} held-out blocks of {tokens} tokens, ± the standard error over blocks.",
        "",
        line("N", *split),
        line("---", *["---:"] * len(split)),
        *(line(n, *parts({k: v.sum(dim=0) for k, v in of.items()})) for n, of in gains.items()),
        "",
        line("step of four", "nats", *(f"{n} steps gain" for n in FINER), *split),
        line("---", *["---:"] * (3 + len(split))),
    ]
    for step in range(STEPS):
        here = [nats[step] for nats in quarters.values()]
        finer = [value(here[0] - nats) for nats in here[1:]]
        lines.append(line(step + 1, value(here[0]), *finer, *parts({k: v[step] for k, v in gains["4"].items()})))
    if content["levels"]:
        lines += ["", line("step", "change", "the chain gains", "less the one that goes on, paired")]
        lines += [line("---", "---", "---:", "---:")]
    for level, cells in sorted(content["levels"].items()):
        for name, nats in cells.items():
            more = "" if name == FIRST else "{:+.4f} ± {:.4f}".format(*bound(nats).minus(bound(cells[FIRST])))
            lines.append(line(int(level) + 1, name, value(nats), more))
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--text", default=str(ROOT / "recipes" / "bible" / "text" / "validation"))
    parser.add_argument("--train_text", default=str(ROOT / "recipes" / "bible" / "text" / "train"))
    parser.add_argument("--name", default="bible", help="Of the result.")
    parser.add_argument("--blocks", type=count, default=64)
    parser.add_argument("--updates", type=count, default=160)
    parser.add_argument("--batch_size", type=count, default=16, help="Blocks of an update.")
    parser.add_argument(
        "--levels", type=int, nargs="*", default=[1, 2, 3, 0], choices=range(STEPS), help="To be taught."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    model, tokenizer = (
        load_model(options.model).eval().requires_grad_(False),
        AutoTokenizer.from_pretrained(options.model),
    )
    if model.config.coupling is None or model.config.coupling["levels"] % STEPS:
        raise SystemExit(
            f"{options.model} has no chain of {STEPS} levels or of a multiple of {STEPS}: its coupling is {model.config.coupling}"
        )
    length = model.config.max_position_embeddings
    held_out = text_blocks(read_texts(options.text), tokenizer, length, options.blocks)
    about = {"weights": fingerprint(model), "blocks": len(held_out), "tokens": length, "updates": options.updates}
    path = options.results / f"coupling_levers_{options.name}.json"
    content = saved(path, about | {"batch_size": options.batch_size}, levels={})

    def keep(**found):
        content.update(found)
        write_atomically(path, json.dumps(content | circumstances()) + "\n")

    def rounded(nats: torch.Tensor) -> list:
        return nats.double().round(decimals=3).tolist()

    if "gains" not in content:
        nats = {str(n): rounded(nats_of_quarters(model, held_out, n)) for n in (STEPS, *FINER)}
        gains = {str(n): gains_of(model, held_out, n) for n in (1, 2, STEPS)}
        keep(nats=nats, gains={n: {name: rounded(values) for name, values in of.items()} for n, of in gains.items()})
    texts = text_blocks(read_texts(options.train_text), tokenizer, length, 10**9)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
    places = torch.arange(options.updates * options.batch_size) % len(texts)
    blocks = texts[order[places]].unflatten(0, (options.updates, -1))
    for level in options.levels:
        if str(level) not in content["levels"]:
            cells = levels_of(model, level)
            taught(model, cells, level, blocks, options.updates)
            plan = plans(model, held_out, STEPS, seed=0)
            canvas = held_out, plan >= level, plan == level, *seen(model, held_out, plan >= level)
            with torch.no_grad():
                found = {name: rounded(cell.gain(*canvas)) for name, cell in cells.items()}
            keep(levels=content["levels"] | {str(level): found})
    found = table(content, length)
    write_atomically(path.with_suffix(".md"), found)
    print(found)


if __name__ == "__main__":
    main()
