"""Evaluate the checkpoints of a run beside its training, each once: `watch RUN --every N -- perplexity --shards FOLDER`.

Behind `--` stands an evaluation as for `titan-dp evaluate`, without its checkpoint; several have a `--` each. Results go to
RUN/evaluations/, their curves to RUN/evaluations.jsonl, which `titan-dp report` reads, and to TensorBoard.

Training knows nothing of it: what is committed is read, and nothing of the run is written, renamed or held. A checkpoint that
the run deletes meanwhile is passed over. The only state is evaluations.jsonl: the same command goes on where it was stopped,
here or on another machine that sees the folder. One watch at a time writes there; it is one process, of the lowest priority.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from titan_dp.config.arguments import Parser, above_zero, from_zero, parse, positive, take_commands
from titan_dp.errors import RunError, UserError, counted, did_you_mean, explained
from titan_dp.files import stays_inside
from titan_dp.output import print_text
from titan_dp.train.evaluations import FILE, Evaluated, committed, healthy_checkpoints, read_evaluations, write_evaluations
from titan_dp.train.run_folder import RunLock, is_locked, read_run

KINDS = ("perplexity", "lm-eval", "length-extrapolation", "recall")
"""Evaluations whose module has `curves(results) -> {name: number}`, what is followed over tokens."""
FOLDER = "evaluations"
"""In the run folder: the results, and the lock of the watch. In tb/: the curves."""
_LOWEST_PRIORITY = 19  # of nice(2): training's processes go first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s RUN [options] -- [NAME=]KIND ... [-- [NAME=]KIND ...]"
    parser.epilog = f"KIND is one of {', '.join(KINDS)}, with its options; NAME, by default KIND, names its curves."
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder, whose training may be under way or yet to begin")
    parser.add_argument(
        "--every",
        type=positive,
        default=1,
        metavar="N",
        help="only checkpoints whose step is a multiple of N (default: all)",
    )
    parser.add_argument("--poll", type=above_zero, default=30, metavar="SECONDS", help="between two looks (default: 30)")
    parser.add_argument(
        "--patience",
        type=from_zero,
        default=600,
        metavar="SECONDS",
        help="how long to wait for a run that is not finished and that nobody trains (default: 600)",
    )
    take_commands(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate until the run ends and its last checkpoint is evaluated; the exit code is 1 if some could not be.

    Raises UserError for what is no run, evaluations that cannot be made, or a finished run without a checkpoint to evaluate;
    RunError for a second watch.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("titan-dp evaluate watch is one process; start it without torchrun")
    if not (args.folder / "config.toml").is_file():
        raise UserError(
            f"{args.folder} is not a run folder: it has no config.toml; give the folder that `titan-dp train` writes"
        )
    evaluations = [_evaluation(words) for words in args.commands]
    if not evaluations:
        raise UserError("nothing to evaluate: name it behind --, such as -- perplexity --shards data/corpus/validation")
    names = [each.name for each in evaluations]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two evaluations are called {twice!r}; name one of them, such as -- other={twice} ...")
    if is_locked(args.folder / FOLDER):
        raise RunError(
            f"another watch is at work in {args.folder / FOLDER}; one makes all evaluations of a run: stop the other"
        )
    with closing(RunLock(args.folder / FOLDER)):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_PRIORITY)
        with closing(_Watch(args, evaluations)) as watch:
            return watch.until_the_end()


@dataclass(frozen=True)
class _Evaluation:
    name: str
    kind: str
    words: list[str]
    """Behind the kind."""

    @property
    def command(self) -> list[str]:
        return [self.kind, *self.words]

    @property
    def module(self) -> Any:
        return import_module(f"titan_dp.evals.{self.kind.replace('-', '_')}")

    def arguments(self, checkpoint: Path, out: Path) -> argparse.Namespace:
        """Those of its command. Leaves with code 2 if argparse refuses the words."""
        parser = Parser(prog=f"titan-dp evaluate watch RUN -- {self.kind}", allow_abbrev=False)
        self.module.add_arguments(parser)
        return parse(parser, [str(checkpoint), *self.words, "--out", str(out)])


def _evaluation(words: list[str]) -> _Evaluation:
    """The evaluation that `words` ask for. Raises UserError if they cannot be one."""
    first, named, kind = words[0].partition("=")
    each = _Evaluation(first, kind if named else first, words[1:])
    if each.kind not in KINDS:
        hint = did_you_mean(each.kind, KINDS) or f"; it takes {', '.join(KINDS)}"
        raise UserError(f"{each.kind!r} behind -- is no evaluation that can be watched{hint}")
    if not stays_inside(each.name):
        raise UserError(f"{each.name!r} cannot name an evaluation: it becomes the name of a folder")
    if given := next((word for word in each.words if word.partition("=")[0] in ("--out", "--overwrite")), None):
        raise UserError(f"{given} behind -- {words[0]}: results of a watch go to {FOLDER}/ in the run folder; leave it out")
    checkpoint = Path("CHECKPOINT")
    args = vars(each.arguments(checkpoint, Path("OUT")))
    if args.pop("checkpoints", [checkpoint]) != [checkpoint]:
        raise UserError(f"-- {shlex.join(words)} names checkpoints; leave them out: the watch names each of the run")
    paths = [value for name, value in args.items() if isinstance(value, Path) and name not in ("checkpoint", "out")]
    if missing := next((path for path in paths if not path.exists()), None):  # else said only when there is a checkpoint
        raise UserError(f"-- {shlex.join(words)}: {missing} does not exist")
    return each


class _Watch:
    """One watch of the run in `args.folder`, whose lock is held."""

    def __init__(self, args: argparse.Namespace, evaluations: list[_Evaluation]) -> None:
        self.args, self.folder, self.evaluations = args, args.folder, evaluations
        self.evaluated = read_evaluations(self.folder)
        for each in evaluations:
            earlier = (found.command for found in self.evaluated if found.name == each.name)
            if other := next((command for command in earlier if command != each.command), None):
                raise UserError(
                    f"{self.folder / FILE}: {each.name!r} was measured by `{shlex.join(other)}`; a curve has one command: "
                    f"give that again, or another name, such as -- other={each.kind} ..."
                )
        self.failed: dict[tuple[int, str], None] = {}
        self._seen: tuple[Any, ...] = ()
        self._moved = time.monotonic()
        self._tensorboard: Any = None

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def until_the_end(self) -> int:
        """Evaluate what there is, and wait for more, until no more can come; returns the exit code."""
        before, waited = len(self.evaluated), False
        while True:
            end = self._end()  # before the look for checkpoints: what was saved by then is seen
            due = self._due()
            for step, checkpoint, each in due:
                self._evaluate(step, checkpoint, each)
            if due:
                _free_memory()
            elif end:
                return self._report(end, len(self.evaluated) - before)
            else:
                if not waited:
                    print_text(f"waiting for checkpoints of {self.folder}, with a look every {self.args.poll:g} s")
                waited = True
                sys.stdout.flush()  # whoever reads a log sees what is done
                time.sleep(self.args.poll)

    def _due(self) -> list[tuple[int, Path, _Evaluation]]:
        """What is to be done, the oldest checkpoint first: it is deleted first."""
        done = {(each.step, each.name) for each in self.evaluated} | self.failed.keys()
        found = healthy_checkpoints(self.folder, self.args.every)
        return [(s, path, each) for s, path in found.items() for each in self.evaluations if (s, each.name) not in done]

    def _end(self) -> str:
        """Why no checkpoint will come any more: a clause; empty while one may.

        A run that is not finished may be trained where its lock is not seen, or again: it ends when nothing has come for long.
        """
        state = (read_run(self.folder) or {}).get("state")
        log = self.folder / "metrics.jsonl"
        seen = (is_locked(self.folder), state, log.stat().st_size if log.exists() else 0)
        if seen != self._seen or seen[0]:
            self._seen, self._moved = seen, time.monotonic()
        if seen[0]:
            return ""
        if state == "finished":
            return "is finished"
        waited = time.monotonic() - self._moved >= self.args.patience
        return f"is not finished, but nobody has trained it for {self.args.patience:g} s" if waited else ""

    def _evaluate(self, step: int, checkpoint: Path, each: _Evaluation) -> None:
        """Evaluate one checkpoint and write it down, unless the run deletes it or saves it again meanwhile."""
        manifest, out = committed(checkpoint), self.folder / FOLDER / each.name / checkpoint.name
        try:
            if manifest:
                print_text(f"step {step:,}: {each.name}")
                each.module.run(each.arguments(checkpoint, out))
        except Exception as error:
            if manifest == committed(checkpoint):
                known = explained(error)
                if known is None or (isinstance(known, UserError) and not self._has_worked(each)):
                    raise
                print_text(f"step {step:,} could not be evaluated: {known}")
                self.failed[step, each.name] = None
                return
            manifest = b""
        if manifest:
            self._write_down(each, out)
        else:
            print_text(f"step {step:,} is skipped: the run has deleted it before {each.name} was done")

    def _has_worked(self, each: _Evaluation) -> bool:
        """Whether its command was right once: then what is wrong now is the checkpoint's."""
        return any(found.name == each.name for found in self.evaluated)

    def _write_down(self, each: _Evaluation, out: Path) -> None:
        """The curves' values, from the result that the evaluation has left in `out`."""
        (path,) = out.glob("*.json")
        found = json.loads(path.read_bytes())
        whose, values = found["checkpoint"], each.module.curves(found["results"])
        if (self.folder / "tb").is_dir():  # the run writes there, or has
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(self.folder / "tb" / FOLDER))
            for name, value in values.items():
                self._tensorboard.add_scalar(f"evaluation/{each.name}/{name}", value, whose["step"])
            self._tensorboard.flush()
        line = Evaluated(step=whose["step"], tokens=whose["tokens"], name=each.name, command=each.command, values=values)
        self.evaluated.append(line)
        write_evaluations(self.folder, self.evaluated)

    def _report(self, end: str, new: int) -> int:
        if self.failed:
            names = ", ".join(f"step {step:,} ({name})" for step, name in self.failed)
            raise RunError(f"{self.folder} {end}; not evaluated: {names}; the same command tries again")
        if not any(map(self._has_worked, self.evaluations)):
            error = UserError if end == "is finished" else RunError
            what = "no committed, healthy checkpoint whose step is a multiple of --every"
            raise error(f"{self.folder} {end}, and has {what} {self.args.every}; `titan-dp checkpoint list` shows what it has")
        done = counted(new, "new evaluation") if new else "nothing new to evaluate"
        again = "" if end == "is finished" else "; if it is trained again, the same command goes on"
        print_text(f"{self.folder} {end}; {done}, {len(self.evaluated):,} in {self.folder / FILE}{again}")
        return 0


def _free_memory() -> None:
    """Give a GPU's memory back while there is nothing to do."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
