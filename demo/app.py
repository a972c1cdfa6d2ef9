"""Two masked diffusion models write one text from one seed, side by side: a page, and a Space as it stands.

python demo/app.py [NAME=MODEL ...] [--judge MODEL] [--port 7860]

A model is a folder or a Hub name. By default those that ship, and the student of `make distill` where there is one.
"""

import argparse
import os
import sys
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "modeling_mcd").is_dir() else HERE.parent  # a Space has the packages beside this file
sys.path[:0] = [str(HERE), str(ROOT)]

import gradio as gr  # noqa: E402

from modeling_mcd.command_line import one_line_errors  # noqa: E402
from modeling_mcd.locking_mdlm import LOCKINGS  # noqa: E402
from studio import (  # noqa: E402
    CSS,
    LIMITS,
    LONGEST_PROMPT,
    STEPPED,
    Judge,
    Settings,
    Writer,
    compare,
    load_judge_of,
    load_writer,
    takes_locking,
    trouble,
)


TINY = ROOT / "recipes" / "tiny"
SHIPPED = {  # the page begins with the first and the last
    "sub-words": ROOT / "recipes" / "bible" / "teacher",
    "teacher": TINY / "teacher",
    "coupled": TINY / "coupled",
    "student": ROOT / "runs" / "tiny" / "round-3",
}
INTRODUCTION = """# Text from noise
Both models start from the same masks and the same random numbers, and reveal tokens step by step. A colour is the step that
wrote a token. Write a prompt to continue, or leave holes: `the [MASK][MASK][MASK] was ____`, where an underscore of three or
more stands for a token. The judge's figure is that of one text: no more than an impression."""


def build(writers: list[Writer], judge: Judge | None) -> gr.Blocks:
    """The page. Its one public endpoint is `/write`."""
    named = {writer.name: writer for writer in writers}

    def run(left, right, prompt, steps, sampler, locking, temperature, length, seed):
        nothing = [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        try:
            if not {left, right} <= named.keys():
                raise ValueError(f"a model must be one of {', '.join(named)}")
            settings = Settings(prompt, steps, sampler, locking, temperature, length, seed)
            for writings in compare([named[left], named[right]], settings, judge):
                last = max(len(writing.frames) for writing in writings) - 1
                shown = [part for writing in writings for part in (writing.html(), writing.facts())]
                yield [*shown, gr.Slider(maximum=max(last, 1), value=last, interactive=True), writings, ""]
        except Exception as error:
            if not isinstance(error, ValueError):
                print(f"demo: {type(error).__name__}: {error}", file=sys.stderr)
            yield [*nothing, gr.skip(), gr.skip(), trouble(error)]

    def show(writings, number):
        return [writing.html(number) for writing in writings or []] or [gr.skip(), gr.skip()]

    uniform = any(
        writer.model.config.diffusion_kind == "uniform" for writer in writers
    )  # has independent locking alone
    usual = LOCKINGS[0] if uniform else "spread"

    def locking_of(sampler):
        locked = takes_locking(sampler)
        return gr.Dropdown(value=usual if locked else LOCKINGS[0], interactive=locked)

    with gr.Blocks(title="Text from noise", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        history = gr.State([])
        with gr.Row():
            prompt = gr.Textbox(
                "it was a ", label="Prompt or text with holes", lines=2, max_length=LONGEST_PROMPT, scale=3
            )
            button = gr.Button("Write", variant="primary", scale=1)
        with gr.Row():
            steps = gr.Slider(*LIMITS["steps"], value=16, step=1, label="Steps")
            temperature = gr.Slider(*LIMITS["temperature"], value=0.8, step=0.05, label="Temperature")
            length = gr.Slider(*LIMITS["length"], value=128, step=1, label="Length in tokens")
        with gr.Row():
            sampler = gr.Dropdown(list(STEPPED), value=STEPPED[0], label="Sampler")
            locking = gr.Dropdown(list(LOCKINGS), value=usual, label="Locking")
            seed = gr.Number(0, precision=0, minimum=0, maximum=LIMITS["seed"][1], label="Seed")
        problem = gr.HTML()
        slider = gr.Slider(0, 1, value=0, step=1, label="History: after this step", interactive=False)
        names, canvases, facts = [], [], []
        with gr.Row():
            for name in (writers[0].name, writers[-1].name):
                with gr.Column():
                    names.append(gr.Dropdown(list(named), value=name, label="Model"))
                    canvases.append(gr.HTML('<div class="canvas"></div>'))
                    facts.append(gr.HTML())
        outputs = [canvases[0], facts[0], canvases[1], facts[1], slider, history, problem]
        inputs = [*names, prompt, steps, sampler, locking, temperature, length, seed]
        gr.on(
            [button.click, prompt.submit],
            run,
            inputs,
            outputs,
            api_name="write",
            show_progress="hidden",
            concurrency_limit=1,
            trigger_mode="once",
        )
        sampler.input(locking_of, sampler, locking, show_progress="hidden", api_visibility="private")
        slider.input(
            show,
            [history, slider],
            canvases,
            show_progress="hidden",
            api_visibility="private",
            trigger_mode="always_last",
        )
    return page.queue(max_size=16)


def serve(page: gr.Blocks, port: int | None = None, wait: bool = True, host: str | None = None):
    """Serves the page. No file of this machine is to be had: no path is allowed, and nothing is uploaded."""
    font = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing from elsewhere
    return page.launch(
        server_name=host,
        server_port=port,
        css=CSS,
        theme=gr.themes.Default(**font),
        prevent_thread_lock=not wait,
        allowed_paths=[],
        blocked_paths=[str(ROOT)],
        max_file_size=1,
        show_error=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=not wait,
    )


@one_line_errors
def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", help="One or more; the shipped ones by default.")
    parser.add_argument("--judge", default=str(TINY / "judge"), help="A causal language model; none: no figure.")
    parser.add_argument("--port", type=int, help="The first free one from 7860 on by default.")
    options = parser.parse_args(arguments)
    pairs = [model.split("=", 1) for model in options.models]
    if any(len(pair) < 2 or not all(pair) for pair in pairs):
        raise ValueError(f"models are given as NAME=MODEL, not {' '.join(options.models)}")
    pairs = pairs or [(name, str(folder)) for name, folder in SHIPPED.items() if folder.is_dir()]
    judge = None if options.judge == "none" else load_judge_of(options.judge)
    serve(build([load_writer(*pair) for pair in pairs], judge), options.port)


if __name__ == "__main__":
    main()
