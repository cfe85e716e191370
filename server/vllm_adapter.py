"""The one module of the server that touches vLLM: its OpenAI application, embedded in this process."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM


async def build_openai_app(engine: AsyncLLM, model: str, served_names: Sequence[str]) -> FastAPI:
    """vLLM's OpenAI application over a running engine.

    Args:
        engine: the engine that answers.
        model: folder of the target.
        served_names: the model's names in the API.
    """
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", model, "--served-model-name", *served_names])
    validate_parsed_serve_args(args)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    return app


@asynccontextmanager
async def lifespan_of(app: FastAPI) -> AsyncIterator[None]:
    """Run the life-span handlers of an application that is mounted in another one, which would not run them."""
    async with app.router.lifespan_context(app):
        yield
