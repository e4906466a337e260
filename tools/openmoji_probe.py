"""Measure what the OpenMoji run is judged against: the majority answer, a probe on the frozen tower, the blind model.

    python tools/openmoji_probe.py data/openmoji data/smol -o runs/openmoji-baselines.json

- *majority*: the commonest answer of the training emoji, given to every held-out question.
- *probe*: logistic regression on the frozen tower's mean-pooled features, trained on the emoji that the run trains on
  and scored on the held-out ones. Its regularisation is chosen by cross-validation over training bases.
- *blind*: the language model as it comes, untrained, asked the held-out questions without their pictures: once by
  greedy generation (exact match), and once by choosing the likeliest of the answers that the kind allows, which spares
  it the wording (`name` and `text` have no such list).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("category", "is_category", "is_name", "name", "text")
REGULARISATION = (0.003, 0.03, 0.3)
MIN_RATIO = 2.5  # category accuracy asked of the run: this times the majority answer's,
MAX_GAP = 0.08  # and not further than this below the probe


def read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is not there; write it with: python tools/prepare_openmoji.py {path.parent}")
    return json.loads(path.read_text(encoding="utf-8"))


def pooled_features(pictures: Sequence[Path], tower_dir: Path, batch: int = 32) -> np.ndarray:
    """Return the tower's features averaged over the grid, ``(pictures, D)``, prepared as the run prepares them."""
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModel

    from sparsevlm.vision.encoder import encode_frames
    from sparsevlm.vision.preprocess import image_spec_from_config, preprocess_frames

    config = AutoConfig.from_pretrained(tower_dir, local_files_only=True)
    preprocessor = json.loads((tower_dir / "preprocessor_config.json").read_text(encoding="utf-8"))
    spec = image_spec_from_config(config, preprocessor)
    tower = AutoModel.from_pretrained(tower_dir, local_files_only=True).eval()
    pooled = []
    with torch.no_grad():
        for start in range(0, len(pictures), batch):
            frames = [Image.open(path).convert("RGB") for path in pictures[start : start + batch]]
            pooled.append(encode_frames(tower, preprocess_frames(frames, spec), -1, "patch", None).mean(1))  # (F, D)
    return torch.cat(pooled).numpy()


def probe(features: np.ndarray, emoji: Sequence[dict[str, Any]], folds: int = 3) -> dict[str, Any]:
    """Train on the rows of split ``train``, score on ``heldout``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = np.array([one["split"] == "train" for one in emoji])
    categories = np.array([one["category"] for one in emoji])
    bases = np.array([one["base"] for one in emoji])

    def model(strength: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))

    def validated(strength: float) -> float:
        scores = cross_val_score(
            model(strength), features[train], categories[train], groups=bases[train], cv=GroupKFold(folds)
        )
        return float(scores.mean())

    validation = {strength: validated(strength) for strength in REGULARISATION}
    best = max(validation, key=lambda strength: validation[strength])
    fitted = model(best).fit(features[train], categories[train])
    return {
        "accuracy": float(fitted.score(features[~train], categories[~train])),
        "validation_accuracy": validation[best],
        "C": best,
        "n_train": int(train.sum()),
        "n": int((~train).sum()),
    }


def majority(emoji: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the commonest category of the training emoji and its share of the held-out ones."""
    counts = Counter(one["category"] for one in emoji if one["split"] == "train")
    answer = counts.most_common(1)[0][0]
    heldout = [one["category"] for one in emoji if one["split"] == "heldout"]
    return {"answer": answer, "accuracy": heldout.count(answer) / len(heldout), "n": len(heldout)}


class BlindModel:
    """A language model that is asked without pictures, through its own chat template."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.bfloat16).eval()

    def _prompt(self, question: str) -> list[int]:
        turns = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]

    def generate(self, questions: Sequence[str], max_new_tokens: int = 16, batch: int = 32) -> Iterator[str]:
        """Yield the greedy answers."""
        import torch

        for start in range(0, len(questions), batch):
            prompts = [{"input_ids": self._prompt(question)} for question in questions[start : start + batch]]
            padded = self.tokenizer.pad(prompts, return_tensors="pt")
            with torch.no_grad():
                output = self.model.generate(**padded, do_sample=False, max_new_tokens=max_new_tokens)
            yield from self.tokenizer.batch_decode(output[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)

    def choose(self, question: str, answers: Sequence[str]) -> str:
        """Return the answer with the highest probability, its end of turn included."""
        import torch

        prompt = self._prompt(question)
        ends = [self.tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"] for answer in answers]
        width = len(prompt) + max(map(len, ends))
        rows = torch.tensor([prompt + end + [0] * (width - len(prompt) - len(end)) for end in ends])  # (answers, width)
        with torch.no_grad():
            logits = self.model(rows, logits_to_keep=width - len(prompt) + 1).logits.float()
        scores = logits[:, :-1].log_softmax(-1)  # the first position kept predicts the first token of the answer
        sums = [float(scores[row, range(len(end)), end].sum()) for row, end in enumerate(ends)]
        return answers[max(range(len(sums)), key=sums.__getitem__)]


def blind(data: Path, language: Path, limit: int | None) -> dict[str, dict[str, Any]]:
    """Score the untrained language model on the first ``limit`` held-out questions of every kind."""
    from sparsevlm.eval.metrics import METRICS, Reference

    model = BlindModel(language)
    score = METRICS["exact"].score
    report = {}
    for kind in KINDS:
        rows = read(data / f"heldout_{kind}.json")
        known = sorted({answer for row in rows for answer in row["answers"]})
        rows = rows[:limit]
        references = [Reference(tuple(row["answers"])) for row in rows]
        questions = [row["question"] for row in rows]
        replies = list(model.generate(questions))
        entry: dict[str, Any] = {
            "generated": float(np.mean([score(*pair) for pair in zip(replies, references)])),
            "n": len(rows),
        }
        if len(known) <= 9:
            chosen = [model.choose(question, known) for question in questions]
            entry["chosen"] = float(np.mean([score(*pair) for pair in zip(chosen, references)]))
        report[kind] = entry
        shown = "  ".join(f"{name} {value:.3f}" for name, value in entry.items() if name != "n")
        print(f"blind {kind:12s} {shown}  (n {len(rows)}); {questions[0]!r} -> {replies[0][:60]!r}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that prepare_openmoji.py wrote")
    parser.add_argument("parts", type=Path, help="folder that prepare_smol_parts.py wrote")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--limit", type=int, help="blind model: the first so many questions of each kind; default: all")
    parser.add_argument("--no-blind", action="store_true", help="leave the language model out")
    options = parser.parse_args()
    start = time.time()
    try:
        emoji = read(options.data / "emoji.json")
        report: dict[str, Any] = {"majority": majority(emoji)}
        pictures = [options.data / one["image"] for one in emoji]
        report["probe"] = probe(pooled_features(pictures, options.parts / "vision"), emoji)
        chance, seen = report["majority"]["accuracy"], report["probe"]["accuracy"]
        report["category_bar"] = max(MIN_RATIO * chance, seen - MAX_GAP)
        print(f"majority answer {report['majority']['answer']!r}: {chance:.3f} of {report['majority']['n']} held out")
        print(f"probe on frozen features: {seen:.3f} ({report['probe']['n_train']} to train on)")
        floors = f"{MIN_RATIO} x majority = {MIN_RATIO * chance:.3f}, probe - {MAX_GAP} = {seen - MAX_GAP:.3f}"
        print(f"category accuracy asked of the run: {report['category_bar']:.3f} ({floors})")
        if not options.no_blind:
            report["blind"] = blind(options.data, options.parts / "language", options.limit)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
