"""All that is found in folders of shards, as data: what `--json` prints, and what the screen is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from titan_dp.data.inspect import measure
from titan_dp.data.inspect.measure import Duplicates, Ids, Lengths, Text, body
from titan_dp.data.inspect.text import Decoder
from titan_dp.data.shards import AGAIN, MANIFEST, TokenShards, listed_shards, shard_name
from titan_dp.errors import UserError, counted
from titan_dp.files import file_sha256
from titan_dp.output import progress

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BEGINNING, _END = 1024, 96
"""Tokens shown of a document, and of either side of a boundary."""
_LISTED = 5
"""Ids, characters and folders that are listed at most; all are counted."""


def find_shards(paths: Sequence[Path]) -> tuple[list[TokenShards], list[str]]:
    """The folders of shards that `paths` are or hold, two levels down, and sentences about those that are not finished.

    Raises UserError if a path holds none, or if one is damaged.
    """
    sources: list[TokenShards] = []
    notes = []
    for path in paths:
        near = [path, *sorted(path.glob("*/")), *sorted(path.glob("*/*/"))] if path.is_dir() else [path]
        held = [folder for folder in near if folder.is_dir() and any(shard_name(each.name) for each in folder.iterdir())]
        finished = [folder for folder in held if (folder / MANIFEST).exists()]
        # Other things have manifests too.
        finished = [f for f in finished if listed_shards(f) is not None or f == path or any(f.glob("shard-*.npy"))]
        notes += [
            f"not read: {folder} has shards but no {MANIFEST}: `titan-dp prepare` was cut off or is at work there"
            for folder in held
            if not (folder / MANIFEST).exists()
        ]
        sources += [TokenShards(folder) for folder in finished or [path]]  # which says what is wrong with `path`
    same = {source.folder.resolve(): source for source in reversed(sources)}
    return [source for source in sources if same.get(source.folder.resolve()) is source], notes


def check_countable(sources: Sequence[TokenShards]) -> None:
    """Raises UserError if there is nothing to count, or more than fits in memory."""
    for source in sources:
        if not source.manifest["documents"] or not len(source):
            raise UserError(f"{source.folder} holds no documents; {AGAIN}")
    if large := next((source for source in sources if source.vocab_size > measure.LARGEST_VOCABULARY), None):
        raise UserError(
            f"{large.folder / MANIFEST} has tokenizer.vocab_size = {large.vocab_size:,}, more than the "
            f"{measure.LARGEST_VOCABULARY:,} ids that inspect counts; {AGAIN}"
        )


def inspect(
    sources: Sequence[TokenShards], decoders: Sequence[Decoder], seed: int, documents: int, full: bool, seq_len: int | None
) -> dict[str, Any]:
    """Everything but a batch.

    Args:
        decoders: one for each of `sources`.
        seed: of what is drawn at random.
        documents: so many of them are shown, and so many boundaries.
        full: read everything, and compare every file with its hash first.
        seq_len: tokens of a row of training, if that is known.

    Raises UserError if a shard is damaged.
    """
    if full:
        _compare_hashes(sources)
    with progress("lengths of documents", sum(source.manifest["documents"] for source in sources)) as state:
        lengths = measure.count_lengths(sources, state)
    together = Lengths()
    for each in lengths:
        together.add(each.values, each.counts)
    ids, text, duplicates, how = _contents(sources, decoders, seed, full)
    rng = np.random.default_rng([seed, 3])
    return {
        "seed": seed,
        "folders": [_folder(source) | {"lengths": _lengths(source, own)} for source, own in zip(sources, lengths, strict=True)],
        "lengths": {
            "mean": together.tokens / together.documents,
            "quantiles": _quantiles(together),
            "histogram": [bin._asdict() for bin in together.histogram()],
            "longer_than_row": seq_len and dict(zip(("documents", "tokens"), together.above(seq_len), strict=True)),
        },
        "read": how,
        "ids": [_ids(sources, found, decoder) for found, decoder in ids],
        "text": _text(sources, text) if text.documents else None,
        "duplicates": _duplicates(sources, decoders, duplicates),
        "documents": [_document(sources, decoders, *place) for place in _draw(sources, rng, documents, 0)],
        "boundaries": [_boundary(sources, decoders, *place) for place in _draw(sources, rng, documents, 1)],
    }


def _compare_hashes(sources: Sequence[TokenShards]) -> None:
    files = [
        (source.folder / name, expected)
        for source in sources
        for shard in source.shards
        for name, expected in ((shard.file, shard.sha256), (shard.starts_file, shard.starts_sha256))
    ]
    with progress("files compared with their hashes", len(files)) as state:
        for path, expected in state.each(files):
            if file_sha256(path) != expected:
                raise UserError(
                    f"{path} is not what was prepared (its sha256 differs from the manifest's): restore it, or {AGAIN}"
                )


# -- contents ------------------------------------------------------------------------------------------------------------

_Documents = Iterator[tuple[int, int, np.ndarray, np.ndarray]]
"""Folder, number of the first document, bounds [n + 1] and tokens, as of `TokenShards.documents`."""


def _read(sources: Sequence[TokenShards], windows: Sequence[measure.Window], what: str) -> _Documents:
    total = sum(stop - start for _, start, stop in windows)
    with progress(what, total) as state:
        for folder, start, stop in windows:
            done = 0
            for number, bounds, tokens in sources[folder].documents(start, stop):
                yield folder, number, bounds, tokens
                state.advance(min(len(tokens), stop - start - done))
                done = min(done + len(tokens), stop - start)
            state.advance(stop - start - done)


def _contents(
    sources: Sequence[TokenShards], decoders: Sequence[Decoder], seed: int, full: bool
) -> tuple[list[tuple[Ids, Decoder]], Text, Duplicates, dict[str, Any]]:
    tokens = sum(len(source) for source in sources)
    all_ids, all_text = full or tokens <= measure.ALL, full or tokens <= measure.TEXT
    sample = measure.draw_windows(sources, seed)
    counts: dict[str, tuple[Ids, Decoder]] = {}
    for source, decoder in zip(sources, decoders, strict=True):
        made = source.tokenizer
        counts.setdefault(made.hash, (Ids(made.vocab_size, made.bos_id, made.eos_id), decoder))
    text, duplicates = Text(), Duplicates(widen=len({source.dtype for source in sources}) > 1)
    every = measure.whole(sources)
    for folder, number, bounds, ids in _read(sources, every if all_ids else sample, "tokens read"):
        source = sources[folder]
        counts[source.tokenizer.hash][0].add(folder, number, bounds, ids)
        if all_ids:
            documents = (body(source, ids[a:b]) for a, b in _pairs(bounds))
            duplicates.add(folder, _seed_of(source), range(number, number + len(bounds) - 1), documents)
    how: dict[str, Any] = {"tokens": tokens, "ids": all_ids, "text": all_text, "duplicates": all_ids, "files": full}
    if not all_ids:
        how |= _same_lengths(sources, seed, duplicates)
    duplicates.finish()
    how["every"] = duplicates.every
    if any(decoder.tokenizer is not None for decoder in decoders):
        for folder, number, bounds, ids in _read(sources, every if all_text else sample, "tokens decoded"):
            if decoders[folder].tokenizer is not None:
                for i, (a, b) in enumerate(_pairs(bounds)):
                    document = body(sources[folder], ids[a:b])
                    text.add(decoders[folder], folder, number + i, document if all_text else document[: measure.TEXT // 16])
    return list(counts.values()), text, duplicates, how


def _pairs(bounds: np.ndarray) -> Iterator[tuple[int, int]]:
    return pairwise((bounds - bounds[0]).tolist())


def _seed_of(source: TokenShards) -> int:
    return int.from_bytes(source.tokenizer.hash.encode()[:8], "big")


def _same_lengths(sources: Sequence[TokenShards], seed: int, duplicates: Duplicates) -> dict[str, Any]:
    """Feed `duplicates` all documents of some lengths, BOS and EOS not counted."""
    around = [source.manifest["adds_bos"] + source.manifest["adds_eos"] for source in sources]
    bodies = Lengths()
    total = sum(source.manifest["documents"] for source in sources)
    with progress("lengths without BOS and EOS", total) as state:
        for source, marks in zip(sources, around, strict=True):
            for _, bounds, _ in source.documents():
                bodies.add(np.maximum(np.diff(bounds) - marks, 0))
                state.advance(len(bounds) - 1)
    drawn, too_many = measure.draw_lengths(bodies, seed)
    with progress("documents looked for duplicates", total) as state:
        for folder, source in enumerate(sources):
            for number, bounds, ids in source.documents():
                chosen = np.flatnonzero(np.isin(np.diff(bounds) - around[folder], drawn))
                documents = (body(source, ids[bounds[i] - bounds[0] : bounds[i + 1] - bounds[0]]) for i in chosen)
                duplicates.add(folder, _seed_of(source), (number + chosen).tolist(), documents)
                state.advance(len(bounds) - 1)
    return {"lengths_drawn": len(drawn), "lengths_in_all": len(bodies.values), "lengths_passed_over": too_many}


# -- as data -------------------------------------------------------------------------------------------------------------


def _folder(source: TokenShards) -> dict[str, Any]:
    made = source.manifest
    size = sum((source.folder / name).stat().st_size for shard in source.shards for name in (shard.file, shard.starts_file))
    return {
        "folder": str(source.folder),
        "split": source.split,
        "fingerprint": source.fingerprint,
        "tokenizer": source.tokenizer.name,
        "tokenizer_hash": source.tokenizer.hash,
        "vocab_size": source.vocab_size,
        "adds_bos": made["adds_bos"],
        "adds_eos": made["adds_eos"],
        "shards": len(source.shards),
        "documents": made["documents"],
        "tokens": len(source),
        "text_bytes": made["text_bytes"],
        "file_bytes": size,
        "account": made.get("account"),
    }


def _quantiles(lengths: Lengths) -> dict[str, int]:
    return {f"{share:g}": lengths.quantile(share) for share in QUANTILES}


def _lengths(source: TokenShards, own: Lengths) -> dict[str, Any]:
    marks = source.manifest["adds_bos"] + source.manifest["adds_eos"]
    empty = own.documents - own.above(marks)[0] if marks else 0
    return {"mean": own.tokens / own.documents, "quantiles": _quantiles(own), "empty": empty}


def _ids(sources: Sequence[TokenShards], ids: Ids, decoder: Decoder) -> dict[str, Any]:
    unused, order = np.flatnonzero(ids.counts == 0), np.argsort(-ids.counts, kind="stable")
    return {
        "tokenizer": decoder.name,
        "tokenizer_hash": decoder.hash,
        "tokens": ids.tokens,
        "documents": ids.documents,
        "vocab_size": ids.vocab_size,
        "never_used": len(unused),
        "never_used_first": [{"id": i, "text": decoder.token(i)} for i in unused[:_LISTED].tolist()],
        "commonest": [
            {"id": i, "text": decoder.token(i), "share": int(ids.counts[i]) / max(ids.tokens, 1)}
            for i in order[:_LISTED].tolist()
            if ids.counts[i]
        ],
        "outside": ids.outside,
        "first_outside": ids.first_outside and _place(sources, *ids.first_outside[:2]) | {"id": ids.first_outside[2]},
        "bos": _mark(ids, ids.bos, ids.begin_with_bos),
        "eos": _mark(ids, ids.eos, ids.end_with_eos),
    }


def _mark(ids: Ids, token: int | None, at_its_place: int) -> dict[str, Any] | None:
    return None if token is None else {"id": token, "documents": at_its_place, "elsewhere": ids.elsewhere(token, at_its_place)}


def _place(sources: Sequence[TokenShards], folder: int, document: int) -> dict[str, Any]:
    return {"folder": str(sources[folder].folder), "document": document}


def _text(sources: Sequence[TokenShards], text: Text) -> dict[str, Any]:
    return {
        "documents": text.documents,
        "tokens": text.tokens,
        "characters": text.characters,
        "bytes": text.bytes,
        "not_text_bytes": text.not_text,
        "control_bytes": text.control_bytes,
        "controls": [{"character": f"U+{ord(c):04X}", "count": n} for c, n in text.controls.most_common(_LISTED)],
        "replacement_characters": text.replaced,
        "invalid_utf8_bytes": text.invalid,
        "documents_affected": text.affected,
        "first": text.first and _place(sources, *text.first),
    }


def _duplicates(sources: Sequence[TokenShards], decoders: Sequence[Decoder], found: Duplicates) -> dict[str, Any]:
    return {
        "documents": found.documents,
        "repeats": found.repeats,
        "tokens": found.tokens,
        "repeated_tokens": found.repeated_tokens,
        "groups": [
            {"copies": group.copies, "tokens": group.tokens, **_document(sources, decoders, group.folder, group.document)}
            for group in found.groups
        ],
        "also_in_another_folder": {str(sources[folder].folder): n for folder, n in sorted(found.elsewhere.items())},
    }


def _draw(sources: Sequence[TokenShards], rng: np.random.Generator, most: int, without: int) -> list[tuple[int, int]]:
    """Folder and number of documents drawn at random without repetition, in order; of each folder not the last `without`."""
    ends = np.cumsum([source.manifest["documents"] - without for source in sources])
    total = int(ends[-1])
    drawn: set[int] = set()
    while len(drawn) < min(most, total):
        drawn.add(int(rng.integers(total)))
    folders = {index: int(np.searchsorted(ends, index, side="right")) for index in sorted(drawn)}
    return [(folder, index - (int(ends[folder - 1]) if folder else 0)) for index, folder in folders.items()]


def _document(sources: Sequence[TokenShards], decoders: Sequence[Decoder], folder: int, number: int) -> dict[str, Any]:
    position, ids = sources[folder].document(number)
    shown = ids[:_BEGINNING]
    where = {"position": position, "tokens_in_all": len(ids), "tokens_shown": len(shown)}
    return _place(sources, folder, number) | where | {"pieces": decoders[folder].pieces(shown)}


def _boundary(sources: Sequence[TokenShards], decoders: Sequence[Decoder], folder: int, number: int) -> dict[str, Any]:
    """The end of a document and the start of the next one."""
    (_, before), (position, after) = sources[folder].document(number), sources[folder].document(number + 1)
    end = before[-_END:]
    while len(end) < len(before) and len(end) > _END - 4 and not decoders[folder].begins(int(end[0])):
        end = end[1:]  # it is the rest of a character
    pieces = {
        "end": decoders[folder].pieces(end),
        "start": decoders[folder].pieces(after[:_END]),
        "whole": [len(before) <= _END, len(after) <= _END],
    }
    return _place(sources, folder, number) | {"position": position} | pieces


# -- what to look at -----------------------------------------------------------------------------------------------------


def findings(report: dict[str, Any]) -> list[str]:
    """Sentences about what is seldom meant."""
    found = [sentence for ids in report["ids"] for sentence in _wrong_ids(report, ids)]
    twins, text, folders = report["duplicates"], report["text"], report["folders"]
    if twins["repeats"]:
        shares = twins["repeats"] / twins["documents"], twins["repeated_tokens"] / twins["tokens"]
        found.append(f"{shares[0]:.2%} of the documents compared repeat an earlier one, with {shares[1]:.2%} of the tokens")
    splits = {each["folder"]: each["split"] for each in folders}
    for folder, count in twins["also_in_another_folder"].items():
        if splits[folder] == "validation":
            found.append(f"{counted(count, 'held-out document')} of {folder}: also in another of these folders")
    if text and text["not_text_bytes"]:
        affected, share = text["documents_affected"], text["not_text_bytes"] / max(text["bytes"], 1)
        place = f"document {text['first']['document']:,} of {text['first']['folder']}"
        found.append(f"{100 * share:.2g}% of the bytes are not text, in {counted(affected, 'document')}; the first is {place}")
    documents, said = (sum(each[key] for each in folders) for key in ("documents", "text_bytes"))
    if text and report["read"]["text"] and text["documents"] == documents and text["bytes"] != said:
        lossy = "the tokenizer does not give back what it was given"
        found.append(f"the tokens are {text['bytes']:,} bytes of text again, the documents had {said:,}: {lossy}")
    return found


def _wrong_ids(report: dict[str, Any], ids: dict[str, Any]) -> Iterator[str]:
    if ids["outside"]:
        first, vocabulary = ids["first_outside"], f"the {ids['vocab_size']:,} of {ids['tokenizer']}"
        place = f"{first['id']} in document {first['document']:,} of {first['folder']}"
        yield f"{ids['outside']:,} ids are outside {vocabulary}, the first is {place}: no model can be trained on them"
    mine = [each for each in report["folders"] if each["tokenizer_hash"] == ids["tokenizer_hash"]]
    for role in ("bos", "eos"):
        mark = ids[role]
        if mark and all(each[f"adds_{role}"] for each in mine) and mark["documents"] < ids["documents"]:
            lack = f"{ids['documents'] - mark['documents']:,} of {ids['documents']:,} documents"
            yield f"{lack} lack the {role.upper()} that the manifest says they have"
        if mark and mark["elsewhere"]:
            yield f"{role.upper()} occurs {mark['elsewhere']:,} times within documents, where prepare puts none"
