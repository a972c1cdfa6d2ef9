"""`mcd-generate`: prompts, several texts, a terminal that shows drafts, a replay page, and one line for every mistake."""

import io
import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from evaluation.writing import FRAMES, LINES
from modeling_mcd import MDLMGenerationConfig
from modeling_mcd.generate_text import main
from modeling_mcd.loading import load_model, load_tokenizer
from modeling_mcd.replay import COLUMNS, HEIGHT, Replay, runs_of, svg_line
from modeling_mcd.terminal import DIM, GREEN, PLAIN, Drafts


@pytest.fixture
def folder(build, tokenizer, tmp_path):
    """A model and its tokenizer, which draws letters alone."""
    model = build(mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id)
    model.generation_config.steps = 3
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def written(capsys, *arguments: str) -> str:
    capsys.readouterr()
    main(list(arguments))
    return capsys.readouterr().out


def expected(model, tokenizer, prompt: str, **options) -> str:
    start = tokenizer.eos_token_id if model.config.bos_token_id is None else model.config.bos_token_id
    ids = torch.tensor([[start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    return tokenizer.batch_decode(model.generate(ids, **options), skip_special_tokens=True)


def test_a_prompt_is_continued_without_special_tokens(folder, model, tokenizer, capsys, monkeypatch):
    (text,) = expected(model, tokenizer, "hello ", steps=4, seed=1, length=20)
    options = ["--steps", "4", "--seed", "1", "--length", "20"]
    assert written(capsys, folder, "--prompt", "hello ", *options) == text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello "))
    assert written(capsys, folder, "--prompt", "-", *options) == text + "\n"
    assert text.startswith("hello ") and "[" not in text
    (text,) = expected(model, tokenizer, "hello ", steps=3, seed=1, max_new_tokens=4, temperature=0, sampler="random")
    options = ["--seed", "1", "--max_new_tokens", "4", "--temperature", "0", "--sampler", "random"]
    assert written(capsys, folder, "--prompt", "hello ", *options) == text + "\n", "the model's own number of steps"
    (text,) = expected(model, tokenizer, "hello ", seed=1, steps=4, locking="spread")
    assert written(capsys, folder, "--prompt", "hello ", *"--seed 1 --steps 4 --locking spread".split()) == text + "\n"


def test_masks_in_a_prompt_are_filled(folder, model, tokenizer, capsys):
    (text,) = expected(model, tokenizer, "h[MASK]llo [MASK]", steps=2, seed=1)
    assert written(capsys, folder, "--prompt", "h[MASK]llo [MASK]", "--steps", "2", "--seed", "1") == text + "\n"
    assert re.fullmatch("h.?llo .?", text)


def test_presets_and_guards_are_options(folder, tokenizer, capsys):
    """A preset with some of it changed, the guard of the end, the cap on steps, suppressed ids, a cache: as `generate`."""
    model, options = load_model(folder), "--max_new_tokens 16 --max_steps 2 --eos_after 0.5 --seed 1"
    end = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.bias[end] = 3.0
    model.save_pretrained(folder)
    settings = MDLMGenerationConfig.preset("cd4lm_adaptive", max_new_tokens=16, max_steps=2, eos_after=0.5)
    (text,) = expected(model, tokenizer, "hello ", seed=1, generation_config=settings)
    given = ["--preset", "cd4lm_adaptive", *options.split()]
    assert written(capsys, folder, "--prompt", "hello ", *given) == text + "\n"
    plain = {"seed": 1, "length": 24, "steps": 4, "suppress_above": 20, "block_length": 6, "cache": "dual"}
    (text,) = expected(model, tokenizer, "hello ", **plain, stop_at_eos=True)
    given = [word for name, value in plain.items() for word in (f"--{name}", str(value))]
    assert written(capsys, folder, "--prompt", "hello ", *given, "--stop_at_eos") == text + "\n"


def test_a_coupling_is_switched_on_and_off(folder, build, tokenizer, tmp_path, capsys):
    """On is the default of a model that has one, whatever its configuration's own is; without one, on is refused."""
    model = build(
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id, coupling={"states": 5, "levels": 1}
    )
    for parameter in model.coupling.parameters():
        parameter.data *= 8
    model.save_pretrained(tmp_path / "coupled")
    tokenizer.save_pretrained(tmp_path / "coupled")
    model.generation_config.coupling = False
    model.save_pretrained(tmp_path / "off")
    tokenizer.save_pretrained(tmp_path / "off")
    on, off = (expected(model, tokenizer, "hello ", steps=2, seed=1, coupling=c)[0] + "\n" for c in (True, False))
    assert on != off
    given = ["--prompt", "hello ", "--steps", "2", "--seed", "1"]
    for name, flag, text in (
        ("coupled", [], on),
        ("coupled", ["--no_coupling"], off),
        ("off", [], off),
        ("off", ["--coupling"], on),
    ):
        assert written(capsys, str(tmp_path / name), *given, *flag) == text, (name, flag)
    for arguments, message in (
        ([folder, "--coupling"], "coupling (True) needs a model that has one, and this has none"),
        ([folder, "--coupling", "--no_coupling"], "argument --no_coupling: not allowed with argument --coupling"),
        ([str(tmp_path / "off"), "--coupling", "--sampler", "margin"], "does not go with the sampler 'margin'"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_message_goes_through_the_chat_template(folder, tokenizer, capsys):
    """The answer alone is written; without a template, or a message, one line says so."""
    for arguments, message in (
        (["--chat", "--prompt", "hello"], "the tokenizer has no chat template"),
        (["--chat"], "--chat needs a --prompt"),
    ):
        with pytest.raises(SystemExit):
            main([folder, *arguments])
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
    template = "{% for message in messages %}q: {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([tokenizer("q: hello a: ", add_special_tokens=False)["input_ids"]])
    answer = load_model(folder).generate(ids, steps=4, seed=1, max_new_tokens=8)[0, ids.shape[1] :]
    out = written(capsys, folder, "--chat", "--prompt", "hello", *"--steps 4 --seed 1 --max_new_tokens 8".split())
    assert out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_several_texts_are_told_apart(folder, model, tokenizer, capsys):
    texts = tokenizer.batch_decode(model.generate(num_return_sequences=2, steps=3, seed=5), skip_special_tokens=True)
    out = written(capsys, folder, "--num_return_sequences", "2", "--seed", "5")
    assert out == f"--- 1 of 2\n{texts[0]}\n--- 2 of 2\n{texts[1]}\n"
    assert written(capsys, folder, "--num", "2", "--seed", "5") == out


def test_holes_of_a_text_are_filled_and_no_more(folder, model, tokenizer, capsys):
    (text,) = expected(model, tokenizer, "h[MASK]llo [MASK][MASK][MASK]!", steps=2, seed=1)
    assert written(capsys, folder, "--infill", "h[MASK]llo ___!", "--steps", "2", "--seed", "1") == text + "\n"
    assert re.fullmatch("h.?llo .{0,3}!", text)


def test_json_has_a_line_for_each_text_and_what_it_cost(folder, capsys):
    options = ["--infill", "h___o", "--steps", "2", "--num", "2", "--json"]
    rows = [json.loads(line) for line in written(capsys, folder, *options).splitlines()]
    assert [row["number"] for row in rows] == [1, 2] and {row["prompt"] for row in rows} == {"h[MASK][MASK][MASK]o"}
    assert all(row["nfe"] <= 2 and row["seconds"] > 0 and row["tokens"] == 6 for row in rows)
    again = written(capsys, folder, *options, "--seed", str(rows[0]["seed"])).splitlines()
    assert [json.loads(line)["text"] for line in again] == [row["text"] for row in rows], "the seed that was drawn"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_text_as_it_fills(folder, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    text = written(capsys, folder, "--seed", "0", "--prompt", "hello ")
    drafts = [
        draft for draft in re.split(r"\x1b\[\d+F\x1b\[J", terminal.getvalue()[-600:].split("it/s]")[-1]) if draft
    ]
    masks = [draft.count("\u2591") for draft in drafts]
    assert len(drafts) == 3 and masks == sorted(masks, reverse=True) and masks[0] > 0 == masks[-1]
    assert drafts[-1].strip() == text.strip() and drafts[0].strip().startswith("hello ")


def test_a_quiet_command_and_a_file_get_no_drafts(folder, capsys, monkeypatch):
    text = written(capsys, folder, "--seed", "0")
    for stream, options in ((io.StringIO(), []), (Terminal(), ["--quiet"])):
        monkeypatch.setattr("sys.stderr", stream)
        assert written(capsys, folder, "--seed", "0", *options) == text
        assert "\x1b[J" not in stream.getvalue()


def test_what_is_new_is_green_and_what_is_masked_is_dim(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4")
    out, mask = io.StringIO(), tokenizer.mask_token_id
    a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
    drafts = Drafts(tokenizer, mask, out, color=True)
    drafts.show(torch.tensor([a, mask, mask]))
    drafts.show(torch.tensor([a, b, mask]))
    first, second = out.getvalue().split("\x1b[1F\x1b[J")
    assert first == f"a{DIM}\u2591\u2591{PLAIN}\n" and second == f"a{GREEN}b{PLAIN}{DIM}\u2591{PLAIN}\n"
    drafts.show(torch.tensor([a, b, c, c, c, c]))
    assert out.getvalue().endswith("\x1b[1F\x1b[Jabcc\ncc\n"), "another canvas: nothing of it is new"


def test_a_terminal_shows_what_was_given_in_bold(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    main([folder, "--infill", "h___o", "--seed", "0", "--steps", "2"])
    shown = re.fullmatch(r"\x1b\[1mh\x1b\[0m(.{1,3})\x1b\[1mo\x1b\[0m\n", sys.stdout.getvalue())
    assert shown and "\x1b" not in shown[1]


def test_drafts_fit_the_terminal_and_leave_nothing_behind(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "4")
    out = io.StringIO()
    drafts = Drafts(tokenizer, tokenizer.mask_token_id, out)
    drafts.show(torch.tensor(tokenizer("a" * 10 + "b" * 10 + "c" * 10 + "d" * 10 + "e")["input_ids"]))
    assert out.getvalue() == "c" * 10 + "\n" + "d" * 10 + "\ne\n", "as many lines as there is room for, the last ones"
    drafts.show(torch.tensor(tokenizer("xy")["input_ids"] + [tokenizer.mask_token_id]))
    drafts.clear()
    drafts.clear()
    assert out.getvalue().endswith("e\n\x1b[3F\x1b[Jxy\u2591\n\x1b[1F\x1b[J")


def test_a_replay_is_written(folder, capsys, tmp_path):
    text = written(capsys, folder, "--replay", str(tmp_path / "page.html"), "--seed", "0", "--prompt", "hello ")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and page.count('"step"') == 3
    assert text.startswith("hello ")


def test_a_replay_is_a_picture_that_moves(folder, capsys, tmp_path):
    """Each canvas is visible in its turn; without animation, the end is. It is XML, whatever the text."""
    picture = tmp_path / "page.svg"
    text = written(capsys, folder, "--replay", str(picture), "--seed", "0", "--prompt", "hello ").rstrip("\n")
    space = "{http://www.w3.org/2000/svg}"
    frames = ElementTree.parse(picture).getroot().findall(f"{space}g")
    shown = ["".join("".join(line.itertext()) for line in frame.findall(f"{space}text")) for frame in frames]
    masks = [frame.count("\u2591") for frame in shown]
    assert len(frames) == 3 and masks[0] > masks[1] > masks[2] == 0 and shown[-1] == text
    assert [frame.get("visibility") for frame in frames] == ["hidden", "hidden", "visible"]
    turns = [frame.find(f"{space}animate").get("keyTimes").split(";") for frame in frames]
    assert [turn[2] for turn in turns[:-1]] == [turn[1] for turn in turns[1:]] and turns[-1][2] == "1.0000"
    first, second = map(svg_line, runs_of([0, 1, 2], [0, 3, 2], {0: "<a&", 1: "b\n\0", 2: None, 3: "x"}))
    assert first == '&lt;a&amp;<tspan class="new">b</tspan>'
    assert second == '<tspan class="new"> </tspan><tspan class="mask">\u2591</tspan>'


def test_a_replay_is_a_gif_with_a_frame_a_step_the_same_each_time(folder, capsys, tmp_path):
    """Masks give way to letters, and what is new in a step has a colour of its own."""
    for name in ("one.gif", "other.gif"):
        written(capsys, folder, "--replay", str(tmp_path / name), "--seed", "0", "--prompt", "hello ")
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "other.gif").read_bytes()
    colours, times = [], []
    with Image.open(tmp_path / "one.gif") as picture:
        assert picture.info["loop"] == 0
        for number in range(picture.n_frames):
            picture.seek(number)
            times.append(picture.info["duration"])
            colours.append({colour: count for count, colour in picture.convert("RGB").getcolors()})
    mask, new = (0xBB,) * 3, (0xC2, 0x41, 0x0C)
    assert len(colours) == 3 and times[0] == times[1] < times[2] / 4
    assert colours[0][mask] > colours[1][mask] > colours[2][mask], "what is left are edges of letters"
    assert new not in colours[0] and colours[1][new] > 0 and colours[2][new] > 0


def test_a_picture_for_a_card_is_cut_and_small(tokenizer, tmp_path):
    """The worst that can be written: 4096 tokens in 200 steps, all of them new in every step."""
    replay, letters = Replay(tokenizer), torch.randint(1, 26, (201, 4096), generator=torch.Generator().manual_seed(0))
    for step, canvas in enumerate(letters):
        replay(step, canvas[None])
    picture = replay.save(tmp_path / "picture.gif", lines=LINES, frames=FRAMES)
    with Image.open(picture) as image:
        assert image.n_frames == FRAMES and image.size[1] == (LINES + 1) * HEIGHT
    assert picture.stat().st_size < 200_000
    svg = replay.save(tmp_path / "picture.svg", lines=2, frames=3).read_text()
    final = ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}g")[-1]
    assert "".join(final.itertext()) == tokenizer.decode(letters[-1])[: 2 * COLUMNS]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stepz", "3"], "unknown argument '--stepz'; the nearest valid one is '--steps'"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "steps must be an integer of at least 1, not 0"),
        (["--length", "4", "--max_new_tokens", "3"], "give one length, not length (4) and max_new_tokens (3)"),
        (["--length", "33"], "length is 33, but the model's context is 32 tokens"),
        (["--sampler", "first_hitting", "--steps", "2"], "steps (2) is not used by the sampler 'first_hitting'"),
        (["--prompt", "x" * 40], "input_ids are 41 tokens wide, but length is 32"),
        (["--device", "nonsense"], "--device 'nonsense': "),
        (["--stream"], "--stream needs a terminal on standard error"),
        (["--infill", "a b__"], "the infill 'a b__' has no hole: write ___ or [MASK]"),
        (["--infill", "a ___", "--prompt", "a"], "--infill and --prompt do not go together"),
        (["--num", "0"], "num_return_sequences must be an integer of at least 1, not 0"),
        (["--replay", "no/such/folder/page.html"], "must name a file in a folder that is there"),
        (["--replay", "."], "must name a file in a folder that is there"),
        (["--tokenizer", "no/such/tokenizer"], "tokenizer 'no/such/tokenizer' is not a local file or folder"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, arguments, message):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([folder, *arguments])
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line and not line.startswith("Loading weights")]
    assert (
        stop.value.code in (1, 2)
        and printed.out == ""
        and line.startswith("mcd-generate: error: ")
        and message in line
    )


def test_a_model_that_cannot_be_used_is_one_line(folder, capsys, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    for source, message in ((str(file), "is a file, which holds no tokenizer"), (str(tmp_path), "cannot be loaded")):
        with pytest.raises(SystemExit):
            main([source])
        assert message in capsys.readouterr().err.splitlines()[-1]
