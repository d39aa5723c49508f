"""`s2d.train` under torchrun: one result, that of one process; a killed process costs nothing but time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import train_job
from tests.ranks import preload_ranks
from tests.tiny_text import make_data, make_model

from s2d.distributed import processes
from s2d.errors import InputError
from s2d.experiments.recipe import make_recipe
from s2d.experiments.runner import Runner
from s2d.io.files import read_json, write_json
from s2d.training.batching import _share

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
# With gloo the processes of a restart would find the addresses of those before them in the agent's store.
OWN_STORE = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def torchrun(ranks: int, *given: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", OWN_STORE[0]: OWN_STORE[1]}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", *given]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def killed_job(folder: Path, ranks: int, decay: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """torchrun's own agent, in this process; its ranks are forked off one that has imported what they need."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    preload_ranks()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=folder.name,
        rdzv_endpoint="localhost:0",
        rdzv_backend="c10d",
        max_restarts=1,
        monitor_interval=0.2,
        start_method="forkserver",
    )
    elastic_launch(config, train_job.main)(folder, decay, True)
    return read_json(folder / f"{decay}-{ranks}-killed.json"), torch.load(folder / f"{decay}-{ranks}-killed.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("job")
    make_model(made / "bert")
    make_data(made / "words")
    return made


@pytest.mark.timeout(300)
def test_two_processes_end_where_one_does_and_survive_a_kill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*OWN_STORE)
    train_job.main(folder, "default", kill=False)  # here: another interpreter would only import torch once more
    alone, weights = read_json(folder / "default-1.json"), torch.load(folder / "default-1.pt")
    assert sum(number for _, number in alone["selected"])
    told, found = killed_job(folder, 2, "default")  # it saves after each step
    assert told["continued_from"] > 0, "it began again from the start"
    assert told["selected"] == alone["selected"]
    assert told["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert not list(folder.glob(".default-2*")), "two processes wrote the same file"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_recipe_ends_where_one_process_does_when_either_of_two_is_killed(folder: Path) -> None:
    content = {
        "model": str(folder / "bert"),
        "task": {"name": "text-classification", "data": str(folder / "words"), "max_length": 24},
        "train": {"steps": 24, "batch_size": 8, "lr": 5e-3, "head_lr": 5e-2, "save_every": 0},
        "arms": {"s2d": {"refresh_every": 2, "outlier_ratio": 1.5, "threshold": 0.1}},
        "audit": False,
        "quantize": {"specs": ["fp32", "w8a8"], "observers": ["minmax"], "calibration": {"samples": 24}},
        "qat": {"specs": ["w8a8"], "steps": 4},
    }
    write_json(folder / "recipe.json", content)
    alone = Runner("a", make_recipe(content), folder / "alone").run()
    # The other process in training, then the first one, which is about to write, in what it does alone.
    plan, out = [(1, "step", 9), (0, "cells", 2)], folder / "two"
    script = [str(ROOT / "benchmarks" / "rank_kills.py"), "--child", json.dumps(plan)]
    ended = torchrun(2, *script, "run", str(folder / "recipe.json"), "--out", str(out), "--quiet", restarts=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "killed in start 0: step 9" in ended.stderr and "killed in start 1: cells 2" in ended.stderr
    assert "another process of this run ended" in ended.stderr and "defect" not in ended.stderr
    told = read_json(out / "results.json")
    assert [r["spec"] for r in told["records"]] == ["fp32", "w8a8", "w8a8"]
    assert [r["value"] for r in told["records"]] == [r["value"] for r in alone["records"]]
    assert max(r["value"] for r in told["records"]) > 60, "it learned"
    assert [(r["step"], r["weight"], r["selected"]) for r in told["history"]] == [
        (r["step"], r["weight"], r["selected"]) for r in alone["history"]
    ]


def test_only_a_broken_connection_is_put_down_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert not processes.lost_another(broken), "there is no other process"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.lost_another(broken) and not processes.lost_another(RuntimeError("mat1 and mat2 do not fit"))


def test_a_batch_is_shared_evenly_or_refused() -> None:
    class Two:
        num_processes, process_index = 2, 0

    assert {k: v.tolist() for k, v in _share({"a": torch.arange(5)}, Two()).items()} == {"a": [0, 1]}
    with pytest.raises(InputError, match="1 training examples cannot be shared by 2 processes"):
        _share({"a": torch.arange(1)}, Two())
