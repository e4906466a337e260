"""Merging adapters that were trained on quantised weights (`adapters/quantise.py`)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsevlm.adapters.saved import PARENT, QUANTISATION, read_parent
from sparsevlm.export.merge_adapter import AdapterFolder

if TYPE_CHECKING:
    from sparsevlm.adapters.quantise import Settings
    from sparsevlm.export.merge_check import MergeCheck
    from sparsevlm.export.merge_job import Job


@dataclass(frozen=True)
class AsTrained:
    """How the two ways to merge compare with what was trained: the adapter on the quantised weights.

    Each pair is the largest and the mean difference of logits.

    Attributes:
        kind: What the weights were quantised to.
        into_base: Merged into the weights as they are stored.
        replayed: Merged into the weights as training saw them.
        written: Which of them was written: ``into_base`` or ``replayed``.
    """

    kind: str
    into_base: tuple[float, float]
    replayed: tuple[float, float]
    written: str

    def describe(self) -> list[str]:
        """Return lines for the console."""
        lines = [f"against the adapter on {self.kind} weights, as it was trained:"]
        for name, what, (largest, mean) in (
            ("into_base", "merged into the weights as they are stored", self.into_base),
            ("replayed", "with --replay-quantisation", self.replayed),
        ):
            mark = " (written)" if name == self.written else ""
            lines.append(f"  {what}: logits differ by at most {largest:.1e}, mean {mean:.1e}{mark}")
        return lines


def quantised_for(sources: Sequence[AdapterFolder]) -> Settings | None:
    """Return how the weights were quantised that adapters were trained on; None where they were not, or differently."""
    records = [
        read_parent(source.directory).get(QUANTISATION) if (source.directory / PARENT).is_file() else None
        for source in sources
    ]
    if records[0] is None or any(record != records[0] for record in records):
        return None
    from sparsevlm.adapters.quantise import Settings

    return Settings.from_dict(records[0])


def refuse_replay(sources: Sequence[AdapterFolder], settings: Settings | None) -> None:
    """Refuse to replay what is not known.

    Raises:
        ValueError: The adapters do not say how the weights were quantised, or say different things; or bitsandbytes is
            not installed.
    """
    names = " and ".join(source.name for source in sources)
    if settings is None:
        raise ValueError(
            f"--replay-quantisation: the {PARENT} of {names} does not say that (all) the weights were quantised for "
            "training, or not in one way; leave it out"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "--replay-quantisation needs bitsandbytes, which is not installed: pip install 'sparsevlm[quant]'"
        )


@torch.no_grad()
def compare_quantised(job: Job, adapter: AdapterFolder, result: Path) -> tuple[MergeCheck, AsTrained | None]:
    """Compare what was written with its float32 sum, and both ways to merge with what was trained.

    Returns:
        The second is None without bitsandbytes.

    Raises:
        ValueError: What was written differs from the sum by more than rounding.
    """
    from sparsevlm.export.merge_check import judged, logits_in_memory, samples_of, written_logits
    from sparsevlm.model.build import load_model

    assert job.settings is not None
    samples, what = samples_of(job.base, result)
    written = written_logits(job, result, samples)
    before, wanted = logits_in_memory(job, job.replayed.values(), samples)
    check = replace(judged(written, wanted, before, what, job.dtype), in_memory=True)
    if find_spec("bitsandbytes") is None:
        return check, None
    others = () if job.replayed else job.settings.weights
    _, other = logits_in_memory(job, others, samples, job.dtype)
    gc.collect()
    model = load_model(adapter.directory, dtype="float32", base=job.base.directory)[0].eval()
    trained = [model(**sample, use_cache=False).logits.double() for sample in samples]
    ours, theirs = _difference(written, trained), _difference(other, trained)
    if job.replayed:
        return check, AsTrained(job.settings.kind, theirs, ours, "replayed")
    return check, AsTrained(job.settings.kind, ours, theirs, "into_base")


def _difference(got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    differences = torch.cat([(a - b).abs().flatten() for a, b in zip(got, want, strict=True)])
    return float(differences.max()), float(differences.mean())
