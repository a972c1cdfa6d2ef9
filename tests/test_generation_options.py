"""`generate` with every sampler: rows and padding, guidance, processors, blocks, end of sequence, hooks, refusals."""

import itertools
import re

import pytest
import torch
from sampler_cases import CASES
from small_model import MASK, make_context_matter
from transformers import LogitsProcessor, LogitsProcessorList, TextDiffusionStreamer

from modeling_mcd import MDLMGenerationConfig
from modeling_mcd.replay import Replay


def arguments_of(case: str) -> dict:
    return {"sampler": case.split(",")[0], "return_dict_in_generate": True, "output_reveal_steps": True} | CASES[case]


def rows_of(output) -> list[tuple]:
    return [
        tuple(x.tolist() for x in row) for row in zip(output.sequences, output.nfe, output.reveal_steps, strict=True)
    ]


# --- Rows


class NoRepeat(LogitsProcessor):
    """Makes every token that stands on the canvas less likely."""

    def __call__(self, input_ids, scores):
        return scores - 2 * scores.new_zeros(scores.shape).scatter(1, input_ids, 1.0)


BLOCKS = {"block_length": 6}
ROWS = [(case, options) for case in CASES for options in ({}, BLOCKS)] + [
    (case, options)
    for case in ("ancestral", "adaptive", "remdm, confidence")
    for options in (
        {"guidance_scale": 2.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "suppress_tokens": [1, 2, 3]},
        {"logits_processor": LogitsProcessorList([NoRepeat()])},
        {"stop_at_eos": True, "eos_token_id": [5, 15, 25, 35], "pad_token_id": 0} | BLOCKS,
        {"guidance_scale": 2.0, "logits_processor": LogitsProcessorList([NoRepeat()])} | BLOCKS,
    )
]
ROWS += [("ancestral", {"precision": "legacy_float32"} | options) for options in ({}, BLOCKS, {"last_step": "greedy"})]


def assert_rows_do_not_feel_each_other(model, masks: int, arguments: dict):
    """Prompts of three lengths, each followed by so many masks, in one batch and one by one."""
    make_context_matter(model)
    prompts = [torch.randint(0, 46, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 5, 1)]
    ids, mask = torch.full((3, 12), 9), torch.zeros(3, 12, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 12 - len(prompt) :], mask[row, 12 - len(prompt) :] = prompt, 1
    seeds = [11, 12, 13]
    together = rows_of(model.generate(ids, attention_mask=mask, length=12 + masks, seed=seeds, **arguments))
    for row, prompt in enumerate(prompts):
        alone = rows_of(model.generate(prompt[None], length=masks + len(prompt), seed=seeds[row], **arguments))[0]
        sequence, nfe, steps = together[row]
        assert (sequence[12 - len(prompt) :], nfe, steps[12 - len(prompt) :]) == alone
        assert sequence[: 12 - len(prompt)] == [9] * (12 - len(prompt)) and min(alone[0]) >= 0
        assert MASK not in alone[0] or model.config.diffusion_kind == "uniform"


@pytest.mark.parametrize("case, options", ROWS)
def test_a_row_is_the_same_alone_and_beside_shorter_prompts(model, case, options):
    """The network runs in float32, and its logits differ in their last bits between batches.

    The context is 32: with blocks some rows reach beyond it, each in another block, and see its last part.
    """
    masks = 16 if options.get("block_length") is None else 26
    assert_rows_do_not_feel_each_other(model, masks, arguments_of(case) | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last_step": "greedy"},
        BLOCKS,
        {"top_k": 20, "logits_processor": LogitsProcessorList([NoRepeat()])} | BLOCKS,
        {"stop_at_eos": True, "eos_token_id": [5, 15, 25, 35], "pad_token_id": 0} | BLOCKS,
    ],
)
def test_a_row_of_a_uniform_model_does_not_feel_the_others(build, options):
    masks = 16 if options.get("block_length") is None else 26
    arguments = {"steps": 4, "return_dict_in_generate": True, "output_reveal_steps": True} | options
    assert_rows_do_not_feel_each_other(build(diffusion_kind="uniform"), masks, arguments)


@pytest.mark.parametrize("case", CASES)
def test_infills_in_blocks_do_not_feel_each_other(model, case):
    """Holes that begin in different places, and blocks in which only some rows have any."""
    make_context_matter(model)
    ids = torch.randint(0, 46, (3, 30), generator=torch.Generator().manual_seed(0))
    for row, holes in enumerate(([(2, 5), (24, 30)], [(9, 23)], [(2, 4), (8, 12)])):
        for start, stop in holes:
            ids[row, start:stop] = MASK
    arguments = arguments_of(case) | BLOCKS
    together = rows_of(model.generate(ids, seed=[11, 12, 13], **arguments))
    for row in range(3):
        assert together[row] == rows_of(model.generate(ids[row : row + 1], seed=11 + row, **arguments))[0]


def test_a_prompt_padded_on_the_right_or_in_the_middle_is_the_prompt(model):
    make_context_matter(model)
    arguments = {"num_return_sequences": 16, "seed": 3, "steps": 8}
    alone = model.generate(torch.tensor([[5, 6, 7]]), length=20, **arguments)
    ids, mask = torch.tensor([[5, 6, *[0] * 10, 7]]), torch.tensor([[1, 1, *[0] * 10, 1]])
    padded = model.generate(ids, attention_mask=mask, length=30, **arguments)
    assert torch.equal(padded[:, [0, 1, *range(12, 30)]], alone) and (padded[:, 2:12] == 0).all()


def test_a_seed_for_each_row(model):
    together = model.generate(num_return_sequences=3, seed=[5, 6, 5], steps=4)
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(model.generate(seed=6, steps=4)[0], together[1])


def test_one_seed_gives_related_texts_under_every_order_and_steps(model):
    """A network that ignores its canvas gives one text whatever the order; so the noise of a token is its own."""
    model.lm_head.weight.data.zero_()
    cases = [case for case in CASES if "greedy" not in case and case.split(",")[0] not in ("dream", "remdm", "psi")]
    texts = [model.generate(seed=4, **arguments_of(case)).sequences for case in cases]
    texts += [model.generate(seed=4, steps=n) for n in (1, 7, 64)]
    assert len(texts) > 10 and all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize("case", CASES)
def test_nfe_counts_the_rows_of_every_forward(model, case):
    rows = []
    model.model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.last_hidden_state)))
    output = model.generate(torch.arange(10).reshape(2, 5), num_return_sequences=2, seed=0, **arguments_of(case))
    assert output.nfe.sum() == sum(rows) and (output.nfe >= 1).all()
    steps = CASES[case].get("steps")
    assert (output.nfe <= (27 if steps is None else steps + ("greedy" in case))).all()
    assert case != "first_hitting" or (output.nfe == 27).all()


# --- Outputs and hooks


@pytest.mark.parametrize("case", CASES)
def test_reveal_steps_and_the_callback_tell_the_same_story(model, case):
    ids = torch.tensor([[1, MASK, MASK, 4] + [MASK] * 12])
    seen = []
    output = model.generate(
        ids, seed=0, callback=lambda step, canvas: seen.append((step, canvas.clone())), **arguments_of(case)
    )
    assert [step for step, _ in seen] == sorted({step for step, _ in seen})
    assert torch.equal(seen[-1][1], output.sequences) and (output.reveal_steps[ids != MASK] == -1).all()
    last_masked = torch.full_like(ids, -1)
    for step, canvas in seen:
        last_masked[canvas == MASK] = step
    steps = output.reveal_steps[ids == MASK]
    assert (steps > last_masked[ids == MASK]).all() and (steps >= 0).all()
    for (_, before), (step, after) in itertools.pairwise(seen):
        new = (before == MASK) & (after != MASK) & (last_masked < step)
        assert (output.reveal_steps[new] == step).all()


def test_a_progress_bar_on_request(model, capsys):
    model.generate(seed=0, steps=3)
    assert "step" not in capsys.readouterr().err
    model.generate(seed=0, steps=3, length=20, block_length=10, progress=True)
    printed = capsys.readouterr().err
    assert "from step 0: 3step" in printed and "from step 4: 3step" in printed


def test_a_replay_holds_every_canvas_and_opens_without_anything_else(model, tokenizer, tmp_path):
    replay = Replay(tokenizer, row=1)
    sequences = model.generate(num_return_sequences=2, steps=6, seed=0, length=12, callback=replay)
    page = replay.save(tmp_path / "replay.html").read_text(encoding="utf-8")
    assert (
        len(replay.canvases) == len(set(map(tuple, replay.canvases))) and replay.canvases[-1] == sequences[1].tolist()
    )
    assert "http" not in page and "<script src" not in page
    frames = re.search(r"const frames = (.*);", page).group(1)
    import json

    frames = json.loads(frames)
    assert [len(frame["tokens"]) for frame in frames] == [12] * len(replay.canvases)
    text = "".join(token if token is not None else "[MASK]" for token in frames[-1]["tokens"])
    assert text == tokenizer.decode(sequences[1])
    assert sum(token is None for token in frames[0]["tokens"]) == replay.canvases[0].count(MASK) > 0


def test_a_replay_escapes_what_a_model_writes(tmp_path):
    class Tokenizer:
        mask_token_id = 1

        def convert_ids_to_tokens(self, ids):
            return [self.decode(i) for i in ids]

        def decode(self, ids):
            return "</script><script>alert(1)</script>"

    replay = Replay(Tokenizer())
    replay(0, torch.tensor([[0, 1]]))
    page = replay.save(tmp_path / "replay.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1 and "<script>alert" not in page


# --- Draws


def test_top_k_top_p_and_suppressed_tokens_reach_every_sampler(model):
    with torch.no_grad():
        logits = model(torch.full((1, 32), MASK)).logits[0, :, :47]
    allowed = logits.topk(3, dim=-1).indices
    for case in ("ancestral", "random", "confidence"):
        sequence = model.generate(seed=0, sampler=case, steps=1, top_k=3, num_return_sequences=20)
        assert (sequence[:, :, None] == allowed).any(-1).all()
        assert len(sequence.unique(dim=0)) > 10
    nucleus = model.generate(seed=0, steps=1, top_p=1e-6)
    assert torch.equal(nucleus[0], logits.argmax(-1))
    kept = [3, 8, 20]
    suppressed = model.generate(seed=0, steps=4, suppress_tokens=[i for i in range(47) if i not in kept])
    assert set(suppressed.flatten().tolist()) == set(kept)


def test_logits_processors_see_the_canvas_of_each_position(model):
    seen = []

    class Ban(LogitsProcessor):
        """Bans what stands on the canvas already: no token comes twice in different steps."""

        def __call__(self, input_ids, scores):
            seen.append((input_ids.clone(), scores.shape))
            return scores.scatter(1, input_ids, -torch.inf)

    output = model.generate(
        torch.tensor([[4, 5, 6]]),
        length=20,
        sampler="first_hitting",
        seed=0,
        logits_processor=LogitsProcessorList([Ban()]),
    )
    assert len(set(output[0].tolist())) == 20
    assert all(ids.shape == (1, 20) and shape == (1, 48) for ids, shape in seen) and len(seen) == 17
    assert all((ids[0, :3] == torch.tensor([4, 5, 6])).all() for ids, _ in seen)


def test_float32_draws_are_near_float64_and_legacy_draws_are_not(model):
    double, single = (model.generate(seed=0, steps=8, precision=p) for p in ("float64", "float32"))
    assert (double == single).float().mean() > 0.95
    legacy = model.generate(
        seed=0, steps=8, precision="legacy_float32", num_return_sequences=2, return_dict_in_generate=True
    )
    assert (legacy.sequences != MASK).all() and (legacy.nfe <= 8).all()
    assert torch.equal(model.generate(seed=0, steps=8, precision="legacy_float32"), legacy.sequences[:1])


def test_every_block_of_the_legacy_draw_has_its_own_noise(model):
    """The network ignores its canvas, so that only the noise makes a difference."""
    model.lm_head.weight.data.zero_()
    arguments = {"steps": 8, "seed": 0, "precision": "legacy_float32"}
    first, second, third = model.generate(length=30, block_length=10, **arguments)[0].split(10)
    assert torch.equal(first, model.generate(length=10, **arguments)[0])
    assert all((a != b).sum() > 5 for a, b in itertools.combinations((first, second, third), 2))


# --- Guidance


def test_guidance_is_between_the_prompted_and_the_masked_prompt(model):
    make_context_matter(model)
    ids = torch.tensor([[5, 6, 7, MASK, MASK, MASK]])
    with torch.no_grad():
        conditional, without = model(ids).logits, model(torch.full((1, 6), MASK)).logits
    for scale in (0.0, 0.5, 1.0, 3.0):
        guided = without + scale * (conditional - without)
        output = model.generate(
            ids, steps=1, temperature=0, guidance_scale=scale, seed=0, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences[0, 3:], guided[0, 3:, :MASK].argmax(-1)) and output.nfe.item() == 2
    plain = model.generate(ids, steps=3, seed=1)
    assert torch.equal(model.generate(ids, steps=3, seed=1, guidance_scale=1.0), plain)
    assert not torch.equal(model.generate(ids, steps=3, seed=1, guidance_scale=8.0), plain)


def test_guidance_counts_both_forwards(model):
    rows = []
    model.model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.last_hidden_state)))
    output = model.generate(
        torch.tensor([[5, 6], [7, 8]]), steps=4, guidance_scale=2.0, seed=0, return_dict_in_generate=True
    )
    assert output.nfe.sum() == sum(rows) and (output.nfe % 2 == 0).all()


# --- Blocks


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_filled_from_left_to_right(model, case):
    prompt = torch.arange(5)[None]
    output = model.generate(prompt, length=29, block_length=8, seed=0, **arguments_of(case))
    steps = output.reveal_steps[0, 5:].split(8)
    assert (output.sequences != MASK).all() and torch.equal(output.sequences[:, :5], prompt)
    assert all(before.max() < after.min() for before, after in itertools.pairwise(steps))
    longer = model.generate(prompt, length=70, block_length=10, seed=0, **arguments_of(case))
    assert longer.sequences.shape == (1, 70) and (longer.sequences != MASK).all()


def test_a_block_sees_the_canvas_and_beyond_the_context_its_end(model):
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, inputs, kwargs: widths.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    sequence = model.generate(length=56, block_length=8, steps=1, seed=0)[0].tolist()
    assert [len(seen) for seen in widths] == [32] * 7
    for block, seen in enumerate(widths):
        right = max(32, 8 * (block + 1))
        assert seen == (sequence[: 8 * block] + [MASK] * 32)[right - 32 : right]


def test_one_block_is_the_canvas_and_a_row_is_cut_from_its_first_mask_on(model):
    ids = torch.randint(0, 47, (3, 20), generator=torch.Generator().manual_seed(0))
    holes = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    ids[holes] = MASK
    assert torch.equal(model.generate(ids, seed=0, steps=4, block_length=20), model.generate(ids, seed=0, steps=4))
    arguments = {"return_dict_in_generate": True, "output_reveal_steps": True}
    output = model.generate(ids, seed=0, steps=4, block_length=5, **arguments)
    assert torch.equal(output.sequences[~holes], ids[~holes]) and (output.sequences != MASK).all()
    first = holes.long().argmax(dim=1, keepdim=True)
    assert len(first.unique()) > 1, "the rows begin together"
    block = (torch.arange(20) - first) // 5
    assert (output.reveal_steps[holes] // (4 + 1) == block[holes]).all(), "a block has its own step numbers"


def test_uniform_models_go_beyond_the_context_too(build):
    uniform = build(diffusion_kind="uniform")
    output = uniform.generate(
        torch.arange(5)[None], length=70, block_length=16, steps=3, seed=0, return_dict_in_generate=True
    )
    assert output.sequences.shape == (1, 70) and output.sequences[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert output.nfe.tolist() == [5 * 4] and 0 <= output.sequences.min()


# --- End of sequence


def test_a_row_stops_at_its_end_of_sequence_and_costs_nothing_more(model):
    ids = torch.tensor([[1, 2] + [MASK] * 30] * 8)
    arguments = {
        "steps": 3,
        "seed": 0,
        "block_length": 6,
        "return_dict_in_generate": True,
        "output_reveal_steps": True,
    }
    plain = model.generate(ids, **arguments)
    eos = plain.sequences[0, 9].item()
    output = model.generate(ids, stop_at_eos=True, eos_token_id=eos, pad_token_id=0, **arguments)
    stopped = 0
    for row in range(8):
        before = plain.sequences[row].tolist()
        ends = [i for i in range(2, 32) if before[i] == eos]
        if not ends:
            assert output.sequences[row].tolist() == before and output.nfe[row] == plain.nfe[row]
            continue
        assert output.sequences[row].tolist() == before[: ends[0] + 1] + [0] * (31 - ends[0])
        assert (output.reveal_steps[row, ends[0] + 1 :] == -1).all()
        stopped += output.nfe[row].item() < plain.nfe[row].item()
    assert stopped, "no row stopped early"
    default = model.generate(ids, stop_at_eos=True, **arguments)
    assert default.sequences.shape == (8, 32)


def test_whoever_watches_sees_the_padding_behind_an_end_of_sequence(model):
    class Streamer:
        drafts = []

        def put_draft(self, value):
            self.drafts.append(value.clone())

        def put(self, value):
            pass

        def end(self):
            pass

    seen, ends = [], {"stop_at_eos": True, "eos_token_id": list(range(30)), "pad_token_id": 31}
    sequence = model.generate(
        steps=2,
        seed=0,
        block_length=16,
        callback=lambda step, canvas: seen.append((step, canvas.clone())),
        streamer=Streamer(),
        **ends,
    )
    assert (sequence[0, 16:] == 31).all()
    assert [step for step, _ in seen] == [0, 1, 1] and (seen[1][1] != MASK).sum() == 16
    assert torch.equal(seen[-1][1], sequence) and torch.equal(Streamer.drafts[-1], sequence)


# --- Refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"top_p": 0}, r"top_p must lie in \(0, 1\], not 0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], not 1.5"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, not 0"),
        ({"eta": 2}, r"eta must lie in \[0, 1\], not 2"),
        ({"sampler": "remdm", "remasking": "some"}, "remasking must be one of .*'cap'.* not 'some'"),
        ({"precision": "float16"}, "precision must be one of .*'float64'.* not 'float16'"),
        ({"guidance_scale": -1}, "guidance_scale must be at least 0 and finite, not -1"),
        ({"guidance_scale": 2.0}, r"guidance_scale \(2.0\) needs a prompt"),
        ({"stop_at_eos": "yes"}, "stop_at_eos must be True or False, not 'yes'"),
        ({"suppress_tokens": [48]}, "suppress_tokens hold 48, but the vocabulary is 0 .. 47"),
        ({"suppress_tokens": [True]}, r"suppress_tokens must be a list of token ids, not \[True\]"),
        ({"suppress_tokens": list(range(47))}, "suppress_tokens hold all 47 tokens, but must leave one to draw"),
        ({"suppress_tokens": list(range(48))}, "suppress_tokens hold all 48 tokens"),
        ({"logits_processor": NoRepeat()}, "logits_processor must be a LogitsProcessorList, not <.*NoRepeat"),
        ({"pad_token_id": 48}, r"pad_token_id is 48, but must be a token other than the mask \(47\) .* 0 .. 47"),
        ({"pad_token_id": MASK, "stop_at_eos": True}, "pad_token_id is 47, but must be a token other than the mask"),
        ({"eos_token_id": [5, 48], "stop_at_eos": True}, "eos_token_id is 48, but must be"),
        ({"eos_token_id": -1}, "eos_token_id is -1, but must be"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5, but must be"),
        (
            {"input_ids": torch.tensor([[1, MASK], [MASK, MASK]]), "guidance_scale": 2.0},
            r"guidance_scale \(2.0\) needs a prompt in every row",
        ),
        ({"suppress_tokens": "all"}, "suppress_tokens must be a list of token ids, not 'all'"),
        ({"eta": 0.1}, r"eta \(0.1\) is not used by the sampler 'ancestral', which takes \['steps', 'last_step', "),
        ({"sampler": "first_hitting", "steps": 4}, r"steps \(4\) is not used by the sampler 'first_hitting'"),
        ({"sampler": "random", "last_step": "greedy"}, r"last_step \('greedy'\) is not used by the sampler 'random'"),
        (
            {"sampler": "adaptive", "entropy_bound": 0.1},
            r"entropy_bound \(0.1\) is not used by the sampler 'adaptive'",
        ),
        (
            {"sampler": "adaptive", "min_tokens": 3, "max_tokens": 2},
            r"min_tokens \(3\) must not exceed max_tokens \(2\)",
        ),
        ({"sampler": "remdm", "remasking": "confidence", "eta": 0.1}, r"eta \(0.1\) is not used by remasking"),
        ({"sampler": "remdm", "t_on": 0.5}, r"t_on \(0.5\) is used by remasking='loop' alone"),
        ({"sampler": "remdm", "remasking": "loop", "t_on": 0.01}, r"t_off \(0.05\) must be below t_on \(0.01\)"),
        (
            {"sampler": "random", "precision": "legacy_float32"},
            r"sampler \('random'\) does not go with precision='leg",
        ),
        ({"precision": "legacy_float32", "top_k": 2}, r"top_k \(2\) does not go with precision='legacy_float32'"),
        ({"precision": "legacy_float32", "temperature": 0}, r"temperature \(0\) does not go with precision='legacy"),
        ({"length": 40}, "length is 40, but the model's context is 32 tokens; block_length goes beyond it"),
        ({"length": 40, "block_length": 33}, "block_length is 33, but the model's context is 32 tokens"),
        ({"seed": [1, 2]}, "seed holds 2 numbers, but there are 1 rows"),
        ({"output_reveal_steps": True}, "output_reveal_steps needs return_dict_in_generate=True"),
        (
            {"generation_config": MDLMGenerationConfig(kappa=0.5)},
            r"kappa \(0.5\) is not used by the sampler 'ancestral'",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_value(model, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.generate(**arguments)


def test_what_the_model_saved_for_one_sampler_does_not_forbid_another(model):
    model.generation_config.steps = 4
    assert (model.generate(sampler="first_hitting", seed=0) != MASK).all()


def test_stopping_needs_an_end_of_sequence(build):
    with pytest.raises(ValueError, match="stop_at_eos needs an eos_token_id"):
        build(bos_token_id=None, eos_token_id=None).generate(stop_at_eos=True)


@pytest.mark.parametrize("case", ["ancestral", "confidence"])
def test_a_nan_of_the_network_is_named_by_row_and_step(model, case):
    model.model.embed_tokens.weight.data[7] = torch.nan
    ids = torch.tensor([[1, MASK, MASK], [7, MASK, MASK]])
    with pytest.raises(ValueError, match="NaN or infinite logits for row 1 in step 0"):
        model.generate(ids, sampler=case, steps=1, seed=0)


def test_every_option_survives_a_round_trip(tmp_path):
    options = MDLMGenerationConfig(
        sampler="remdm",
        remasking="loop",
        eta=0.1,
        t_on=0.6,
        t_off=0.1,
        top_p=0.9,
        suppress_tokens=[1, 2],
        block_length=8,
    )
    options.save_pretrained(tmp_path)
    loaded = MDLMGenerationConfig.from_pretrained(tmp_path)
    for name in MDLMGenerationConfig._get_default_generation_params():
        assert getattr(loaded, name) == getattr(options, name), name


@pytest.mark.slow
def test_a_compiled_trunk_gives_the_same_tokens(model):
    eager = model.generate(seed=0, steps=4, num_return_sequences=3, return_dict_in_generate=True)
    compiled = model.generate(seed=0, steps=4, num_return_sequences=3, return_dict_in_generate=True, compile=True)
    assert torch.equal(eager.sequences, compiled.sequences)
    assert (compiled.nfe == 4).all(), "static shapes: every row takes part in every forward"


def test_the_streamer_prints_blocks(model, tokenizer, capsys):
    sequence = model.generate(steps=2, seed=0, length=20, block_length=10, streamer=TextDiffusionStreamer(tokenizer))
    printed = capsys.readouterr().out
    assert len(printed.split("\0337")) == 5 and printed.endswith(tokenizer.decode(sequence[0]) + "\n")
