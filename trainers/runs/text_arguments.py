"""The settings of a run's text: where it comes from, and how it is cut into blocks."""

import dataclasses
from dataclasses import dataclass, field

from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers


@dataclass
class TextArguments:
    """Where the text comes from, and how it is cut into blocks."""

    train_text: str = field(
        metadata={
            "help": "Training text: a UTF-8 text file, a file or folder of .txt, .jsonl, .csv, .parquet or .arrow, a folder of "
            "save_to_disk, or the name of a Hub dataset. Tables may hold prompts and completions or messages, see "
            "docs/instruction_data.md, or token ids, see docs/data.md."
        }
    )
    validation_text: str | None = field(
        default=None, metadata={"help": "Held-out text, of the same kinds as the training text."}
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column with the text, completions or messages; plain text files have none. Where there is no "
            "column text: completion with prompt, or else messages, or else input_ids."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompts, if text_column has completions; null: prompt."}
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Join texts and cut them into blocks; false: one row for each. Null: join text, nothing else."
        },
    )
    completion_only: bool | None = field(
        default=None,
        metadata={"help": "Noise and score completions alone, not their prompts. Null: where there are completions."},
    )
    train_split: str = field(
        default="train", metadata={"help": "Split of a Hub dataset; 'train[:-1000]' for a slice."}
    )
    validation_split: str = field(default="validation", metadata={"help": "Split of the Hub dataset held out."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Tokenise the training text during training, over and over, in order."}
    )
    shuffle_buffer: int | None = field(
        default=None, metadata={"help": "Shuffle streamed rows within windows of so many; null: in order."}
    )
    split_stream: bool = field(
        default=False,
        metadata={
            "help": "Each process of a launch reads its own share of streamed text. Otherwise the first one reads for all."
        },
    )
    more_text: list[str] | None = field(
        default=None, metadata={"help": "Further training texts, mixed with train_text by text_weights."}
    )
    text_weights: list[float] | None = field(
        default=None, metadata={"help": "Shares of the rows that train_text and each of more_text give."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "Hold out this share of the training rows, by the hash of their tokens."},
    )
    num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenise, for each process of a launch; null: one."},
    )
    block_length: int = field(
        default=1024,
        metadata={"help": "Tokens in a block with BOS and EOS; rows that are not packed are cut to it."},
    )
    max_validation_blocks: int | None = field(
        default=None, metadata={"help": "Use only this many validation blocks, the first ones."}
    )

    def __post_init__(self):
        check_numbers(self, max_validation_blocks=AT_LEAST_1, num_proc=AT_LEAST_1, shuffle_buffer=AT_LEAST_1)
        check_numbers(self, validation_fraction=("lie in (0, 1)", lambda value: 0 < value < 1))
        for name in ("train_text", "validation_text"):
            if getattr(self, name) == "":  # as a path, it would be the current folder
                raise ValueError(f"{name} is empty: give a text file, a folder of text, or the name of a dataset")
        if "" in (self.more_text or ()):
            raise ValueError(
                "more_text holds an empty name: give a text file, a folder of text, or the name of a dataset"
            )
        if self.validation_text is None:
            names = ("validation_split", *(["max_validation_blocks"] if self.validation_fraction is None else []))
            for name in names:
                if getattr(self, name) != default_of(name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but there is no validation_text to use it for"
                    )
        elif self.validation_fraction is not None:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}, but validation_text is given: leave one of them out"
            )
        self._check_stream_and_weights()

    def _check_stream_and_weights(self):
        for name in ("shuffle_buffer", "split_stream"):
            if getattr(self, name) and not self.streaming:
                raise ValueError(f"{name} is {getattr(self, name)}, but is for streaming text: leave it out")
        if self.streaming and self.validation_fraction is not None and self.max_validation_blocks is None:
            raise ValueError(
                "validation_fraction of a stream needs max_validation_blocks: the held-out rows are read before the training"
            )
        count, weights = 1 + len(self.more_text or ()), self.text_weights
        if (weights is None) != (count == 1) or (weights is not None and len(weights) != count):
            raise ValueError(
                f"text_weights is {weights}, but must have one weight for train_text and one for each of more_text "
                f"({self.more_text})"
            )
        if weights is not None and not min(weights) > 0:
            raise ValueError(
                f"text_weights is {weights}, but every weight must be positive: leave out what is not wanted"
            )
        if self.streaming and self.num_proc is not None and self.validation_text is None:
            raise ValueError(
                f"num_proc is {self.num_proc}, but streaming text is tokenised as it is read: leave it out"
            )


def default_of(name: str):
    return next(field.default for field in dataclasses.fields(TextArguments) if field.name == name)
