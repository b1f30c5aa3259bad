import functools
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm

# One thread, here and in the processes that tests start: they compare numbers, and sums depend on its number.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import elastic_reset  # noqa: E402
from elastic_reset import TranslationGame  # noqa: E402

TINY = dict(
    updates=4, batch_size=16, mini_batch_size=8, eval_every=2, eval_size=16, save_every=1, reset_every=2,
    d_model=16, pretrain_updates=20, pretrain_batch_size=16, kl_coef=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws the same numbers in whatever order the tests run."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Pretrained models of the tests go to a folder of their own, shared by all tests of a session."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session", autouse=True)
def small_worlds_once():
    """The embedded data are made once a session, not once a run, which would take most of its time."""
    for name in ("toy_translations", "toy_reviews", "toy_qa"):
        setattr(elastic_reset, name, functools.cache(getattr(elastic_reset, name)))


@pytest.fixture
def tiny(tmp_path):
    """Flags of a run of the embedded game that takes seconds."""
    return TINY | dict(task="translation", output_dir=str(tmp_path / "run"))


def metrics_of(folder):
    """The lines of a run's metrics.jsonl, without the seconds, which differ from run to run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Killed(Exception):
    pass


def killed_within_update(number, run, monkeypatch):
    """Calls run(), a training of the game, which dies within its `number`-th update."""
    learn, before = TranslationGame.learn, iter(range(number - 1))

    def dying(self, *args):
        if next(before, None) is None:
            raise Killed
        return learn(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TranslationGame, "learn", dying)
        run()


def before_training(monkeypatch, act):
    """Calls act() where the training of a model before RL shows its bar. (Another function in fit()'s place
    would change what the cache knows the model by.)"""

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **settings):
            if str(settings.get("desc")).startswith("training "):
                act()
            super().__init__(*args, **settings)

    monkeypatch.setattr(tqdm, "tqdm", Bar)


def refuse_training(monkeypatch):
    before_training(monkeypatch, lambda: pytest.fail("it began to train"))


def contents(folder):
    """{path: bytes or None} of everything in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
