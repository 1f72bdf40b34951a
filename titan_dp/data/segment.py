"""This rank's segment of every row where ranks share rows (`parallelism.context_parallel_degree`).

All ranks of a context group read the same rows; each keeps one of as many equal segments, in order. Labels are cut from whole
rows, so the label at a segment's end is the first token of the next one and none is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_dp import config
from titan_dp.data.batch import Batch
from titan_dp.train.validate import before_last_label


@dataclass(frozen=True)
class Segment:
    part: int
    parts: int

    @staticmethod
    def of(parallelism: config.Parallelism, rank: int) -> Segment:
        """Neighbouring ranks share a row."""
        return Segment(rank % parallelism.context_parallel_degree, parallelism.context_parallel_degree)

    def __call__(self, batch: Batch) -> Batch:
        """input_ids and labels [L, T / parts], cu_seqlens of the whole rows, and `before_last_label` of them as `priced`."""
        ids, labels = batch["input_ids"], batch["labels"]
        if self.parts == 1 or ids is None or labels is None:
            return batch
        ids, labels, priced = (x.chunk(self.parts, 1)[self.part].contiguous() for x in (ids, labels, before_last_label(labels)))
        return {"input_ids": ids, "labels": labels, "cu_seqlens": batch["cu_seqlens"], "priced": priced}
