"""The shipped chat templates write what the systems' own code writes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sparsevlm.model.build import TEMPLATES

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n[vqa] what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]
VIDEO: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}]


def render(name: str, talk: list[dict[str, Any]], **options: Any) -> tuple[str, list[str]]:
    """The text, and what of it is trained on."""
    texts, spans = render_jinja_template(
        conversations=[talk],
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(),
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )
    return texts[0], [texts[0][int(a) : int(b)] for a, b in spans[0]]


def test_minigpt_v2() -> None:
    text, targets = render("minigpt", TALK)
    assert text == "<s>[INST] <Img><image></Img> [vqa] what? [/INST] a cat</s><s>[INST] sure? [/INST] yes</s>"
    assert targets == ["a cat</s>", "yes</s>"]
    assert render("minigpt", VIDEO, add_generation_prompt=True)[0] == "<s>[INST] <video>\nwhat? [/INST]"


def test_otter() -> None:
    text, targets = render("otter", TALK)
    assert text == "<s><image>User:[vqa] what? GPT:<answer>a cat</s>User:sure? GPT:<answer>yes</s>"
    assert targets == ["a cat</s>", "yes</s>"]
    assert render("otter", VIDEO, add_generation_prompt=True)[0] == "<s><video>User:what? GPT:<answer>"


def test_yi_vl() -> None:
    text, targets = render("yi_vl", TALK)
    system, talk = text.split("\n\n")
    assert system.startswith("This is a chat between an inquisitive human") and system.endswith("礼貌的回答。")
    # LLaVA's single style with "###"; the ends of text among it are what generation stops at
    spoken = "### Human: <image>\n[vqa] what?\n### Assistant: a cat\n### Human: sure?\n### Assistant: yes\n###"
    assert talk.replace("</s>", "") == spoken
    assert targets == ["a cat\n###</s>", "yes\n###</s>"]
    assert render("yi_vl", TALK[:1], add_generation_prompt=True)[0].endswith("[vqa] what?\n### Assistant:")


def test_qwen_vl() -> None:
    text, targets = render("qwen_vl", TALK)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img><image></img>\n[vqa] what?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert targets == ["a cat<|im_end|>", "yes<|im_end|>"]
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]}]
    pictures = "Picture 1: <img><image></img>\nPicture 2: <img><image></img>\nsame?<|im_end|>\n"
    assert render("qwen_vl", two, add_generation_prompt=True)[0].endswith(pictures + "<|im_start|>assistant\n")


def test_internlm_xcomposer() -> None:
    text, targets = render("internlm_xcomposer", TALK)
    assert text == (
        "<s> <|User|>:<image>[vqa] what? \n<TOKENS_UNUSED_0> <|Bot|>:a cat<TOKENS_UNUSED_1> </s>"
        " <|User|>:sure? \n<TOKENS_UNUSED_0> <|Bot|>:yes<TOKENS_UNUSED_1> </s>"
    )
    assert targets == ["a cat<TOKENS_UNUSED_1> </s>", "yes<TOKENS_UNUSED_1> </s>"]


def test_cogvlm() -> None:
    text, targets = render("cogvlm", TALK)
    assert text == "<s><image> [INST] [vqa] what? [/INST] a cat</s> [INST] sure? [/INST] yes</s>"
    assert targets == ["a cat</s>", "yes</s>"]
    caption = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a cat"}]
    assert render("cogvlm", caption)[0] == "<s><image> a cat</s>"


@pytest.mark.parametrize("name", sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
def test_a_prompt_is_the_beginning_of_what_was_trained_on(name: str) -> None:
    whole, _ = render(name, TALK[:2])
    prompt, _ = render(name, TALK[:1], add_generation_prompt=True)
    assert whole.startswith(prompt) and "a cat" in whole[len(prompt) :]
