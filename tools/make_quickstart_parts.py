"""Make the two tiny parts of the quickstart: a vision tower that knows shapes and a language model that knows words.

    python tools/make_quickstart_parts.py sparsevlm/assets/quickstart

Both are taught on the training split of the scenes, apart from each other, so that joining them is left to the recipe:
the tower sees pictures and never a word, the language model reads words and never a picture.

* `vision`: a SigLIP tower (64 px, patch 8, width 96, 3 layers). It learns to name, from the mean of its tokens, what
  there is (colour, shape, size, place, number) and, from each token, what covers that patch. The heads are dropped.
* `language`: a Llama (width 128, 4 layers) with a word-level tokenizer. It learns to answer the questions of the scenes
  about descriptions: a sentence, or notes on every frame in order; then to compare (yes or no, which of several).

Weights are kept in bfloat16. One core needs about twenty minutes. Left to the recipe is `binding` (one of several
things), which neither the texts here nor the quickstart's steps teach a model of this size.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevlm.data.scene_drawing import COLOURS, IMAGE_SIZE, SHAPES, SIZES, ZONES, Scene, Thing, draw_frame
from sparsevlm.data.scenes import KINDS, QUESTION_KINDS, Turn, caption, scene_turns, vocabulary

PATCH = 8
GRID = IMAGE_SIZE // PATCH
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
CHAT_TOKENS = ["<user>", "<assistant>", "<image>", "<video>"]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<assistant>' if message['role'] == 'assistant' else '<user>' -}}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{%- for part in parts -%}{{- part['text'] -}}{%- endfor -%}{{- '<eos>' -}}{%- endgeneration -%}
{%- else -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}{{- image_token | default('<image>') -}}
{%- elif part['type'] == 'video' -%}{{- video_token | default('<video>') -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""  # noqa: E501
TEXT_KINDS = [kind for kind in KINDS if kind != "text"]
NOTHING = -100


def train(
    name: str, modules: nn.Module, steps: int, lr: float, loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]]
) -> None:
    """AdamW, 5 % warmup, cosine to zero."""
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * t / steps)))
    )
    start = time.perf_counter()
    for step in range(steps):
        loss, scores = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            told = "  ".join(f"{key} {value:.3f}" for key, value in scores.items())
            print(f"{name} {step:5d}  {time.perf_counter() - start:5.0f} s  loss {loss.item():.4f}  {told}", flush=True)


# ---- vision ---------------------------------------------------------------------------------------------------------


def frame_targets(scene: Scene, things: tuple[Thing, ...]) -> tuple[dict[str, int], np.ndarray]:
    """Return what a frame shows as class numbers, and for each patch which colour and shape covers it.

    Attributes that differ between the things of a frame, or that the scene has no word for, are not asked.
    """
    look = things[0].look
    alone, alike = len(things) == 1, scene.setting != "several"
    zone = things[0].zone if alone and scene.setting != "group" else ""
    whole = {
        "colour": list(COLOURS).index(look.colour) if alike else NOTHING,
        "shape": list(SHAPES).index(look.shape) if alike else NOTHING,
        "size": list(SIZES).index(look.size) if alike else NOTHING,
        "place": list(ZONES).index(zone) if zone else NOTHING,
        "number": len(things) - 1,
    }
    patches = np.full((2, GRID, GRID), 0)  # 0: ground
    centres = (np.arange(GRID) + 0.5) * PATCH
    for thing in things:
        near = np.hypot(centres[None] - thing.x, centres[:, None] - thing.y) < thing.look.radius + PATCH / 2
        patches[0][near] = 1 + list(COLOURS).index(thing.look.colour)
        patches[1][near] = 1 + list(SHAPES).index(thing.look.shape)
    return whole, patches.reshape(2, -1)


def make_vision(out: Path, steps: int, batch_size: int, seed: int) -> None:
    """Teach a SigLIP tower what single frames show."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    tower = SiglipVisionModel(config)
    sizes = {"colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES), "place": len(ZONES), "number": 5}
    heads = nn.ModuleDict({name: nn.Linear(96, size) for name, size in sizes.items()})
    local = nn.ModuleList([nn.Linear(96, 1 + len(COLOURS)), nn.Linear(96, 1 + len(SHAPES))])

    def frames(split: str, start: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        pixels, wholes, patches = [], [], []
        for index in range(start, start + batch_size):
            scene, _ = scene_turns(split, index, seed, [*QUESTION_KINDS, "count", "binding", "binding"])
            which = index % len(scene.frames)
            pixels.append(draw_frame(scene.frames[which], scene.ground))
            whole, covered = frame_targets(scene, scene.frames[which])
            wholes.append(whole)
            patches.append(covered)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return (
            images,
            {name: torch.tensor([whole[name] for whole in wholes]) for name in sizes},
            torch.from_numpy(np.stack(patches)),
        )

    def losses(split: str, start: int) -> tuple[Tensor, dict[str, float]]:
        images, whole, patches = frames(split, start)
        features = tower(images).last_hidden_state  # (B, 64, 96)
        mean = features.mean(1)
        loss, scores = torch.zeros(()), {}
        for name, head in heads.items():
            logits = head(mean)
            loss = loss + F.cross_entropy(logits, whole[name], ignore_index=NOTHING)
            asked = whole[name] != NOTHING
            scores[name] = (logits.argmax(-1) == whole[name])[asked].float().mean().item()
        for i, head in enumerate(local):
            logits = head(features)  # (B, 64, classes)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), patches[:, i].flatten())
            covered = patches[:, i] > 0
            scores[("patch colour", "patch shape")[i]] = (
                (logits.argmax(-1) == patches[:, i])[covered].float().mean().item()
            )
        return loss, scores

    everything = nn.ModuleList([tower, heads, local])
    train("vision", everything, steps, 2e-3, lambda step: losses("train", step * batch_size))
    tower.eval()
    with torch.no_grad():
        print("vision, held out:", {name: round(score, 3) for name, score in losses("validation", 0)[1].items()})
    tower.to(torch.bfloat16).save_pretrained(out)


# ---- language -------------------------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """Word-level tokenizer over the vocabulary of the scenes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS.values(), *CHAT_TOKENS, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL_TOKENS, extra_special_tokens=CHAT_TOKENS, model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def notes(rng: Random, scene: Scene) -> str:
    """Describe every frame in order by bare words with dots strewn in, as in "red . circle . . small left"."""
    words: list[str] = []
    for things in scene.frames:
        for thing in rng.sample(things, len(things)):
            zone = thing.zone or _nearest_zone(thing)
            if scene.setting == "group":
                zone = ""
            told = [word for word in (thing.look.size, thing.look.colour, thing.look.shape, zone) if word]
            rng.shuffle(told)
            for word in told:
                words += [word] + ["."] * rng.choice((0, 0, 0, 1, 2))
            words.append(".")
    return " ".join(words)


def _nearest_zone(thing: Thing) -> str:
    return min(ZONES, key=lambda zone: math.hypot(ZONES[zone][0] - thing.x, ZONES[zone][1] - thing.y))


def conversation(seed: int, index: int) -> tuple[str, list[Turn]]:
    """Return a description and questions that it answers."""
    scene, turns = scene_turns("train", index, seed, TEXT_KINDS, turns=4)
    rng = Random(f"notes/{seed}/{index}")
    return (caption(scene) if rng.random() < 0.25 else notes(rng, scene)), turns


def comparison(seed: int, index: int) -> tuple[str, list[Turn]]:
    """Return a caption and one question that compares it with what is asked."""
    scene, turns = scene_turns("train", index, seed, ["yes_no", "binding"], turns=1)
    return caption(scene), turns


def make_language(out: Path, steps: int, batch_size: int, seed: int) -> None:
    """Teach a Llama to answer questions about descriptions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
    )
    model = LlamaForCausalLM(config)

    def tokens(text: str) -> list[int]:
        return [ids[word] for word in text.split()]

    def encode(described: str, turns: list[Turn]) -> tuple[list[int], list[int]]:
        row, targets = [], []
        for turn in turns:
            asked = [ids["<user>"], *tokens(described), *tokens(turn.question), ids["<assistant>"]]
            answer = [*tokens(turn.answer), ids["<eos>"]]
            row += asked + answer
            targets += [NOTHING] * len(asked) + answer
            described = ""
        return row, targets

    def losses(rows: Iterator[tuple[list[int], list[int]]]) -> tuple[Tensor, dict[str, float]]:
        batch = list(rows)
        width = max(len(row) for row, _ in batch)
        input_ids = torch.tensor([row + [ids["<pad>"]] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([targets + [NOTHING] * (width - len(targets)) for _, targets in batch])
        hidden = model.model(input_ids).last_hidden_state[:, :-1]  # right padding needs no mask
        labels = labels[:, 1:]
        logits = model.lm_head(hidden[labels != NOTHING])
        wanted = labels[labels != NOTHING]
        return F.cross_entropy(logits, wanted), {"right": (logits.argmax(-1) == wanted).float().mean().item()}

    def talks(step: int) -> Iterator[tuple[list[int], list[int]]]:
        return (encode(*conversation(seed, i)) for i in range(step * batch_size, (step + 1) * batch_size))

    def comparisons(step: int) -> Iterator[tuple[list[int], list[int]]]:
        count = 4 * batch_size
        return (encode(*comparison(seed + 1, i)) for i in range(step * count, (step + 1) * count))

    train("language", model, steps, 2e-3, lambda step: losses(talks(step)))
    # Comparing words is learnt only from many short rows of nothing else; then everything together, or it is forgotten.
    train("comparing", model, steps // 2, 1e-3, lambda step: losses(comparisons(step)))
    train(
        "together",
        model,
        steps // 3,
        1e-3,
        lambda step: losses(
            itertools.chain(talks(steps + step), itertools.islice(comparisons(steps + step), 2 * batch_size))
        ),
    )
    model.eval().to(torch.bfloat16)
    model.generation_config.pad_token_id = ids["<pad>"]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory that `vision` and `language` are written to")
    parser.add_argument("--only", choices=["vision", "language"])
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--language-steps", type=int, default=600)
    parser.add_argument("--vision-batch", type=int, default=96)
    parser.add_argument("--language-batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    if args.only != "language":
        make_vision(args.out / "vision", args.vision_steps, args.vision_batch, args.seed)
    if args.only != "vision":
        make_language(args.out / "language", args.language_steps, args.language_batch, args.seed)


if __name__ == "__main__":
    main()
