"""Texts for text-guided blocks: whose they are, that they reach the block, and that nobody else sees them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from sparsevlm.connectors.base import GuideText
from sparsevlm.data.collate import Collator
from sparsevlm.data.sample import Media, Message, Sample
from sparsevlm.model.build import build_model, load_model
from sparsevlm.model.guides import NO_MARKS, GuideEncoder, prompt_guides, sample_guides, serialised, turn_marks
from sparsevlm.vision.tokens import MediaKind
from tests import tiny
from tests.data.media_files import picture

QFORMER = {"type": "qformer", "queries": 3, "dim": 8, "layers": 2, "heads": 2, "ff_dim": 12, "instruction": True}
CONNECTOR = [QFORMER | {"vocab_size": 64, "max_text": 6}, {"type": "linear"}]
SMALL = {name: value for name, value in CONNECTOR[0].items() if name != "type"}
CONNECTORS = {"qformer": CONNECTOR, "context_token": [{"type": "context_token", "qformer": SMALL}]}
PLACEHOLDERS = ("<image>", "<video>")


def image(color: str = "red") -> Media:
    """A picture whose patches differ, so that it matters which of them a question looks at."""
    return Media(MediaKind.IMAGE, picture(len(color), (40, 30)))


def talk(*turns: tuple[str | Media, ...]) -> Sample:
    """Turns of the user and the assistant by turns."""
    roles = ("user", "assistant")
    return Sample(tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns)))


TALKS = [
    talk((image(), "what color is this ?"), ("red",), ("and ", image("blue"), " this picture ?"), ("blue",)),
    talk(("how many cat ?",), ("two",), (image("green"), "\nis it a dog"), ("no",)),
    talk((image("yellow"),), ("a small circle",)),
]


@pytest.fixture(params=CONNECTORS)
def guided(request: Any, tiny_parts: dict[str, str]) -> Any:
    torch.manual_seed(0)
    model, processor = build_model(tiny.recipe_model(tiny_parts, connector=CONNECTORS[request.param]))
    for part in (model.model.connector, model.model.vision_tower):  # begun small, the text would hardly be seen
        for parameter in part.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), processor


def test_a_medium_gets_its_own_turn() -> None:
    assert [sample_guides(sample, PLACEHOLDERS) for sample in TALKS] == [
        ["what color is this ?", "and this picture ?"],
        ["is it a dog"],
        [""],
    ]


def test_a_medium_of_an_answer_gets_the_question_not_the_answer() -> None:
    assert sample_guides(talk(("what moves ?",), (image(), "a cat")), PLACEHOLDERS) == ["what moves ?"]


def test_placeholders_and_line_breaks_in_the_text_are_left_out() -> None:
    sample = Sample((Message("user", ("<image>\n", image(), "what\n\ncolor")),))
    assert sample_guides(sample, PLACEHOLDERS) == ["what color"]


@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("template", ["chatml", "vicuna_v1", "plain"])
def test_rendered_prompts_give_the_guides_of_their_conversations(tiny_parts: Any, template: str, system: bool) -> None:
    model = tiny.recipe_model(tiny_parts, connector=CONNECTOR, language={"chat_template": template})
    _, processor = build_model(model)
    marks = turn_marks(lambda turns: processor._render(turns, False)[0])
    # `plain` marks no end of a user's turn: a prompt's first of two questions would reach into its answer.
    for sample in TALKS[template == "plain" :]:
        messages = (Message("system", ("describe there .",)),) * system + sample.messages
        question = Sample(messages[:-1])
        rows = [
            {
                "role": m.role,
                "content": [
                    {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in m.content
                ],
            }
            for m in question.messages
        ]
        prompt = processor.apply_chat_template(rows, add_generation_prompt=True)
        assert prompt_guides(prompt, marks, PLACEHOLDERS) == sample_guides(question, PLACEHOLDERS)


def test_a_prompt_without_turns_is_one() -> None:
    assert prompt_guides("<image> a <video> b", NO_MARKS, PLACEHOLDERS) == ["a b", "a b"]


def test_the_interfaces_of_the_processor_agree(guided: Any) -> None:
    _, processor = guided
    questions = [Sample(sample.messages[:-1]) for sample in TALKS]
    expected = processor.encode_prompts(questions)
    assert expected["media_guides"].tolist() == [0, 1, 2, 3]
    assert expected["guide_mask"].sum(1).tolist() == [5, 4, 4, 0]
    turns = [
        [
            {
                "role": m.role,
                "content": [
                    {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p.source}
                    for p in m.content
                ],
            }
            for m in question.messages
        ]
        for question in questions
    ]
    options = {"add_generation_prompt": True, "padding_side": "left"}
    whole = processor.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    pictures = [media.source for question in questions for media in question.media()]
    apart = processor(images=pictures, text=prompts, padding_side="left")
    for key, value in expected.items():
        assert torch.equal(whole[key], value) and torch.equal(apart[key], value), key


def test_a_long_text_keeps_its_end(guided: Any) -> None:
    _, processor = guided
    long = processor.encode(talk((image(), "a b a b what color is the cat"), ("red",)))
    assert processor.tokenizer.decode(long.guides[0]).replace(" ", "").endswith("thecat")
    assert len(long.guides[0]) == 6


def batch_of(processor: Any, samples: list[Sample], packed: bool) -> dict[str, Any]:
    encoded = [processor.encode(sample) for sample in samples]
    batch = Collator(0, packed=packed)([encoded])
    return {key: value for key, value in batch.items() if key not in ("sample_ids", "rows")}


def logits_of(model: Any, batch: dict[str, Any], packed: bool) -> list[torch.Tensor]:
    """Logits of each sample."""
    with torch.no_grad():
        logits = model(**batch).logits
    if packed:
        bounds = batch["cu_seq_lens_q"].tolist()
        return [logits[0, a:b] for a, b in pairwise(bounds)]
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"])]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_another_question_changes_its_own_sample_only(guided: Any, packed: bool) -> None:
    model, processor = guided
    first = batch_of(processor, TALKS, packed)
    changed = {**first, "guide_ids": first["guide_ids"].clone()}
    changed["guide_ids"][2] = changed["guide_ids"][2].flip(0)  # of the second sample; the prompt itself stays
    before, after = (logits_of(model, batch, packed) for batch in (first, changed))
    differences = [float((a - b).abs().max()) for a, b in zip(before, after)]
    assert differences[1] > 1e-3
    assert differences[0] < 1e-5 and differences[2] < 1e-5  # measured: 0

    longer = [TALKS[0], talk(*[m.content for m in TALKS[1].messages[:-2]], (image("green"), "no no no no"), ("no",))]
    alone, beside = (logits_of(model, batch_of(processor, s, packed), packed)[0] for s in (TALKS[:1], longer))
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)  # sums in another order: measured 1e-6


def test_each_turn_of_a_sample_guides_its_own_picture(guided: Any) -> None:
    model, processor = guided
    batch = batch_of(processor, TALKS[:1], True)
    changed = {**batch, "guide_ids": batch["guide_ids"].clone()}
    changed["guide_ids"][1, :2] = changed["guide_ids"][1, :2].flip(0)
    with torch.no_grad():
        before, after = (model(**each).image_hidden_states.chunk(2) for each in (batch, changed))
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_beams_give_what_single_rows_give(guided: Any) -> None:
    model, processor = guided
    questions = [Sample(sample.messages[:-1]) for sample in TALKS]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    together = model.generate(**processor.encode_prompts(questions), **options)
    for question, row in zip(questions, together):
        batch = processor.encode_prompts([question])
        assert model.generate(**batch, **options)[0, -4:].tolist() == row[-4:].tolist()


def test_text_only_batches_train_all_of_the_connector(guided: Any) -> None:
    model, processor = guided
    model.train()
    batch = batch_of(processor, [talk(("how many ?",), ("two",))], True)
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.connector.parameters())


def test_saved_and_loaded(guided: Any, tmp_path: Any) -> None:
    model, processor = guided
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, read = load_model(tmp_path)
    batch = batch_of(processor, TALKS, True)
    assert all(
        torch.equal(value, other)
        for value, other in zip(batch.values(), batch_of(read, TALKS, True).values())
        if torch.is_tensor(value)
    )
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def save_other(directory: Any) -> str:
    """A tokenizer that puts a word before and behind a text, as BERT's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "color", "dog", "a", "it", "is"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(directory)
    return str(directory)


def test_another_tokenizer_is_saved_with_the_processor(tiny_parts: Any, tmp_path: Any) -> None:
    other = tmp_path / "other"
    block = QFORMER | {"vocab_size": 10, "max_text": 5, "tokenizer": save_other(other)}
    _, processor = build_model(tiny.recipe_model(tiny_parts, connector=[block, {"type": "linear"}]))
    assert processor.encode(TALKS[1]).guides == ((2, 8, 7, 6, 3),)  # left cut, between its marks
    processor.save_pretrained(tmp_path / "saved")
    for file in other.iterdir():
        file.unlink()
    read = type(processor).from_pretrained(tmp_path / "saved")
    assert read.encode(TALKS[1]).guides == ((2, 8, 7, 6, 3),)


def test_refusals(tmp_path: Any) -> None:
    tokenizer = tiny.make_tokenizer()
    with pytest.raises(ValueError, match="knows 10 words but its tokenizer 'language' has"):
        GuideEncoder(GuideText("language", 8, 10), tokenizer, {})
    with pytest.raises(ValueError, match="no tokenizer"):
        serialised(str(tmp_path))
