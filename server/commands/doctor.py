"""``slipstream doctor``."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from server.diagnosis import VLLM_VERSION, CodePath, Problem, code_paths, problems
from server.facts import Artefact, Facts, Package, gather
from server.flags import add_settings_flags, settings_of, settings_usage

HOSTS_ENGINE = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.usage = f"{settings_usage('doctor')} [--json] [--verify]"
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--verify", action="store_true", help="read the cached target and compare its checksums")
    add_settings_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Report; returns 0 if the server could start with these settings, and 1 if not."""
    settings = settings_of(args)
    facts = gather(settings, verify=args.verify)
    paths, found = code_paths(facts, settings), problems(facts, settings)
    if args.json:
        print(json.dumps(as_json(facts, paths, found), indent=2))
    else:
        print("\n".join(report(facts, paths, found)))
    return 1 if found else 0


def as_json(facts: Facts, paths: list[CodePath], found: list[Problem]) -> dict[str, object]:
    """The report as one JSON-serialisable object."""
    return {
        "can_serve": not found,
        "facts": asdict(facts),
        "code_paths": [asdict(path) for path in paths],
        "problems": [asdict(problem) for problem in found],
    }


def report(facts: Facts, paths: list[CodePath], found: list[Problem]) -> Iterator[str]:
    """The report as lines of text."""
    yield "Found"
    yield from (_row(label, text) for label, text in _findings(facts))
    yield ""
    yield "Code paths"
    yield from (_row(path.part, f"{path.choice} ({path.reason})") for path in paths)
    yield ""
    if not found:
        yield "This machine can serve."
        return
    yield "This machine cannot serve yet:"
    for problem in found:
        yield f"  - {problem.reason}"
        yield f"    remedy: {problem.remedy}"


def _findings(facts: Facts) -> Iterator[tuple[str, str]]:
    features = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in facts.cpu_features.items())
    yield "python", f"{'.'.join(map(str, facts.python))} on {facts.system} {facts.architecture}"
    yield "CPU", f"{facts.cpu}, {facts.cores} usable cores"
    yield "features", features
    if facts.memory_gib:
        yield "memory", f"{facts.memory_gib[0]:.1f} GiB, {facts.memory_gib[1]:.1f} GiB available"
    yield "torch", _package(facts.torch)
    yield "CUDA", facts.cuda_device or "not available to torch"
    yield "transformers", _package(facts.transformers)
    pinned = "the pinned version" if facts.vllm.version == VLLM_VERSION else f"pinned: {VLLM_VERSION}"
    yield "vLLM", f"{facts.vllm.name} {facts.vllm.version or 'absent'} ({pinned})"
    for package in facts.media:
        yield package.name, _package(package) if package.version else "absent (not needed)"
    yield "OpenMP", facts.openmp or "libiomp5.so not found"
    yield "tcmalloc", facts.tcmalloc or "not found"
    yield "C++ compiler", facts.compiler or "not found"
    yield "nvcc", facts.nvcc or "not found"
    yield "target", _artefact(facts.target, "will be fetched at the first start")
    yield "drafter", _artefact(facts.drafter, "missing") if facts.drafter else "off (speculation.enabled is false)"


def _package(package: Package) -> str:
    if package.version is None:
        return "absent"
    return f"{package.version}, does not import: {package.error}" if package.error else package.version


def _artefact(artefact: Artefact, if_absent: str) -> str:
    if artefact.problem:
        return f"{artefact.path}: cannot be used"
    state = if_absent if artefact.absent else f"present, {artefact.weights_gib:.2f} GiB of weights"
    return f"{artefact.path}: {state}"


def _row(label: str, text: str) -> str:
    return f"  {label:<16}{text}"
