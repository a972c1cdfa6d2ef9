"""Makes a masked diffusion model of a language model of transformers: how its head is found, and what is refused."""

import torch
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .configuration_backbone_mdlm import HEAD_TRANSFORMS, WITHOUT_HEAD, MDLMBackboneConfig
from .generation_mdlm import MDLMGenerationMixin
from .modeling_backbone_mdlm import MDLMBackboneForMaskedDiffusion, language_model_class


logger = logging.get_logger(__name__)


def as_masked_diffusion(
    network: PreTrainedModel, mask_token_id: int, logits_shift: int = 0, **options
) -> MDLMBackboneForMaskedDiffusion:
    """A language model of transformers as a masked diffusion model, for every trainer, sampler and report.

    The network is used as it is and not copied, but its attention becomes bidirectional, in all of the text or in blocks
    (`attention="block", block_size=...`), and its cache is turned off.

    What the head is given is found in this order: what its kind is known to have; the trunk's hidden states, if the head
    makes the network's logits of them; the input of the head in a forward of the complete network. Each is checked on four
    tokens (but under ZeRO-3, which has the weights only inside of a training step, so that only known kinds are taken).

    Args:
        network: of a class that `AutoModelForMaskedLM` or `AutoModelForCausalLM` loads without remote code.
        mask_token_id: the id of its mask token.
        logits_shift: 1 when it predicts a token from the position before it, as Dream does.
        options: other fields of `MDLMBackboneConfig`, such as `max_position_embeddings`, or `attention` and `block_size`.

    Raises:
        ValueError: in one line, what of the network does not fit.
    """
    if not isinstance(network, PreTrainedModel) or isinstance(network, MDLMGenerationMixin):
        raise ValueError(f"network must be a language model of transformers, not a {type(network).__name__}")
    expected = language_model_class(network.config)
    if type(network) is not expected:
        raise ValueError(
            f"network is a {type(network).__name__}, but the language model for model_type "
            f"{network.config.model_type!r} is {expected.__name__}: load it as that"
        )
    head = network.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or network.base_model is network:
        raise ValueError(f"{type(network).__name__} has no trunk and linear head apart (get_output_embeddings)")
    kind = network.config.model_type
    given = options.pop("head_transform", HEAD_TRANSFORMS.get(kind))
    if given is None and is_deepspeed_zero3_enabled():
        raise ValueError(f"the head of model_type {kind!r} cannot be looked for under ZeRO-3: give head_transform")
    error = None
    for transform in [[], WITHOUT_HEAD] if given is None else [given]:
        model = wrap(
            network, head_transform=transform, mask_token_id=mask_token_id, logits_shift=logits_shift, **options
        )
        try:
            check_backbone(model)
            return model
        except ValueError as found:
            error = found
    raise error


def wrap(network: PreTrainedModel, **fields) -> MDLMBackboneForMaskedDiffusion:
    network.config.dtype = network.dtype
    config = MDLMBackboneConfig(
        backbone_config=network.config,
        dtype=network.dtype,
        attn_implementation=network.config._attn_implementation,  # a configuration sets its sub-configuration's too
        **fields,
    )
    with torch.device("meta"):  # nothing is made, and nothing of the network is initialised again
        model = MDLMBackboneForMaskedDiffusion(config, network)
    return model.train(network.training)


def check_backbone(model: MDLMBackboneForMaskedDiffusion):
    """Raises ValueError, in one line, when four tokens show that the network does not fit: its head, or who sees whom.

    Nothing is checked under ZeRO-3, which has the weights only inside of a training step.
    """
    if is_deepspeed_zero3_enabled():
        return
    # Free of special tokens in all vocabularies that we know, but for the padding of small ones.
    config, start = model.config, model.config.vocab_size // 4
    special = (config.pad_token_id, config.mask_token_id)
    ids = [i for i in range(start, min(start + 6, config.vocab_size)) if i not in special]
    ids = torch.tensor([ids[: min(4, config.max_position_embeddings)]], device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            check_makes_the_logits(model, ids)
            check_sees_the_future(model, ids[:, : config.block_size])
            if config.block_size is not None:
                check_hides_later_blocks(model, ids)
    finally:
        model.train(was_training)


def check_makes_the_logits(model: MDLMBackboneForMaskedDiffusion, ids: torch.LongTensor):
    """Raises ValueError unless the head makes the network's own logits of the rows that it is given here."""
    mask = model.who_sees_whom(model.positions(ids, None), torch.ones_like(ids))
    own = model.network(input_ids=ids, attention_mask=mask).logits
    try:
        ours = model.get_output_embeddings()(model.transform(model.states(ids, None, None, None, None)))
    except RuntimeError:  # rows of another width than the head's
        ours = None
    tolerance = (
        torch.finfo(own.dtype).eps ** 0.75 * own.abs().max()
    )  # 6e-6 of the largest in float32, 0.03 in bfloat16
    if ours is None or ours.shape != own.shape or not (ours - own).abs().max() <= tolerance:
        path = model.config.head_transform
        rows = "its own input" if path == WITHOUT_HEAD else f"the trunk's hidden states ({path or 'not transformed'})"
        raise ValueError(
            f"the logits of {type(model.network).__name__} are not its head's on {rows}: something is done to them "
            "afterwards (a cap, a scale), or the head is not a linear layer of its own, or head_transform is another"
        )


def check_sees_the_future(model: MDLMBackboneForMaskedDiffusion, ids: torch.LongTensor):
    """Raises ValueError when the first token's hidden state does not depend on the last token: the network is causal."""
    if ids.shape[1] == 1:  # a block model whose blocks are single tokens, which is causal indeed
        return
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    first, second = (model.states(canvas, None, None, None, None)[0, 0] for canvas in (ids, other))
    if torch.equal(first, second):
        raise ValueError(
            f"{type(model.network).__name__} does not see the tokens to the right, even with is_causal = False: its "
            "configuration cannot make its attention bidirectional"
        )


def check_hides_later_blocks(model: MDLMBackboneForMaskedDiffusion, ids: torch.LongTensor):
    """Raises ValueError when the first token's hidden state depends on the second block: the network ignores our mask."""
    size = model.config.block_size
    if size >= model.config.max_position_embeddings:
        return
    canvas = ids[:, :1].repeat(1, size + 1)
    other = canvas.clone()
    other[0, -1] = ids[0, -1]
    first, second = (model.states(tokens, None, None, None, None)[0, 0] for tokens in (canvas, other))
    if not torch.equal(first, second):
        raise ValueError(
            f"{type(model.network).__name__} sees later blocks, though attention is 'block': it takes no mask of four dimensions"
        )


@torch.no_grad()
def shift_losses(model: MDLMBackboneForMaskedDiffusion, input_ids: torch.LongTensor) -> tuple[float, float]:
    """Mean cross-entropy of a text's masked tokens without a shift and with one, in nats per token.

    Every seventh token is masked. Both figures are of one forward: a network that was trained with the one is near
    log(vocabulary) with the other, or above.

    Args:
        input_ids: [B, L], L at least 7: text that a network of this kind should know.

    Raises:
        ValueError: when they are too short, or not ids of the vocabulary.
    """
    x_0 = torch.as_tensor(input_ids, device=model.device)
    masked = torch.zeros_like(x_0, dtype=torch.bool)
    masked[:, 6::7] = True
    masked &= x_0 != model.config.mask_token_id
    if not masked.any():
        raise ValueError(
            f"input_ids of the shape {tuple(x_0.shape)} hold no token to mask: give rows of 7 tokens or more"
        )
    was_training = model.training
    model.eval()
    try:
        states = model.states(x_0.masked_fill(masked, model.config.mask_token_id), None, None, None, None)
        losses = []
        for shift in (0, 1):
            rows = model.head_rows(states, model.sources(states, None, shift)[masked])
            nats = rows.map(lambda log_p, tokens: -log_p.gather(-1, tokens[:, None])[:, 0], x_0[masked])
            losses.append(nats.double().mean().item())
    finally:
        model.train(was_training)
    return losses[0], losses[1]


def warn_of_wrong_shift(model: MDLMBackboneForMaskedDiffusion, input_ids: torch.LongTensor):
    """Warns, in one line, when a text costs a network clearly less with the other `logits_shift`.

    At most 4 rows of 256 tokens are looked at; nothing is done under ZeRO-3, or with fewer than 7 tokens in a row.
    """
    input_ids, ours = torch.as_tensor(input_ids)[:4, :256], model.config.logits_shift
    if is_deepspeed_zero3_enabled() or input_ids.shape[1] < 7:
        return
    losses = shift_losses(model, input_ids)
    if losses[1 - ours] < 0.9 * losses[ours]:
        logger.warning(
            f"logits_shift is {ours}, but with {1 - ours} the masked tokens of this text cost {losses[1 - ours]:.2f} nats "
            f"instead of {losses[ours]:.2f}: the network was probably trained with logits_shift={1 - ours}"
        )


__all__ = ["as_masked_diffusion", "shift_losses"]
