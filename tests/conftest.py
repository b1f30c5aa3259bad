import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TINY = dict(
    updates=4, batch_size=16, mini_batch_size=8, eval_every=2, eval_size=16, save_every=1, reset_every=2,
    d_model=16, pretrain_updates=20, pretrain_batch_size=16,
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Pretrained models of the tests go to a folder of their own, shared by all tests of a session."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def tiny(tmp_path):
    """Flags of a run of the embedded game that takes seconds."""
    return TINY | dict(task="translation", output_dir=str(tmp_path / "run"))
