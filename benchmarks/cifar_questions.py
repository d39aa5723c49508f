"""Questions and answers made from CIFAR-10's labels, as Parquet files for the task visual-question-answering.

    python benchmarks/cifar_questions.py ../shared/data/cifar10 --out runs/cifar-questions [--train N] [--test N]

Every image gets one question, drawn by its number: what it is, whether it is an animal (a vehicle), whether it can fly,
whether it is a given thing (half of the time it is), or which of two things it is. The test images are those of the
data's test file; nothing of it is in train.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
FLYING = ("airplane", "bird")


def question(name: str, draw: random.Random) -> tuple[str, str]:
    """A question about an image of a class, and its answer."""
    other = draw.choice([each for each in CLASSES if each != name])
    kind = draw.randrange(5)
    if kind == 0:
        return "what is it?", name
    if kind == 1:
        group, members = draw.choice([("an animal", ANIMALS), ("a vehicle", set(CLASSES) - set(ANIMALS))])
        return f"is it {group}?", "yes" if name in members else "no"
    if kind == 2:
        return "can it fly?", "yes" if name in FLYING else "no"
    if kind == 3:
        asked = draw.choice([name, other])
        return f"is it {'an' if asked[0] in 'aeiou' else 'a'} {asked}?", "yes" if asked == name else "no"
    first, second = draw.sample([name, other], 2)
    return f"{first} or {second}?", name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        table = pyarrow.parquet.read_table(arguments.data / f"{split}.parquet")
        table = table.slice(0, getattr(arguments, split) or len(table))
        image, label = (next(n for n in names if n in table.column_names) for names in (("image", "img"), ("label",)))
        draw = random.Random(f"{arguments.seed} {split}")
        pairs = [question(CLASSES[number], draw) for number in table.column(label).to_pylist()]
        columns = {"image": table.column(image), "question": [q for q, _ in pairs], "answer": [a for _, a in pairs]}
        pyarrow.parquet.write_table(pyarrow.table(columns), arguments.out / f"{split}.parquet")
        print(f"{split}: {len(pairs)} questions, for example: {'; '.join(f'{q} {a}' for q, a in pairs[:4])}")


if __name__ == "__main__":
    main()
