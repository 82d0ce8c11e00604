"""Documents from raw sources, streamed: the text every later step reads, never loaded whole.

A source is one string:

    stdlib                  the embedded corpus, no download: the running Python's own standard library
    stdlib:modules          ... part of it: the source of each module, one document per file
    stdlib:topics           ... part of it: each help topic of pydoc (the language reference, prose)
    stdlib:docstrings       each docstring; not in plain `stdlib`, whose modules hold them already
    a.txt  a.md  a.py       plain text, one document; a .txt line that is only <|endoftext|> ends one (TinyStories)
    a.jsonl  a.jsonl.gz     one JSON object per line, its text in the field "text" (or "content"); also .json.gz
    folder                  all such files below it, in sorted order, but hidden and empty ones

Text is UTF-8; a byte-order mark at the start is dropped, line ends are kept. A document longer than PIECE characters
comes in several pieces, `final` being true on its last one, so memory stays flat on a file of any size.

Held-out text is chosen by rules that need no random state:

    one plain file          its tail: the first int(n (1 - val_fraction)) of its n characters are training text, as
                            nanoGPT cuts tinyshakespeare
    stdlib                  by file (or topic): held out if sha256(relative path) / 2^256 < val_fraction, so the same on
                            every machine; a docstring goes with its file
    anything else           by document: the same with sha256(text), so exact copies land on one side and never leak
                            (of a document in pieces the first is hashed: where it is cut depends on its text alone)
"""

import ast
import codecs
import fnmatch
import gzip
import hashlib
import json
import os
import re
import sysconfig
import warnings
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

PIECE = 1 << 20  # characters: a longer document comes in pieces
PLAIN = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz", ".json.gz")
STDLIB_PARTS = {"stdlib": ("modules", "topics"), "stdlib:modules": ("modules",), "stdlib:topics": ("topics",),
                "stdlib:docstrings": ("docstrings",)}
LEFT_OUT = (  # names or paths in the standard library's folder that are no part of the corpus
    ".*",
    "site-packages", "dist-packages", "__pycache__",  # not the standard library
    "test", "tests", "idle_test",                     # differ between installations, and would be two thirds of all
    "config-*", "_sysconfigdata*",                    # this machine's build settings
    "encodings", "html/entities.py",                  # tables: near-identical character maps, which would sit on both
                                                      # sides of the split and flatter every compressor, ours included
    "pydoc_data/topics.py",                           # read as topics, one document each
)
SEPARATOR = re.compile(r"(?m)^<\|endoftext\|>\r?(?:\n|\Z)")


class Document(NamedTuple):
    name: str           # where it comes from: path, path:line, path:qualname
    text: str           # the whole text, or one piece of it
    final: bool = True  # False: the next Document continues this one


def read_documents(sources: list[str]) -> Iterator[Document]:
    """All documents of `sources`, in order. Unusable sources raise here, damaged files when they are reached:
    OSError or ValueError, naming the file and the line or byte."""
    return (document for item in expand(sources) for _, document in keyed_documents(item))


def split_documents(sources: list[str], val_fraction: float, split: str) -> Iterator[Document]:
    """The documents of `sources` in `split` ("train" or "val"); the two are disjoint and together hold all text.
    The rules stand at the top of this file. Either may be empty: the consumer must look."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    items = expand(sources)
    if len(items) == 1 and str(items[0]).endswith(PLAIN):
        return split_tail(items[0], val_fraction, split)
    return split_by_hash(items, val_fraction, split)


def split_tail(path: Path, val_fraction: float, split: str) -> Iterator[Document]:
    n = sum(len(document.text) for document in plain_documents(path))  # a first pass, only to count
    cut = int(n * (1 - val_fraction))
    begin = 0
    for name, text, final in plain_documents(path):
        end = begin + len(text)
        if split == "train" and begin < cut:
            yield Document(name, text[: cut - begin], final or end >= cut)
        if split == "val" and end >= cut:
            yield Document(name, text[max(0, cut - begin) :], final)
        begin = end


def split_by_hash(items: list, val_fraction: float, split: str) -> Iterator[Document]:
    for item in items:
        continued = False
        for key, document in keyed_documents(item):
            if not continued:  # the pieces of one document stay together
                digest = hashlib.sha256((document.text if key is None else key).encode()).digest()
                held_out = int.from_bytes(digest, "big") < val_fraction * 2**256
            if held_out == (split == "val"):
                yield document
            continued = not document.final


# ---- sources -> items: the name of a stdlib part, or the path of one file

def expand(sources: list[str]) -> list:
    """Check that every source exists and can hold text, and list its files, before anything is read."""
    items = []
    for source in sources:
        path = Path(source)
        if source in STDLIB_PARTS:
            items.append(source)
        elif path.is_dir():
            files = [p for _, p in walk(path) if p.name.endswith(PLAIN + LINES) and p.stat().st_size]
            if not files:
                raise ValueError(f"{source}: no file with text in this folder ({', '.join(PLAIN + LINES)})")
            items += files
        elif not path.exists():
            raise FileNotFoundError(f"{source}: no such file or folder; embedded are {', '.join(STDLIB_PARTS)}")
        elif not path.name.endswith(PLAIN + LINES):
            raise ValueError(f"{source}: cannot read this kind of file; known are {', '.join(PLAIN + LINES)}")
        elif not path.stat().st_size:
            raise ValueError(f"{source}: the file is empty")
        else:
            items.append(path)
    return items


def walk(root: Path, left_out: tuple[str, ...] = (".*",)) -> list[tuple[str, Path]]:
    """(relative path with slashes, path) of each file under `root`, sorted; `left_out` are patterns of either."""
    found = []
    for folder, subfolders, names in os.walk(root):
        at = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"

        def keep(name: str) -> bool:
            return not any(fnmatch.fnmatch(text, pattern) for text in (name, at + name) for pattern in left_out)

        subfolders[:] = filter(keep, subfolders)  # os.walk will not enter the others
        found += [(at + name, Path(folder, name)) for name in names if keep(name)]
    return sorted(found)


def keyed_documents(item) -> Iterator[tuple[str | None, Document]]:
    """(key, document): the split hashes the key, or the document's own text where the key is None."""
    if isinstance(item, Path):
        for document in (jsonl_documents if item.name.endswith(LINES) else plain_documents)(item):
            yield None, document
    else:
        parts = {"modules": stdlib_modules, "topics": stdlib_topics, "docstrings": stdlib_docstrings}
        for part in STDLIB_PARTS[item]:
            yield from parts[part]()


# ---- files

def plain_documents(path: Path) -> Iterator[Document]:
    """A text file, one document unless separator lines divide it, in pieces of at most PIECE characters."""
    buffer, number = "", 0
    for block in decoded_blocks(path):
        buffer += block
        *whole, rest = SEPARATOR.split(buffer) if path.suffix == ".txt" and "<|endoftext|>" in buffer else [buffer]
        for text in whole:
            yield from pieces(f"{path}#{number}", text)
            number += 1
        *early, last = pieces(f"{path}#{number}", rest)
        yield from early
        buffer = last.text
    yield Document(f"{path}#{number}", buffer)  # may be empty: then it only says that the document has ended


def decoded_blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, about 1 MiB at a time. ValueError with the byte offset where it is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(1 << 20)
            if b"\0" in block:
                raise ValueError(f"{path}: a binary file, not text (zero byte at offset {offset + block.index(0)})")
            held = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 at byte {offset - held + error.start} ({error.reason})") from None
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
            if not block:
                return


def jsonl_documents(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from pieces(f"{path}:{number}", record_text(line, f"{path}:{number}"))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from None


def record_text(line: bytes, where: str) -> str:
    """The text of one JSON line; ValueError beginning with `where` if it has none."""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: malformed JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(record, dict):
        raise ValueError(f'{where}: expected a JSON object with a field "text", found a {type(record).__name__}')
    text = next((record[field] for field in ("text", "content") if isinstance(record.get(field), str)), None)
    if text is None:
        raise ValueError(f'{where}: no string in a field "text" or "content"; fields found: {", ".join(record)}')
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # legal JSON, but no text: cannot be UTF-8
        raise ValueError(f"{where}: the text holds half of a surrogate pair")
    return text


def pieces(name: str, text: str) -> Iterator[Document]:
    while len(text) > PIECE:
        cut = piece_end(text)
        yield Document(name, text[:cut], final=False)
        text = text[cut:]
    yield Document(name, text)


def piece_end(text: str) -> int:
    """Where to cut a text longer than PIECE: after a newline between two visible characters. Tokenizers split there
    anyway (GPT-2's pattern and its heirs), so the pieces' tokens are the tokens of the whole."""
    at = PIECE
    while (at := text.rfind("\n", 1, at)) > 0:
        if text[at - 1] not in " \t\n" and not text[at + 1].isspace():
            return at + 1
    at = text.rfind(" ", 1, PIECE)  # one endless line: before a word
    return at if at > 0 else PIECE


# ---- the embedded corpus

def stdlib_modules() -> Iterator[tuple[str, Document]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [(name, path) for name, path in walk(root, LEFT_OUT) if name.endswith(".py")]
    if not files:
        raise ValueError(f"stdlib: this Python keeps no source files in {root}; name a text with --data")
    for name, path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a module may declare another encoding (PEP 263)
        yield name, Document(name, text.replace("\r\n", "\n"))  # Windows installers ship CRLF: one corpus everywhere


def stdlib_topics() -> Iterator[tuple[str, Document]]:
    from pydoc_data.topics import topics  # {name: text}, half a megabyte: not worth it for other sources

    # Some topics ("while") are sections of another ("compound"): with both, held-out text would stand in training text.
    lines = {name: {line for line in text.splitlines() if len(line) > 20} for name, text in topics.items()}
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):  # the longest first
        if all(2 * len(lines[name] & lines[other]) < len(lines[name]) for other in kept):
            kept.append(name)
    for name in sorted(kept):
        yield f"topics/{name}", Document(f"topics/{name}", topics[name])


def stdlib_docstrings() -> Iterator[tuple[str, Document]]:
    def visit(node, name):
        if text := ast.get_docstring(node):
            yield Document(name, text)
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from visit(child, f"{name}{'.' if ':' in name else ':'}{child.name}")

    for key, module in stdlib_modules():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(module.text)
        for document in visit(tree, module.name):
            yield key, document
