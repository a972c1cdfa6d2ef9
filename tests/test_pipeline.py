"""`pipeline("text-diffusion")`, the streamers of transformers, and weights of fewer bits."""

import threading

import pytest
import torch
from chat import chat_tokenizer
from tiny_run import ROOT
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    QuantoConfig,
    TextIteratorStreamer,
    TextStreamer,
    TorchAoConfig,
    pipeline,
)

from modeling_mcd import TextDiffusionPipeline
from modeling_mcd.prompts import with_masks


@pytest.fixture
def write(build):
    tokenizer = chat_tokenizer(64)
    model = build(vocab_size=51, mask_token_id=tokenizer.mask_token_id, max_position_embeddings=64)
    return TextDiffusionPipeline(model=model, tokenizer=tokenizer, task="text-diffusion", steps=3, seed=0)


def test_a_folder_is_enough(write, tmp_path):
    write.model.save_pretrained(tmp_path)
    write.tokenizer.save_pretrained(tmp_path)
    loaded = pipeline("text-diffusion", model=str(tmp_path), dtype="float32", steps=3)
    assert isinstance(loaded, TextDiffusionPipeline)
    assert loaded("hello ", seed=0) == write("hello ")


def test_it_writes_what_generate_writes(write):
    model, tokenizer = write.model, write.tokenizer
    ids = torch.tensor([[46, *tokenizer("hello ", add_special_tokens=False)["input_ids"]]])
    output = model.generate(ids, steps=3, seed=0, num_return_sequences=2, length=20, return_dict_in_generate=True)
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    found = write("hello ", num_return_sequences=2, length=20)
    assert found == [{"generated_text": t, "nfe": n} for t, n in zip(texts, output.nfe.tolist(), strict=True)]
    (short,) = write("hello ", length=20, return_full_text=False)
    assert "hello " + short["generated_text"] == write("hello ", length=20)[0]["generated_text"]
    lone, both = write("", length=8), write(["", "hello "], length=8)
    assert both == [lone, write("hello ", length=8)] and len(lone[0]["generated_text"]) <= 8
    assert write("hello ", steps=1, length=20) != write("hello ", length=20), "the call's options win"


def test_holes_are_filled(write):
    (found,) = write(with_masks("h___o [MASK]", write.tokenizer), return_full_text=False)
    text = found["generated_text"]
    assert text[0] == "h" and "o " in text and "[MASK]" not in text


def test_messages_are_answered(write):
    text = "<|start|>user<|say|>hi<|end|><|start|>assistant<|say|>"
    messages = [{"role": "user", "content": "hi"}]
    (found,) = write(messages, max_new_tokens=6)
    ids = torch.tensor([write.tokenizer(text, add_special_tokens=False)["input_ids"]])
    row = write.model.generate(ids, steps=3, seed=0, max_new_tokens=6)[0, ids.shape[1] :]
    assert write.tokenizer.decode(row).startswith(found["generated_text"])
    assert write([messages, messages], max_new_tokens=6) == [[found], [found]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda write: write("a", batch_size=2), "batch_size is 2, but texts are written one after the other"),
        (lambda write: write(3), "a prompt must be a text or a list of messages, not int"),
        (lambda write: write("a", stepz=3), r"unknown arguments \['stepz'\]"),
        (
            lambda write: write("a", max_length=9, max_new_tokens=3),
            r"give one length, not max_length \(9\) and max_new_tokens \(3\)",
        ),
    ],
)
def test_what_is_wrong_is_named(write, call, message):
    with pytest.raises(ValueError, match=message):
        call(write)


def test_streamers_of_transformers_get_the_text(write, capsys):
    options = {"length": 20, "seed": 0}
    (text,) = write("hello ", **options)
    write("hello ", streamer=TextStreamer(write.tokenizer, skip_special_tokens=True), **options)
    assert capsys.readouterr().out.strip() == text["generated_text"].strip()
    streamer = TextIteratorStreamer(write.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=write, args=("hello ",), kwargs=options | {"streamer": streamer})
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "hello " + "".join(parts) == text["generated_text"]


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTISED = {
    "torchao": torchao_config,
    "optimum.quanto": lambda: QuantoConfig(weights="int8"),
    "bitsandbytes": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}


@pytest.mark.parametrize("package", QUANTISED)
def test_weights_of_fewer_bits_still_add(package):
    pytest.importorskip(package)
    folder = ROOT / "recipes" / "tiny_sums" / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=QUANTISED[package]())
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    assert not all(type(x) is torch.nn.Linear and type(x.weight) is torch.nn.Parameter for x in layers)
    write = TextDiffusionPipeline(model=model, tokenizer=tokenizer, sampler="confidence", temperature=0.0)
    assert write("271828+314159=", steps=8)[0]["generated_text"] == "271828+314159=0585987"
