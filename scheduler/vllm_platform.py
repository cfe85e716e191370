"""Which of vLLM's workers and runners ours extend: those of the platform that vLLM found.

The CUDA side follows vLLM's own structure and has not been run.
"""

from types import ModuleType
from typing import Any

from vllm.platforms import current_platform


def _classes() -> tuple[type[Any], type[Any], ModuleType, str]:
    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker as cpu
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        return cpu.CPUWorker, CPUModelRunner, cpu, "CPUModelRunner"
    import vllm.v1.worker.gpu_model_runner as runner
    import vllm.v1.worker.gpu_worker as gpu

    return gpu.Worker, runner.GPUModelRunner, runner, "GPUModelRunner"


BaseWorker, BaseModelRunner, runner_module, runner_name = _classes()
"""vLLM's worker and runner classes, and where and by what name its worker looks the runner up."""
