"""The files of a search on disk: finished candidates are kept, and the next call continues from them.

FOLDER/auto.json            what was tried and judged, and in which rounds
FOLDER/scores.safetensors   see `fisher_scores`
FOLDER/candidates/KEY.*     every file that was judged, its report, and what it made of each example (KEY.outcomes)
FOLDER/model.*              the result; not there unless the promise is met
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from s2d.errors import InputError
from s2d.experiments.auto.candidates import Candidate, Scored
from s2d.io.files import JSON, in_place_of, read_json, write_atomic, write_json
from s2d.tasks.base import Outcomes

NAME, CANDIDATES, RESULT = "auto.json", "candidates", "model"
SCORES = "scores.safetensors"
_TYPE, _VERSION = "s2d_auto", 2


@dataclass
class File:
    """A candidate's file and its results.

    Attributes:
        candidate: The candidate.
        file: Its name below the folder.
        bytes: Size on disk.
        ms: Milliseconds of one row; None where it was not run.
        full_ms: The same for full precision, measured in turns.
        ran: Whether it ran in its runtime; otherwise its outcomes are those of the simulation.
        seconds: Time to make and judge it.
    """

    candidate: Candidate
    file: str
    bytes: int
    ms: float | None
    full_ms: float | None
    ran: bool
    seconds: float

    def to_dict(self) -> JSON:
        """JSON types."""
        return {**vars(self), "candidate": self.candidate.to_dict()}


@dataclass
class Records:
    """The state of a search; `open` reads it, every change is written at once.

    Attributes:
        folder: The folder.
        key: The inputs that all results depend on: the model, the data, the runtime, the seed.
        scored: Candidates that were tried in simulation, by key.
        files: Candidates that were judged, by key.
        refused: Candidates that could not be made, with the reason.
        rounds: Orders of judging, each fixed before its first look at the acceptance data.
        repair: A candidate whose weights are being trained.
        climbed: Points of the promises for which the ladder was tried to its end.
        examples: How many acceptance examples were scored; 0 before the first.
        extended: How often these became more.
        seconds: Total time of all calls.
    """

    folder: Path
    key: JSON
    scored: dict[str, Scored] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rounds: list[list[Candidate]] = field(default_factory=list)
    repair: Candidate | None = None
    climbed: list[float] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0
    extended: int = 0

    @staticmethod
    def open(folder: Path, key: JSON) -> Records:
        """Read the records of a folder, or start new ones.

        Raises:
            InputError: The folder belongs to another search.
        """
        path = folder / NAME
        if not path.is_file():
            others = [each.name for each in folder.iterdir()] if folder.is_dir() else []
            if any(not name.startswith(".") for name in others):
                raise InputError(
                    f"{folder} exists and holds something else ({sorted(others)[0]}); choose another --out"
                )
            return Records(folder, key)
        content = read_json(path)
        if content.get("_type") != _TYPE or content.get("_version", 0) != _VERSION:
            raise InputError(f"{path} is of another kind or another version of s2d; choose another --out")
        different = [name for name, value in key.items() if content["key"].get(name) != value]
        if different:
            raise InputError(f"{folder} belongs to another {different[0]}; choose another --out, or remove it")
        return Records(
            folder,
            key,
            {name: Scored.from_dict(each) for name, each in content["scored"].items()},
            {
                name: File(**{**each, "candidate": Candidate.from_dict(each["candidate"])})
                for name, each in content["files"].items()
                if (folder / each["file"]).is_file()
            },
            content["refused"],
            [[Candidate.from_dict(each) for each in round] for round in content["rounds"]],
            None if content["repair"] is None else Candidate.from_dict(content["repair"]),
            content["climbed"],
            content["examples"],
            content["seconds"],
            content.get("extended", 0),
        )

    def write(self) -> None:
        """Write all records to disk."""
        content: JSON = {
            "_type": _TYPE,
            "_version": _VERSION,
            "key": self.key,
            "scored": {name: each.to_dict() for name, each in self.scored.items()},
            "files": {name: each.to_dict() for name, each in self.files.items()},
            "refused": self.refused,
            "rounds": [[each.to_dict() for each in round] for round in self.rounds],
            "repair": None if self.repair is None else self.repair.to_dict(),
            "climbed": self.climbed,
            "examples": self.examples,
            "extended": self.extended,
            "seconds": self.seconds,
        }
        write_json(self.folder / NAME, content)

    def extend(self, examples: int) -> None:
        """Take more acceptance examples: every file has to be judged again."""
        self.examples, self.extended = examples, self.extended + 1
        self.files.clear()
        self.write()

    def save_outcomes(self, name: str, outcomes: Outcomes) -> None:
        """Store a model's outcomes on the acceptance data."""
        tensors = {"values": outcomes.values, "weights": outcomes.weights}
        about = {
            "scale": str(outcomes.scale),
            "exponential": str(int(outcomes.exponential)),
            "hits": str(int(outcomes.hits)),
        }
        content = save(tensors, about)
        write_atomic(self._outcomes(name), lambda file: file.write(content))

    def outcomes(self, name: str) -> Outcomes | None:
        """The outcomes stored under a name; None if there are none."""
        path = self._outcomes(name)
        if not path.is_file():
            return None
        from safetensors import safe_open

        found = load_file(path)
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = file.metadata()
        return Outcomes(
            found["values"],
            found["weights"],
            float(about["scale"]),
            about["exponential"] == "1",
            about["hits"] == "1",
        )

    def _outcomes(self, name: str) -> Path:
        return self.folder / CANDIDATES / f"{name}.outcomes"

    def publish(self, candidate: Candidate | None) -> Path | None:
        """Publish a candidate's file as the result; with None, remove the result.

        Returns:
            The path of the result.
        """
        wanted = None if candidate is None else self.files[candidate.key]
        sources = [] if wanted is None else with_companions(self.folder / wanted.file)
        made = [self.folder / f"{RESULT}{source.suffix}" for source in sources]
        weights = [source for source in sources[1:] if source.suffix != ".json"]
        if weights and made[0].is_file() and not os.path.samefile(sources[0], made[0]):
            made[0].unlink()  # at no moment does an old file stand beside new weights
        for source, target in zip(reversed(sources), reversed(made), strict=True):  # the file itself last
            put(source, target)
        for left in self.folder.glob(f"{RESULT}.*"):
            if left.is_file() and left not in made:
                left.unlink()
        return made[0] if made else None


def with_companions(file: Path) -> list[Path]:
    """A file and its companions with the same stem."""
    others = (file.with_suffix(".bin"), file.with_name(f"{file.name}.data"), file.with_suffix(".json"))
    return [file, *(each for each in others if each.is_file())]


def put(source: Path, target: Path) -> None:
    """Put a file at a second place, complete or not at all; on one disk it takes no further space.

    Raises:
        InputError: It cannot be written.
    """
    if target.is_file() and os.path.samefile(source, target):
        return
    with in_place_of(target) as made:
        try:
            os.link(source, made)  # no second copy where the file system has hard links
        except OSError:
            shutil.copyfile(source, made)
