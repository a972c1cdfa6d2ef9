"""`pipeline("text-diffusion", model=...)`: text in, text out, with the options of `generate`."""

import torch
from transformers import Pipeline
from transformers.utils.chat_template_utils import Chat

from .prompts import encode, encode_messages, up_to_special


class TextDiffusionPipeline(Pipeline):
    """Writes text with a masked diffusion model.

    A call takes a prompt to continue; a text in which the tokenizer's mask stands for each token to fill; messages
    `[{"role": ..., "content": ...}]`, which go through the chat template; `""`, for text from nothing; or a list of these,
    which are written one after the other. It returns a list with a dict for each of `num_return_sequences` texts:
    `generated_text`, with the prompt unless `return_full_text=False` or messages were given, and `nfe`, the forwards of the
    network. A list of inputs gives a list of such lists.

    Every other argument, `seed` and `streamer` included, goes to `generate`.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """

    _load_tokenizer = True

    def _sanitize_parameters(self, return_full_text: bool | None = None, **options):
        after = {} if return_full_text is None else {"return_full_text": return_full_text}
        return {}, {"options": options} if options else {}, after

    def __call__(self, inputs, *args, batch_size: int | None = None, **kwargs):
        if batch_size not in (None, 1) or (self._batch_size or 1) > 1:
            raise ValueError(
                f"batch_size is {batch_size or self._batch_size}, but texts are written one after the other: leave it out; "
                "num_return_sequences writes several from one prompt at once"
            )
        return super().__call__(inputs, *args, **{**self._forward_params.get("options", {}), **kwargs})

    def preprocess(self, inputs) -> dict:
        if isinstance(inputs, Chat):
            return {"input_ids": encode_messages(inputs.messages, self.tokenizer, self.model), "answers": True}
        if not isinstance(inputs, str):
            raise ValueError(f"a prompt must be a text or a list of messages, not {type(inputs).__name__}")
        return {"input_ids": encode(inputs, self.tokenizer, self.model), "answers": False}

    def _forward(self, model_inputs: dict, options: dict | None = None) -> dict:
        options = {**(options or {}), "return_dict_in_generate": True}
        output = self.model.generate(model_inputs["input_ids"], **options)
        return {"sequences": output.sequences, "nfe": output.nfe, **model_inputs}

    def postprocess(self, model_outputs: dict, return_full_text: bool = True) -> list[dict]:
        ids = model_outputs["input_ids"]
        given = torch.empty(0) if ids is None else ids[0]
        begun = (
            0 if (given == self.tokenizer.mask_token_id).any() else len(given)
        )  # an infill has no part to leave out
        texts = []
        for sequence, nfe in zip(model_outputs["sequences"].tolist(), model_outputs["nfe"].tolist(), strict=True):
            if model_outputs["answers"]:
                text = self.tokenizer.decode(up_to_special(sequence[begun:], self.tokenizer)).strip()
            else:
                text = self.tokenizer.decode(sequence[0 if return_full_text else begun :], skip_special_tokens=True)
            texts.append({"generated_text": text, "nfe": nfe})
        return texts
