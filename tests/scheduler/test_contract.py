"""What our binding modules rely on in vLLM, checked by reading vLLM, without starting anything.

vLLM is pinned to one minor version because the binding rests on its internals. When the pin moves, every failure here
says which module needs what, and what it found; nothing else has to be searched for.
"""

import ast
import importlib
import inspect
import textwrap
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from drafter.options import ProposalOptions
from scheduler.options import DrafterOptions, EngineOptions
from tests.scheduler.contract import ATTRIBUTES, BEHAVIOURS, CALLED, OVERRIDDEN, SCHEDULER, VERSION

ROOT = Path(__file__).resolve().parents[2]
BINDINGS = ["scheduler/answering.py", "scheduler/engine.py", "server/vllm_adapter.py"]
BINDINGS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scheduler").glob("vllm_*.py"))


@cache
def load(symbol: str) -> Any:
    """``package.module:Class.member`` imported; vLLM's imports may warn of their own accord."""
    module, _, path = symbol.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def need(binding: str, symbol: str, expected: str) -> Any:
    """Load a symbol, or say who needs it."""
    try:
        return load(symbol)
    except (ImportError, AttributeError) as error:
        message = f"{binding} needs {symbol} {expected}; vLLM {vllm_version()} has none ({error})"
    return pytest.fail(message, pytrace=False)


def vllm_version() -> str:
    return str(load("vllm:__version__"))


@cache
def code(function: Any) -> str:
    """A function's or class's source without comments, layout or kinds of quotes."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return " ".join(ast.unparse(tree).split())


@cache
def assigned(cls: type[Any]) -> set[str]:
    """Attributes that the methods of a class assign."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}


def has(owner: type[Any], attribute: str) -> bool:
    """Whether instances of a class of vLLM have an attribute: declared, or assigned in a method."""
    return any(
        attribute in vars(cls)
        or attribute in inspect.get_annotations(cls)
        or (cls.__module__.startswith("vllm.") and attribute in assigned(cls))
        for cls in owner.__mro__
    )


def base_of(symbol: str) -> type[Any]:
    """The class of vLLM that a class of ours extends."""
    base: type[Any] = next(cls for cls in need(symbol, symbol, "to load").__mro__ if cls.__module__.startswith("vllm."))
    return base


def test_vllm_is_the_version_that_the_binding_was_written_for() -> None:
    assert vllm_version().split("+")[0] == VERSION, f"the binding modules were written for vLLM {VERSION}"


@pytest.mark.parametrize(("ours", "method"), [(ours, name) for ours, names in OVERRIDDEN.items() for name in names])
def test_overridden_methods(ours: str, method: str) -> None:
    base = base_of(ours)
    symbol, expected = f"{base.__module__}:{base.__name__}.{method}", OVERRIDDEN[ours][method].split()
    theirs = inspect.signature(need(ours, symbol, f"({', '.join(expected)})"))
    found = list(theirs.parameters)[1:]
    if found != expected:
        message = (
            f"{ours} overrides {symbol}({', '.join(expected)}); in vLLM {vllm_version()} it is ({', '.join(found)})"
        )
        pytest.fail(message, pytrace=False)
    overriding = vars(load(ours)).get(method)
    assert overriding is not None, f"{ours} does not override {method} any more: take it out of this test"
    keywords = {name for name, parameter in theirs.parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    inspect.signature(overriding).bind(*(theirs.parameters.keys() - keywords), **dict.fromkeys(keywords))


@pytest.mark.parametrize("ours", OVERRIDDEN)
def test_every_overridden_method_is_under_contract(ours: str) -> None:
    cls, base = load(ours), base_of(ours)
    shadowed = {name for name, value in vars(cls).items() if inspect.isfunction(value) and hasattr(base, name)}
    assert shadowed == set(OVERRIDDEN[ours])


@pytest.mark.parametrize(("binding", "symbol", "positional", "keywords"), CALLED)
def test_called_functions(binding: str, symbol: str, positional: int, keywords: str) -> None:
    call = f"callable with {positional} positional arguments and the keywords ({', '.join(keywords.split())})"
    function = need(binding, symbol, call)
    signature = inspect.signature(function)
    try:
        signature.bind(*range(positional), **dict.fromkeys(keywords.split()))
        return
    except TypeError as error:
        message = f"{binding} needs {symbol} {call}; vLLM {vllm_version()} has {signature}: {error}"
    pytest.fail(message, pytrace=False)


@pytest.mark.parametrize(
    ("binding", "symbol", "attributes"), [pytest.param(*row, id=f"{row[0]}: {row[1]}") for row in ATTRIBUTES]
)
def test_attributes(binding: str, symbol: str, attributes: str) -> None:
    owner = need(binding, symbol, f"with the attributes {attributes}")
    if missing := [name for name in attributes.split() if not has(owner, name)]:
        message = f"{binding} needs {symbol} with {', '.join(missing)}; vLLM {vllm_version()} has no such attribute"
        pytest.fail(message, pytrace=False)


@pytest.mark.parametrize(
    ("binding", "symbol", "statement", "why"), [pytest.param(*row, id=f"{row[0]}: {row[3]}") for row in BEHAVIOURS]
)
def test_behaviours(binding: str, symbol: str, statement: str, why: str) -> None:
    if statement not in code(need(binding, symbol, f"that {why}")):
        message = f"{binding} rests on {symbol}, which {why} by `{statement}`; vLLM {vllm_version()} does not say so"
        pytest.fail(message, pytrace=False)


def test_a_one_token_admission_is_padded_with_fake_drafts_only_without_a_table() -> None:
    """``SlipstreamScheduler`` sets a table so that a fully cached prompt is not verified against drafts of -1."""
    schedule = ast.parse(
        textwrap.dedent(inspect.getsource(need("scheduler.vllm_scheduler", f"{SCHEDULER}.schedule", "")))
    )
    marks = [
        node.test
        for node in ast.walk(schedule)
        if isinstance(node, ast.If) and "pad_spec_decode = True" in map(ast.unparse, ast.walk(node))
    ]
    innermost = [test for test in marks if "self.dynamic_sd_lookup is None" in ast.unparse(test)]
    assert len(innermost) == 1, (
        "scheduler.vllm_scheduler rests on Scheduler.schedule, which pads one-token admissions with drafts of -1 only "
        f"where `self.dynamic_sd_lookup is None`; vLLM {vllm_version()} pads where {[ast.unparse(t) for t in marks]}"
    )


def vllm_imports(tree: ast.AST) -> list[str]:
    """Symbols of vLLM that a module imports when it runs; imports for type checkers do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}:{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0].split(":")[0] == "vllm"]


@pytest.mark.parametrize("module", BINDINGS)
def test_what_a_binding_module_imports_exists(module: str) -> None:
    imported = vllm_imports(ast.parse((ROOT / module).read_text(encoding="utf-8")))
    for symbol in imported:
        need(module, symbol, "to import")


def test_no_other_module_imports_vllm() -> None:
    paths = [path for name in ("cuda_ext", "drafter", "scheduler", "server") for path in (ROOT / name).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if vllm_imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert found <= set(BINDINGS)
    assert len(paths) > len(BINDINGS)


def test_the_engines_arguments_are_vllms() -> None:
    from scheduler.engine import EngineShape, engine_arguments

    options = EngineOptions(DrafterOptions(Path("d"), ProposalOptions(4)))
    arguments = engine_arguments(EngineShape(model="m"), options)
    known = inspect.signature(need("scheduler.engine", "vllm.engine.arg_utils:AsyncEngineArgs", "")).parameters
    assert sorted(set(arguments) - set(known)) == [], (
        f"scheduler.engine passes what vLLM {vllm_version()} has no name for"
    )
    speculative = need("scheduler.engine", "vllm.config:SpeculativeConfig", "")
    assert [name for name in arguments["speculative_config"] if not has(speculative, name)] == []
    for name in ("worker_cls", "scheduler_cls", "distributed_executor_backend"):
        module, _, member = arguments[name].rpartition(".")
        assert base_of(f"{module}:{member}").__module__.startswith("vllm.v1.")
    module, _, member = arguments["speculative_config"]["model"].rpartition(".")
    assert callable(load(f"{module}:{member}").propose)


def test_the_arguments_of_the_embedded_application_parse() -> None:
    parser = need("server.vllm_adapter", "vllm.utils.argparse_utils:FlexibleArgumentParser", "()")()
    make = need("server.vllm_adapter", "vllm.entrypoints.launchers.cli_args:make_arg_parser", "(parser)")
    args = make(parser).parse_args(["--model", "m", "--served-model-name", "n"])
    assert (args.model, args.served_model_name) == ("m", ["n"])


def test_the_placeholder_of_rejected_tokens_is_no_token() -> None:
    assert need("scheduler.vllm_sampler", "vllm.v1.sample.rejection_sampler:PLACEHOLDER_TOKEN_ID", "== -1") == -1
