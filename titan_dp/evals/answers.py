"""Answers to many small questions, each computed once, by one rank, and kept.

Every rank asks the same questions and gets all answers. Questions are put into batches of similar size before they are dealt
to the ranks, so a batch, and with it every rounding, is the same for any number of ranks. When an evaluation starts again,
what it knew is not computed again. The caller defines what a question is and how it is answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from titan_dp.evals.session import Result, Session
from titan_dp.faults.agreement import gather
from titan_dp.output import progress

Q = TypeVar("Q")


class Answers:
    """All answers so far, by key; with a result, they survive a kill.

    Args:
        session: the processes.
        result: keeps what this rank has computed; None keeps nothing.
    """

    def __init__(self, session: Session, result: Result | None) -> None:
        self._session, self._result = session, result
        kept = result.resume().get("answers") if result else None
        self._lines = bytearray() if kept is None else bytearray(kept.tobytes())
        """This rank's own, one JSON [key, answer] per line; appending costs the same however many there are."""
        self._known: dict[str, Any] = dict(json.loads(line) for line in self._lines.splitlines())

    def of(
        self,
        name: str,
        questions: Mapping[str, Q],
        answer: Callable[[list[Q]], list[Any]],
        size: Callable[[Q], int],
        batch_size: int,
    ) -> dict[str, Any]:
        """The answer to every question, by its key. Every rank calls this with the same questions.

        Args:
            name: what people who wait are told.
            questions: by a key that tells each from all others ever asked.
            answer: JSON values for a batch of questions, in their order.
            size: sorts the questions, largest first: what does not fit in memory fails at once, and little is padded.
            batch_size: most questions per batch.
        """
        self._exchange()
        missing = sorted(questions.keys() - self._known.keys(), key=lambda key: (-size(questions[key]), key))
        batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
        mine = batches[self._session.world.rank :: self._session.world.size]
        with progress(name, sum(map(len, mine))) as state:
            for keys in mine:
                self._add(dict(zip(keys, answer([questions[key] for key in keys]), strict=True)))
                state.advance(len(keys))
        self._exchange()
        return {key: self._known[key] for key in questions}

    def _add(self, answers: dict[str, Any]) -> None:
        for item in answers.items():
            with suppress(ValueError):  # JSON has no NaN; such an answer is computed again after a restart
                self._lines += json.dumps(item, allow_nan=False).encode() + b"\n"
        self._known |= answers
        if self._result:
            self._result.keep({"answers": np.frombuffer(self._lines, dtype=np.uint8)})

    def _exchange(self) -> None:
        """Afterwards every rank knows what any of them knew."""
        if self._session.world.size > 1:
            for others in gather(self._known):
                self._known |= others
