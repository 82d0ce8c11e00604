"""A needle in a haystack: how long a text may be, and where in it a fact may stand, for a model to find it again.

    ... filler ... The magic number of Lima is 4817. ... filler ...  The magic number of Lima is     -> 4817

One cell of the grid for each length (tokens of the whole prompt) and depth (0 % = the needle comes first, 100 % = last,
just before the question). With several needles the first stands at the depth, the others spread evenly from there to
the end, and each is asked for (Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack). The score of a cell is the
share of the numbers that the answers begin with.

    cells = haystack_cells([512, 1024], [0, 50, 100], filler_ids, encode, seed=0)
    html = heat_map(rows)          # rows: {"length", "depth", "found": 0 .. 1}

    python data/needle.py          shows a small haystack and its needle
"""

import html
import random
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

CITIES = ("Lima", "Oslo", "Cairo", "Delhi", "Paris", "Quito", "Seoul", "Tunis", "Milan", "Accra", "Kyoto", "Perth")


class Cell(NamedTuple):
    length: int  # tokens of each prompt
    depth: float  # per cent
    prompts: list[list[int]]  # one for each needle: the same haystack, another question
    answers: list[str]


def haystack_cells(lengths: Iterable[int], depths: Iterable[float], filler: list[int],
                   encode: Callable[[str], list[int]], *, needles: int = 1, seed: int = 0,
                   ends: Callable[[int], bool] = lambda token: True) -> list[Cell]:
    """The prompts of the grid, each of exactly `length` tokens; filler that is too short is repeated.

    ends(token): a needle may stand behind this token, such as one with a full stop; the place is moved back to the
    nearest one. The number differs from cell to cell, so a model cannot repeat one that it gave before.
    ValueError: no filler, more needles than cities, a depth outside 0 .. 100, a length without room for filler."""
    if not filler:
        raise ValueError("there is no text to make a haystack of")
    if not 1 <= needles <= len(CITIES):
        raise ValueError(f"needles is {needles}; it must be from 1 to {len(CITIES)}")
    rng, cells = random.Random(seed), []
    for length in lengths:
        for depth in depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"a depth of {depth:g}: it is a percentage, from 0 to 100")
            cities = rng.sample(CITIES, needles)
            numbers = [str(rng.randrange(1000, 10000)) for _ in cities]
            facts = [encode(f" The magic number of {city} is {number}.") for city, number in zip(cities, numbers)]
            prompts = []
            for city in cities:
                question = encode(f"\nThe magic number of {city} is")
                room = length - sum(map(len, facts)) - len(question)
                if room < needles:
                    raise ValueError(f"a length of {length} tokens: needles and question alone take {length - room}")
                hay = (filler * (room // len(filler) + 1))[:room]
                prompts.append(insert(hay, facts, depth / 100, ends) + question)
            cells.append(Cell(length, depth, prompts, numbers))
    return cells


def insert(hay: list[int], facts: list[list[int]], depth: float, ends: Callable[[int], bool]) -> list[int]:
    """The facts at depth, depth + (1 - depth) / k, ... of the hay, each moved back to behind a token that `ends`."""
    text, done = [], 0
    for i, fact in enumerate(facts):
        place = round((depth + i * (1 - depth) / len(facts)) * len(hay))
        while 0 < place < len(hay) and place > done and not ends(hay[place - 1]):
            place -= 1
        text += hay[done:place] + fact
        done = max(done, place)
    return text + hay[done:]


def share_found(answers: list[str], texts: list[str]) -> float:
    """The share of the numbers that begin the texts given in answer to their questions, blanks aside."""
    return sum(text.strip().startswith(answer) for answer, text in zip(answers, texts)) / len(answers)


def heat_map(rows: list[dict]) -> str:
    """{"length", "depth", "found"} rows as an inline SVG: length to the right, depth downwards, red 0 to green 1."""
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    W, H, left = 56, 26, 60  # a cell, and the room for the depths, in pixels
    width, height = left + W * len(lengths), H * (len(depths) + 1)
    out = [f'<svg class="heat" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
           f'aria-label="needle in a haystack: share found">']
    for row in rows:
        x, y = left + W * lengths.index(row["length"]), H * depths.index(row["depth"])
        label = f"{row['length']} tokens, depth {row['depth']:g} %: {row['found']:.0%}"
        out.append(f'<g data-length="{row["length"]}" data-depth="{row["depth"]:g}" data-found="{row["found"]:g}">'
                   f'<title>{label}</title><rect x="{x}" y="{y}" width="{W - 2}" height="{H - 2}" '
                   f'fill="hsl({120 * row["found"]:.0f} 55% 60%)"/><text x="{x + W / 2 - 1}" y="{y + 16}" '
                   f'text-anchor="middle" fill="#111">{row["found"]:.0%}</text></g>')
    for i, depth in enumerate(depths):
        out.append(f'<text x="{left - 6}" y="{H * i + 16}" text-anchor="end">{depth:g} %</text>')
    for i, length in enumerate(lengths):
        x, y = left + W * (i + 0.5) - 1, H * len(depths) + 16
        out.append(f'<text x="{x}" y="{y}" text-anchor="middle">{length}</text>')
    return "\n".join([*out, "</svg>"])


def report_page(title: str, result: dict, style: str = "") -> str:
    """A page without script or network: every figure of a result, however nested, and the heat map of its "needles"."""
    def rows(prefix: str, values: dict) -> Iterator[str]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from rows(f"{prefix}{key} · ", value)
            elif key != "needles":
                shown = f"{value:.4f}" if isinstance(value, float) else str(value)
                yield f"<tr><th>{html.escape(prefix + key)}</th><td>{html.escape(shown)}</td></tr>"

    title = html.escape(title)
    parts = [f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
             f"<style>{style}</style></head><body><h1>{title}</h1><table>{''.join(rows('', result))}</table>"]
    if "needles" in result:
        parts += ['<h2>Needle in a haystack</h2><p class="note">Share of the needles found: length of the prompt in '
                  "tokens to the right, depth of the needle downwards.</p>", heat_map(result["needles"])]
    return "\n".join([*parts, "</body></html>\n"])


if __name__ == "__main__":
    words = "It rained all day . The cat slept on the roof . Nobody came , and nobody called .".split()
    (cell,) = haystack_cells([40], [50], words, str.split, ends=lambda word: word == ".")
    print(" ".join(cell.prompts[0]), "->", cell.answers[0])
