"""Documents from files or a Hugging Face dataset, in a fixed order and one at a time.

Folders are walked in sorted order, linked ones too; what no reader takes is counted and named, never left out in silence.
formats.py has the readers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from titan_dp.data.formats import (
    COMPRESSIONS,
    READERS,
    Reading,
    compression_of,
    format_of,
    packages_for,
    read_documents,
    text_of,
)
from titan_dp.errors import RunError, UserError, counted, passing_fault, require
from titan_dp.files import Replaced, as_unicode, shorten, shown


@dataclass
class Account:
    """What became of the input: counted while it is read, shown at the end and kept in the manifest."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Files of folders that were not read, by the reason."""
    files: int = 0
    """Files that were read, the one at hand among them."""
    documents: int = 0
    """Documents that were read, without those refused."""
    text_bytes: int = 0
    """UTF-8 bytes of their texts."""
    without_tokens: int = 0
    """Documents of which nothing is kept: empty ones without BOS and EOS."""
    empty: int = 0
    """Documents without a character."""
    refused: int = 0
    """Documents that could not be used, with --on-bad-document skip."""
    first_refused: str = ""

    def counts(self, replaced: Replaced) -> dict[str, Any]:
        """For the manifest, the same whatever the files are called."""
        return {
            "files": self.files,
            "files_skipped": dict(sorted(self.skipped.items())),
            "documents_empty": self.empty,
            "documents_refused": self.refused,
            "characters_replaced": replaced.characters,
        }

    def describe(self) -> str:
        """What a person should know of the input, in one line or two."""
        parts = [f"read {counted(self.files, 'file')}"] if self.files else []
        parts += [counted(self.empty, "empty document")] if self.empty else []
        parts += [named(self.skipped)] if self.skipped else []
        refused = f"\nWARNING: {counted(self.refused, 'document')} refused, the first: {self.first_refused}"
        return "; ".join(parts) + refused * bool(self.refused)


# What prepare and the `datasets` library write beside data, and nobody means as text.
_RECORDS = {"progress.json", "manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def find_files(inputs: list[str], account: Account | None = None, out: Path | None = None) -> list[Path]:
    """Input files in the order they are read: as named, folders walked in sorted order, links followed, `out` left out.

    Raises UserError for a path that does not exist, a file that no reader takes, a folder with nothing readable, a file that
    is there twice (under two names, or in two compressions), and a package that is missing.
    """
    account = account or Account()
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if not name:  # which would be the current folder
            raise UserError("the name of an input is empty; name a file or a folder ('.' is the current one)")
        if path.is_dir():
            found = [p for p in _walk(path, account, out) if _is_taken(p, account)]
            if not found:
                skipped = f"; {named(account.skipped)}" if account.skipped else ""
                raise UserError(f"{name!r} holds no {', '.join(READERS)} file{skipped}")
            files += found
        elif path.is_file():
            if format_of(path) is None:
                known = f"{', '.join(READERS)}, each also {', '.join(COMPRESSIONS)}"
                raise UserError(f"{name!r} is not one of {known}; rename or convert it")
            files.append(path)
        else:
            raise UserError(f"input {name!r} does not exist")
    first_that_needs = {package: path for path in reversed(files) for package in packages_for(path)}
    for package, path in first_that_needs.items():  # not per file: `require` looks through the folders of packages
        require(str(path), package)
    by_content: dict[Path | tuple[int, int], Path] = {}
    for path in files:
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} may not be read; change its permissions, or leave it out with --files-from")
        if as_unicode(str(path)) != str(path):
            raise UserError(f"the name {shown(str(path))} is not UTF-8, and names are written down; rename it")
        real = Path(os.path.realpath(path))
        plain = real.with_suffix("") if compression_of(real) else real
        inode = os.stat(real)
        for key in (plain, (inode.st_dev, inode.st_ino)):  # two hard links are of one file as well
            if (twin := by_content.setdefault(key, path)) is not path:
                raise UserError(f"{twin} and {path} are one file twice, or look like it; name one of them")
    return files


def _walk(folder: Path, account: Account, out: Path | None) -> list[Path]:
    """The files below `folder` in sorted order. A folder that a link leads back to is not entered again."""
    entered = {os.path.realpath(out)} if out is not None else set()
    found = []

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}); change its permissions, or move it away")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(root)) in entered:
            folders.clear()
            continue
        entered.add(real)
        account.skipped["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root) / name for name in names]
    account.skipped = +account.skipped
    return sorted(found)


def _is_taken(path: Path, account: Account) -> bool:
    if not path.is_file():
        reason = "not a file"
    elif path.name.startswith("."):
        reason = "hidden"
    elif path.name in _RECORDS:
        reason = "records of datasets"
    elif format_of(path) is None:
        reason = path.suffix.lower() or "no ending"
    else:
        return True
    account.skipped[reason] += 1
    return False


def named(skipped: Counter[str]) -> str:
    """Such as "not read: 3 .pdf, 1 hidden", most first."""
    return f"not read: {', '.join(f'{n} {reason}' for reason, n in skipped.most_common(10))}"


Text = str | Iterator[str]
"""Of a document; a long one in pieces, to be used up before the next document is asked for."""


class Documents:
    """The documents of an input in order, from any place in it on: (where it is, its text), lone surrogates and all.

    Raises UserError naming file and line for what cannot be read; with `skip_bad` a document that cannot be used is counted
    instead. A file that cannot be read on is always an error.
    """

    def __init__(self, account: Account, skip_bad: bool, place: tuple[int, int]) -> None:
        self.account, self.skip_bad, self.place = account, skip_bad, place
        """(files before the one at hand, documents of that one that have been handed out)."""
        self.total: int | None = None
        """What `read_so_far` is at the end, if that is known."""

    def __iter__(self) -> Iterator[tuple[str, Text]]:
        for where, text in self._found():
            if not isinstance(text, UserError):
                yield where, text
            else:
                self.refuse(text)

    def refuse(self, error: UserError) -> None:
        """A document cannot be used. Raises `error` unless that is to be counted."""
        if not self.skip_bad:
            raise error
        self.account.refused += 1
        self.account.first_refused = self.account.first_refused or str(error)

    def _found(self) -> Iterator[tuple[str, Text | UserError]]:
        raise NotImplementedError

    def read_so_far(self) -> int:
        """Bytes of files, rows of a dataset."""
        raise NotImplementedError


class FileDocuments(Documents):
    """Of `files`, read as `how` says."""

    def __init__(
        self, files: list[Path], how: Reading, account: Account, skip_bad: bool = False, place: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(account, skip_bad, place)
        self.files, self.how = files, how
        sizes = [path.stat().st_size for path in files]
        self._before = [0, *accumulate(sizes)]
        self.total = self._before[-1]

    def _found(self) -> Iterator[tuple[str, Text | UserError]]:
        first, done = self.place
        for number in range(first, len(self.files)):
            self.account.files = number + 1
            self.place = number, done
            found = read_documents(self.files[number], self.how)
            for _, text in islice(found, done):
                use_up(text)
            for where, text in found:
                done += 1
                self.place = number, done
                yield where, text
            done = 0

    def read_so_far(self) -> int:
        number, _ = self.place
        before = self._before[number : number + 2]
        return round(before[0] + (before[-1] - before[0]) * min(self.how.meter.share(), 1))


class DatasetDocuments(Documents):
    """Of a dataset on the Hub or in a local folder, as `load_hugging_face` gives it."""

    def __init__(
        self, dataset: Any, name: str, column: str, account: Account, skip_bad: bool = False, place: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(account, skip_bad, place)
        self.dataset, self.name, self.column = dataset, name, column
        self.total = len(dataset) if hasattr(dataset, "__len__") else None

    def _found(self) -> Iterator[tuple[str, Text | UserError]]:
        first = self.place[1]
        for number, row in enumerate(rows_of(self.dataset.skip(first) if first else self.dataset, self.name), first):
            self.place = 0, number + 1
            where = f"row {number} of {self.name}"
            yield where, text_of(row, where, self.column)

    def read_so_far(self) -> int:
        return self.place[1]


def use_up(text: Text | UserError) -> None:
    """Read a document to its end for the sake of the next one."""
    if isinstance(text, Iterator):
        with suppress(UserError):  # it was refused before, too
            for _ in text:
                pass


def documents(
    files: list[Path], how: Reading, replaced: Replaced, account: Account | None = None, skip_bad: bool = False
) -> Iterator[str]:
    """The whole texts of all files, lone surrogates `replaced`. Raises UserError as `Documents`."""
    return _whole(FileDocuments(files, how, account or Account(), skip_bad), replaced)


def hugging_face_documents(
    name: str, config: str, split: str, column: str, streaming: bool, replaced: Replaced
) -> Iterator[str]:
    """The texts of a dataset on the Hub or in a local folder, as `documents` gives those of files."""
    dataset = load_hugging_face(name, config, split, column, streaming)
    return _whole(DatasetDocuments(dataset, name, column, Account()), replaced)


def _whole(found: Documents, replaced: Replaced) -> Iterator[str]:
    for where, text in found:
        whole = replaced(text if isinstance(text, str) else "".join(text), where)
        found.account.empty += not whole
        yield whole


def rows_of(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The rows of dataset `name`.

    Raises UserError if one is not UTF-8 or cannot be parsed, RunError if the connection to it breaks.
    """
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(f"Hugging Face dataset {name!r} holds bytes that are not UTF-8 ({error}); convert it") from error
    except Exception as error:
        if (fault := passing_fault(error)) is None:
            if type(error).__name__ == "ArrowInvalid":  # what a file of the dataset holds, such as a lone surrogate in JSON
                raise UserError(
                    f"Hugging Face dataset {name!r} holds what its reader refuses: {_reason(error)}; mend it, or give its "
                    "files to `titan-dp prepare` as INPUT"
                ) from error
            raise
        raise RunError(
            f"Hugging Face dataset {name!r} cannot be read on ({type(fault).__name__}: {shorten(str(fault))}); the same "
            "command goes on once it can"
        ) from error


def load_hugging_face(name: str, config: str, split: str, column: str, streaming: bool):  # type: ignore[no-untyped-def]
    """The `datasets` object, its column checked.

    Raises UserError if the package, the dataset, the split or the column is missing.
    """
    require("reading Hugging Face datasets", "datasets")
    import datasets

    try:
        dataset = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:
        message = _reason(error)
        hint = (
            "; code of a dataset is never run: load it elsewhere and save it as .jsonl or .parquet"
            if "script" in message
            else ""
        )
        raise UserError(
            f"Hugging Face dataset {name!r} (name {config!r}, split {split!r}) cannot be loaded: {message}{hint}"
        ) from error
    if dataset.column_names is not None and column not in dataset.column_names:
        raise UserError(f"Hugging Face dataset {name!r} has no column {column!r}; it has {', '.join(dataset.column_names)}")
    return dataset


def _reason(error: BaseException) -> str:
    """The first line of what is wrong, which `datasets` keeps behind a sentence that says nothing."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
