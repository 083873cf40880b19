"""For all tests: the scripts on the path, no network, no account, no data in home folders."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when Minari is imported
os.environ["no_proxy"] = "*"  # the tests' own hosts are on loopback
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: threads that wait cost more


@pytest.fixture(autouse=True)
def clean_room(monkeypatch, tmp_path):
    """Each test has its own home folders; signal handlers and precision are put back."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import torch  # only now: it reads OMP_NUM_THREADS

    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)
