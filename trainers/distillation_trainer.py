"""What all distillers share: rounds, a gap that widens from round to round, and the teacher."""

from dataclasses import dataclass, field

from torch import nn

from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from trainers.adapters import AdapterFollower, is_adapted
from trainers.diffusion_trainer import DiffusionTrainer, DiffusionTrainingArguments
from trainers.teacher import Follower


@dataclass
class DistillationArguments(DiffusionTrainingArguments):
    """Rounds of equal length. After each, the student is exported and judged; what else happens depends on the method."""

    num_rounds: int = field(default=5, metadata={"help": "Number of rounds N."})
    steps_per_round: int = field(
        default=10_000, metadata={"help": "Steps M in a round; max_steps is N * M unless given."}
    )
    learning_rate: float = field(default=6e-5, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=500, metadata={"help": "Steps of linear warm-up."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "end: push the finished model; every_save: each round's student too, as the branch round-k."
        },
    )
    hub_strategies = DiffusionTrainingArguments.hub_strategies | {
        "every_save": "each round's student too, as a branch"
    }

    def __post_init__(self):
        check_numbers(self, num_rounds=AT_LEAST_1, steps_per_round=AT_LEAST_1)
        steps = self.num_rounds * self.steps_per_round
        if self.max_steps == -1:
            self.max_steps = steps
        super().__post_init__()
        if self.max_steps > steps:
            raise ValueError(
                f"max_steps ({self.max_steps}) goes beyond the last round, which ends at num_rounds * steps_per_round = "
                f"{self.num_rounds} * {self.steps_per_round} = {steps}: make it smaller, or give more or longer rounds"
            )

    # The round, the gap and everything derived from them are functions of the step alone, so none of it has to be saved.

    def round_of(self, step: int) -> int:
        return min(step // self.steps_per_round, self.num_rounds - 1)


@dataclass
class WideningGapArguments(DistillationArguments):
    """A gap in time that grows by a factor from each round to the next."""

    delta: float = field(default=1 / 512, metadata={"help": "Time gap t - s in the first round, in (0, 1)."})
    delta_growth: float = field(
        default=2.0, metadata={"help": "Factor by which delta grows from each round to the next."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not (self.delta > 0 and self.delta_growth > 0):  # NaN is refused too
            raise ValueError(f"delta ({self.delta}) and delta_growth ({self.delta_growth}) must be positive")
        widest = self.delta * max(1.0, self.delta_growth ** (self.num_rounds - 1))
        if not widest < 1:
            raise ValueError(
                f"delta ({self.delta}) grows to {widest:g} in {self.num_rounds} rounds, but t - s must stay below 1: "
                "take a smaller delta, delta_growth or num_rounds"
            )

    def delta_of(self, round: int) -> float:
        return self.delta * self.delta_growth**round


def check_same_tokens(teacher, student, diffusion_kind: str = "absorbing"):
    """Raises ValueError unless both configurations have this diffusion kind, the same vocabulary and the same mask."""
    for name, config in (("teacher", teacher), ("student", student)):
        if config.diffusion_kind != diffusion_kind:
            raise ValueError(
                f"the {name}'s diffusion_kind is {config.diffusion_kind!r}, but this trainer is for {diffusion_kind} "
                "diffusion: give a network of that kind, or a trainer of the other ('dcd' is the one for uniform)"
            )
    for name in ("vocab_size", "mask_token_id"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise ValueError(
                f"teacher and student differ in {name}: {theirs} and {ours}; their tokens must be the same"
            )


# The fields that decide what function a set of weights computes. Dropout, context and noise schedule do not.
ARCHITECTURE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "conditioning_size"),
    *("layer_norm_eps", "rope_theta", "time_conditioning", "tie_word_embeddings"),
)
# Those of a backbone's configuration that do not; every other one is taken to.
UNRELATED = (
    *("_name_or_path", "architectures", "dtype", "transformers_version", "masked_diffusion", "use_cache"),
    *("initializer_range", "bos_token_id", "eos_token_id"),
)


def decisive_fields(config) -> dict:
    """The fields of a model's configuration that decide what its weights compute."""
    if not hasattr(config, "backbone_config"):
        return {name: getattr(config, name, None) for name in ("model_type", *ARCHITECTURE)}
    network = config.backbone_config.to_dict()
    own = {name: getattr(config, name) for name in ("head_transform", "logits_shift", "attention", "block_size")}
    return own | {name: x for name, x in network.items() if name not in UNRELATED and "drop" not in name}


def check_same_network(teacher, student):
    """Raises ValueError, naming every field that differs, unless the student can become the next round's teacher."""
    theirs, ours = decisive_fields(teacher), decisive_fields(student)
    names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    names = ["model_type"] if "model_type" in names else names  # nothing else can be compared
    if names:
        differing = [f"{name} ({theirs.get(name)} and {ours.get(name)})" for name in names]
        raise ValueError(
            f"teacher and student differ in {', '.join(differing)}: they must be the same network, since each round's "
            "student becomes the next one's teacher"
        )


def check_same_parameters(teacher: nn.Module, student: nn.Module):
    """Raises ValueError, naming a parameter, unless one network's weights can be copied into the other."""
    theirs, ours = (dict(network.named_parameters()).keys() for network in (teacher, student))
    if theirs != ours:
        name, owner = min(
            [(name, "student") for name in ours - theirs] or [(name, "teacher") for name in theirs - ours]
        )
        raise ValueError(
            f"only the {owner} has the parameter {name!r}, but each round's student becomes the next one's teacher: give "
            "two networks of one kind (of a PEFT model, what merge_and_unload() returns)"
        )


class DistillationTrainer(DiffusionTrainer):
    """A student that learns from a teacher: `teacher` at first, then whatever the method replaces it with.

    Args:
        model: the student; usually a copy of the teacher.
        teacher: a network of the same architecture and vocabulary; a copy of the student by default. Of a student with an
            adapter the first teacher is the base without it, and no other can be given.

    Raises:
        ValueError: the networks have another diffusion kind than the method needs, differ in vocabulary, mask, architecture
            or parameters, or a teacher is given to a method that has none, or beside an adapter.
    """

    diffusion_kind = "absorbing"
    has_teacher = True

    def __init__(self, model, args: DistillationArguments, *, teacher: nn.Module | None = None, **kwargs):
        if teacher is not None and (kwargs.get("peft_config") is not None or is_adapted(model)):
            raise ValueError(
                "a teacher is given beside a student with an adapter, but the student's base without it is the first teacher: "
                "give no teacher, and the network to distil as the model"
            )
        super().__init__(model, args, **kwargs)
        first = (self.model if teacher is None else teacher).config
        check_same_tokens(first, self.model.config, self.diffusion_kind)
        check_same_network(first, self.model.config)
        if teacher is not None:
            check_same_parameters(teacher, self.model)
        if self.has_teacher:
            if is_adapted(self.model):
                follower = AdapterFollower(self.model, off=True)
            else:
                first = self.model if teacher is None else teacher
                follower = Follower(first, self.model.dtype, waits=self.is_fsdp_enabled and teacher is None)
            self.companions["teacher"] = self.place(follower)
            self.teacher = follower.model
            self.compile_trunk(self.teacher)
        elif teacher is not None:
            raise ValueError(f"{type(self).__name__} has no teacher but the student itself: give only that one")

    def first_teacher(self) -> nn.Module:
        """What the student learns from at first, before training begins: the student itself for a method without a teacher."""
        if not self.has_teacher or self.companions["teacher"].waits:
            return self.handed_on()
        return self.judged_form(self.teacher)

    def schedule_position(self) -> str:
        return f" (round {self.args.round_of(self.state.global_step) + 1} of {self.args.num_rounds})"
