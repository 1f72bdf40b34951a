"""`titan-dp data inspect`: look at token shards before a run reads them for weeks; nothing is written into their folder.

    titan-dp data inspect data/corpus
    titan-dp data inspect data/corpus --config debug.toml --step 100
    titan-dp data inspect --config debug.toml --data.path '["data/a/train", "data/b/train"]' --json

What is counted and how is told in measure.py; report.py makes all of it data, and here are the options and the screen.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from titan_dp.config.arguments import natural, positive, take_settings
from titan_dp.config.load import keys_of, load_config
from titan_dp.data.inspect import report as reports
from titan_dp.data.inspect.text import Decoder, Piece
from titan_dp.data.shards import SPLITS, TokenShards
from titan_dp.errors import UserError, counted
from titan_dp.files import short, to_json
from titan_dp.output import (
    add_format_option,
    check_matplotlib,
    harmless,
    number_table,
    print_next,
    print_table,
    print_text,
    print_written,
    room,
    save_figure,
    subplots,
    thousands,
)

_BAR = 30
_AT_BOUNDARY = 140
"""Characters shown on either side."""
_WIDTH = 80
"""Columns of decoded text where no terminal says how wide it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="folders of shards, or folders that hold such folders")
    add("--config", metavar="NAME", help="as for train.py: also show a batch; without FOLDER, of what data.path names")
    add("--step", type=positive, default=1, metavar="N", help="optimizer step whose batch is shown (default: 1)")
    add("--documents", type=natural, default=3, metavar="N", help="documents, and boundaries, drawn at random (default: 3)")
    add("--seed", type=natural, default=0, help="of what is drawn at random (default: 0)")
    add("--full", action="store_true", help="read all of it, however much it is, and compare every file with its hash")
    add("--tokenizer", default="", metavar="NAME", help="where the tokenizer is now, if not where prepare found it")
    add("--figure", type=Path, metavar="FOLDER", help="draw the lengths of the documents into this folder")
    add_format_option(parser)
    add("--json", action="store_true", help="print everything as one JSON object instead")
    take_settings(parser, "settings as for train.py (--data.path data/corpus/train), with --config")


def run(args: argparse.Namespace) -> int:
    if not args.folders and not args.config:
        raise UserError("name a FOLDER of token shards that `titan-dp prepare` wrote, or a run's --config NAME")
    if args.settings and not args.config:
        raise UserError(f"{args.settings[0]} is a setting of a run: add --config NAME")
    loaded, loader = None, None
    if args.folders:
        sources, notes = reports.find_shards(args.folders)
    if args.config:
        from titan_dp.data.inspect.batch import first_batch, loader_of, refusal

        settings = _with_folders(args.settings, sources) if args.folders else args.settings
        loaded = load_config(["--config", args.config, *settings]).config
        loader = loader_of(loaded)
        if not args.folders:
            sources, notes = loader.sources, []
    reports.check_countable(sources)
    if args.figure:
        check_matplotlib()
        _check_figure(args.figure, sources)
    named = {source.tokenizer.hash: Decoder(source, args.tokenizer) for source in reversed(sources)}
    decoders = [named[source.tokenizer.hash] for source in sources]
    batch = None
    if loaded and loader:  # first, since it is refused at once
        decoder = next(named[source.tokenizer.hash] for source in loader.sources)
        batch = first_batch(loaded, loader, args.step, decoder)
    seq_len = loaded.training.seq_len if loaded else None
    report = reports.inspect(sources, decoders, args.seed, args.documents, args.full, seq_len)
    report["batch"] = batch
    report["findings"] = reports.findings(report)
    report["notes"] = notes + [
        f"{each.problem}: ids are shown, and text is not checked" for each in named.values() if each.problem
    ]
    if loaded and loader and (refused := refusal(loaded, loader)):
        report["findings"].append(f"a run would be refused: {refused}")
    if args.figure:
        save_figure(_figure(report), _figure_path(args))
    if args.json:
        print(to_json(report, indent=1))
        return 0
    _show(report)
    if args.figure:
        print_written(_figure_path(args))
    _advise(args, sources, report)
    return 0


def _with_folders(settings: list[str], sources: Sequence[TokenShards]) -> list[str]:
    """`settings`, with the folders as data.path; those of held-out documents as validation.path, or no validation without."""
    if "data.path" in keys_of(settings):
        raise UserError("FOLDER and --data.path both name the data: leave one of them out")
    held_out = [str(source.folder) for source in sources if source.split == "validation"]
    trained = [str(source.folder) for source in sources if source.split != "validation"] or held_out
    own = ["--data.path", to_json(trained)]
    if "validation.path" not in keys_of(settings) and "validation.enable" not in keys_of(settings):
        kept = [path for path in held_out if path not in trained]
        own += ["--validation.path", to_json(kept)] if kept else ["--validation.enable=false"]
    return [*own, *settings]


def _figure_path(args: argparse.Namespace) -> Path:
    path: Path = args.figure / f"document_lengths.{args.format}"
    return path


def _check_figure(folder: Path, sources: Sequence[TokenShards]) -> None:
    """Raises UserError if a figure would lie among shards."""
    for source in sources:
        if folder.resolve().is_relative_to(source.folder.resolve()):
            raise UserError(
                f"--figure {folder} lies in the shards of {source.folder}, where nothing is written; choose another folder"
            )


# -- the screen ----------------------------------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    _show_counts(report)
    _show_lengths(report)
    _show_duplicates(report)
    _show_text(report)
    _show_ids(report)
    _show_documents(report)
    if report["batch"]:
        _show_batch(report["batch"])
    for note in report["notes"]:
        print_text(f"note: {note}")
    for finding in report["findings"]:
        print_text(f"look at this: {finding}")
    if report["notes"] or report["findings"]:
        print()


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> None:
    names = ("", " ")
    print_table(number_table(title, names, rows, left=names, show_header=False))


def _short_names(folders: Sequence[str]) -> dict[str, str]:
    """The folders without what all of them begin with."""
    parts = [Path(folder).parts for folder in folders]
    same = 0
    while len(folders) > 1 and all(len(each) > same + 1 for each in parts) and len({each[same] for each in parts}) == 1:
        same += 1
    return {folder: str(Path(*own[same:])) for folder, own in zip(folders, parts, strict=True)}


def _show_counts(report: dict[str, Any]) -> None:
    folders = report["folders"]
    names = _short_names([each["folder"] for each in folders])
    counted = ("shards", "documents", "tokens", "text_bytes", "file_bytes")
    rows = [(names[each["folder"]], *(each[key] for key in counted)) for each in folders]
    if len(rows) > 1:
        rows.append(("in all", *(sum(each[key] for each in folders) for key in counted)))
    columns = ("folder", "shards", "documents", "tokens", "bytes of text", "tokens per byte", "bytes on disk")
    cells = [
        (name, f"{s:,}", f"{d:,}", f"{t:,}", f"{b:,}", f"{t / b:.3f}" if b else "not known", f"{size:,}")
        for name, s, d, t, b, size in rows
    ]
    title = folders[0]["folder"] if len(folders) == 1 else f"{len(folders)} folders of token shards"
    print_table(number_table(title, columns, cells, left=columns[:1]), details=("bytes on disk", "shards", "tokens per byte"))
    made = {}
    for each in folders:
        marks = [role.upper() for role in ("bos", "eos") if each[f"adds_{role}"]]
        made[each["tokenizer_hash"], *marks] = (
            f"tokenizer {each['tokenizer']}, {each['vocab_size']:,} ids; around each document "
            f"{' and '.join(marks) or 'neither BOS nor EOS'}"
        )
    print_text(*made.values(), "")


def _show_lengths(report: dict[str, Any]) -> None:
    lengths, folders = report["lengths"], report["folders"]
    documents, tokens = (sum(bin[key] for bin in lengths["histogram"]) for key in ("documents", "tokens"))
    most = max(bin["documents"] for bin in lengths["histogram"])
    columns = ("tokens", "documents", "share", "of tokens", "")
    rows = [
        (
            f"{bin['least']:,} - {bin['most']:,}" if bin["most"] > bin["least"] else f"{bin['least']:,}",
            f"{bin['documents']:,}",
            f"{bin['documents'] / documents:.1%}",
            f"{bin['tokens'] / tokens:.1%}",
            "#" * -(-bin["documents"] * _BAR // most),
        )
        for bin in lengths["histogram"]
    ]
    print_table(number_table("lengths of documents", columns, rows, left=("",)))
    names = _short_names([each["folder"] for each in folders])
    quantiles = [(names[each["folder"]], each["lengths"]) for each in folders]
    if len(quantiles) > 1:
        quantiles.append(("in all", lengths))
    words = {"0": "least", "0.5": "median", "1": "most"}
    headers = [words.get(share, f"{float(share):.0%}") for share in lengths["quantiles"]]
    cells = [(name, f"{own['mean']:,.1f}", *(f"{n:,}" for n in own["quantiles"].values())) for name, own in quantiles]
    print_table(number_table("", ("quantiles", "mean", *headers), cells, left=("quantiles",)), details=("99%", "5%"))
    if empty := sum(each["lengths"]["empty"] for each in folders):
        print_text(f"{counted(empty, 'empty document')}: nothing but BOS and EOS", "")
    if longer := lengths["longer_than_row"]:
        shares = f"{longer['documents'] / documents:.1%} of the documents, with {longer['tokens'] / tokens:.1%} of the tokens"
        print_text(f"{shares}, are longer than training.seq_len", "")


def _show_duplicates(report: dict[str, Any]) -> None:
    found, read = report["duplicates"], report["read"]
    names = _short_names([each["folder"] for each in report["folders"]])
    everything = sum(each["documents"] for each in report["folders"])
    share = found["repeats"] / max(found["documents"], 1), found["repeated_tokens"] / max(found["tokens"], 1)
    rows = [
        ("compared", f"{found['documents']:,} of {everything:,} documents{_how(read)}"),
        ("repeat an earlier one", f"{found['repeats']:,} documents ({share[0]:.2%}), {share[1]:.2%} of the tokens"),
    ]
    rows += [
        (f"of {names[folder]}", f"{n:,} are also in another folder") for folder, n in found["also_in_another_folder"].items()
    ]
    _pairs("duplicates (equal tokens)", rows)
    for group in found["groups"]:
        where = f"document {group['document']:,} of {names[group['folder']]}"
        print_text(f"  {group['copies']:,} copies of {group['tokens']:,} tokens, the first is {where}:")
        _print_pieces(group["pieces"], 6, cut=group["tokens_shown"] < group["tokens_in_all"], most=150)
    if found["groups"]:
        print()


def _how(read: dict[str, Any]) -> str:
    parts = []
    if not read["duplicates"]:
        parts.append(f"all of {read['lengths_drawn']:,} of {read['lengths_in_all']:,} lengths, drawn at random")
        parts += ["lengths with most tokens left out"] * read["lengths_passed_over"]
    if read["every"] > 1:
        parts.append(f"every {read['every']:,}th by its hash")
    return f" ({'; '.join(parts)})" if parts else ""


def _show_text(report: dict[str, Any]) -> None:
    text = report["text"]
    if text is None:
        return
    size = max(text["bytes"], 1)
    sample = "" if report["read"]["text"] else " (those that begin in windows drawn at random)"
    controls = ", ".join(f"{each['character']} {each['count']:,} times" for each in text["controls"])
    rows = [
        ("decoded", f"{text['documents']:,} documents{sample}"),
        ("characters", f"{text['characters']:,}, in {text['bytes']:,} bytes"),
        ("not text", f"{text['not_text_bytes'] / size:.4%} of the bytes, in {text['documents_affected']:,} documents"),
        ("  control characters", f"{text['control_bytes']:,} bytes{f': {controls}' if controls else ''}"),
        ("  U+FFFD", f"{text['replacement_characters']:,} times"),
        ("  not UTF-8", f"{text['invalid_utf8_bytes']:,} bytes"),
    ]
    _pairs("text", rows)


def _show_ids(report: dict[str, Any]) -> None:
    for ids in report["ids"]:
        sample = "" if report["read"]["ids"] else " (of documents that begin in windows drawn at random)"
        unused = [_id(each) for each in ids["never_used_first"]] + ["..."] * (ids["never_used"] > len(ids["never_used_first"]))
        rows = [
            ("read", f"{ids['tokens']:,} tokens{sample}"),
            ("commonest", ", ".join(f"{_id(each)} {each['share']:.1%}" for each in ids["commonest"])),
            ("never used", f"{ids['never_used']:,} of {ids['vocab_size']:,}{': ' * bool(unused)}{', '.join(unused)}"),
            ("outside the vocabulary", f"{ids['outside']:,}"),
        ]
        for role, verb in (("bos", "begin"), ("eos", "end")):
            if mark := ids[role]:
                held = f"{mark['documents']:,} of {ids['documents']:,} documents {verb} with {mark['id']}"
                rows.append((role.upper(), f"{held}, {mark['elsewhere']:,} elsewhere"))
        _pairs(f"token ids of {ids['tokenizer']}", rows)


def _id(each: dict[str, Any]) -> str:
    return f"{each['id']} {harmless(each['text'], one_line=True)}".strip()


def _show_documents(report: dict[str, Any]) -> None:
    names = _short_names([each["folder"] for each in report["folders"]])
    for each in report["documents"]:
        _title(f"document {each['document']:,} of {names[each['folder']]}, {each['tokens_in_all']:,} tokens")
        _print_pieces(each["pieces"], 2, cut=each["tokens_shown"] < each["tokens_in_all"], most=600)
        print()
    for each in report["boundaries"]:
        number = each["document"]
        where = f"end of document {number:,} of {names[each['folder']]} and start of the next"
        _title(f"{where}, at token {each['position']:,}")
        _print_pieces(each["end"], 2, before=not each["whole"][0], most=-_AT_BOUNDARY)
        _print_pieces(each["start"], 2, cut=not each["whole"][1], most=_AT_BOUNDARY)
        print()


def _title(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(width=min(room(), _WIDTH), highlight=False, markup=False).print(Text(text, style="bold"))


def _print_pieces(pieces: Sequence[Piece], indent: int, most: int, cut: bool = False, before: bool = False) -> None:
    """Decoded text as a block of at most `_WIDTH` columns, special tokens in brackets and, on a terminal, reversed.

    Args:
        most: so many characters are shown; if negative, so many last ones.
        cut, before: whether the document goes on behind, or began before.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    shown = Text()
    for text, special in pieces:
        line = harmless(text, one_line=True)
        shown.append(f"[{line}]" if special else line, "reverse" if special else "")
    if len(shown) > abs(most):
        cut, before = cut or most > 0, before or most < 0
        shown = shown[:most] if most > 0 else shown[most:]
    shown = Text.assemble("..." * before, shown, "..." * cut)
    console = Console(width=min(room(), _WIDTH), highlight=False, markup=False)
    console.print(Padding(shown, (0, 0, 0, indent), expand=False))


def _show_batch(batch: dict[str, Any]) -> None:
    shapes = {name: "None" if x is None else f"{x[0]} {x[1]}" for name, x in batch["shapes"].items()}
    rows = [*shapes.items()]
    in_all = batch["labels"] + batch["masked_labels"]
    rows.append(("labels", f"{batch['labels']:,}; {batch['masked_labels']:,} of {in_all:,} positions have none (-100)"))
    state = f"begins anew at {batch['resets']:,} positions" if batch["resets"] is not None else "runs on across documents"
    rows.append(("state", f"{state} (data.document_boundaries = {batch['document_boundaries']!r})"))
    _pairs(f"first micro-batch of step {batch['step']:,} on rank 0", rows)
    row = batch["shown"]
    names = _short_names([row["folder"] for row in batch["rows"]]) if len({r["folder"] for r in batch["rows"]}) > 1 else {}
    columns = ("row", "sample", "folder", "from token", "documents", "begin in it")
    table = [
        (
            f"{i}",
            f"{row['sample']:,}",
            names.get(row["folder"], row["folder"]),
            f"{row['first_token']:,}",
            f"{row['documents'][0]:,} - {row['documents'][1]:,}",
            f"{row['documents_begin']:,}",
        )
        for i, row in enumerate(batch["rows"])
    ]
    print_table(number_table("", columns, table, left=("row", "folder")), details=("folder",))
    cells, previous = [], -1
    for each in row["positions"]:
        if each["position"] != previous + 1:
            cells.append(("...", "", "", "", "", ""))
        previous = each["position"]
        marks = ["document begins"] * each["document_begins"] + ["no label"] * (each["label"] < 0)
        marks += ["state reset"] * each["reset"]
        texts = [_short_text(each[key]) for key in ("input_text", "label_text")]
        label = "" if each["label"] < 0 else f"{each['label']}"
        cells.append((f"{each['position']:,}", f"{each['input']}", texts[0], label, texts[1], ", ".join(marks)))
    columns = ("position", "input", "", "label", " ", "  ")
    title = f"sample {row['sample']:,}"
    if any(each["document_begins"] and each["position"] for each in row["positions"]):
        title += ", the first with a boundary between documents"
    print_table(number_table(title, columns, cells, left=("", " ", "  ")))


def _short_text(text: str, most: int = 14) -> str:
    text = harmless(text, one_line=True)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _advise(args: argparse.Namespace, sources: Sequence[TokenShards], report: dict[str, Any]) -> None:
    named = [str(folder) for folder in args.folders] + (["--config", args.config] if args.config else [])
    again = f"titan-dp data inspect {shlex.join(named)}"
    if not all(report["read"][key] for key in ("ids", "text", "duplicates")):
        print_next("read all of it, which takes as long as the disk and the tokenizer do", f"{again} --full")
    if not args.config:
        print_next("see a batch as the model gets it", f"{again} --config debug.toml")
    if not args.full:
        outs = dict.fromkeys(s.folder.parent if s.folder.name in SPLITS else s.folder for s in sources)
        print_next(
            "compare every byte with its hash", *(f"titan-dp prepare --out {shlex.quote(str(out))} --verify" for out in outs)
        )
    held_out = [str(source.folder) for source in sources if source.split == "validation"]
    trained = [str(source.folder) for source in sources if source.split != "validation"]
    if trained:
        paths = {"data.path": trained} | ({"validation.path": held_out} if held_out else {})
        said = [f"--{key} {shlex.quote(own[0] if len(own) == 1 else to_json(own))}" for key, own in paths.items()]
        config = shlex.quote(args.config or "...")
        print_next("train on it", f"titan-dp train --config {config} --job.run_name ... {' '.join(said)}")


def _figure(report: dict[str, Any]) -> Any:
    """Documents, and tokens, by length."""
    bins = report["lengths"]["histogram"]
    figure, axes = subplots(figsize=(7, 4))
    edges = [bin["least"] for bin in bins] + [bins[-1]["most"] + 1]
    for key in ("documents", "tokens"):
        total = sum(bin[key] for bin in bins)
        axes.stairs(
            [bin[key] / total for bin in bins],
            edges,
            fill=key == "documents",
            alpha=0.5 if key == "documents" else 1,
            label=key,
        )
    axes.axvline(report["lengths"]["quantiles"]["0.5"], color="black", linestyle=":", label="median document")
    axes.set_xscale("log", base=2)
    thousands(axes.xaxis)
    axes.set(xlabel="tokens of a document", ylabel="share", title=f"{short(sum(b['documents'] for b in bins))} documents")
    axes.legend()
    return figure
