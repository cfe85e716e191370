"""Runs the worker inside the engine-core process, where the platform has no use for a second one."""

import ctypes
import multiprocessing
import os
import signal
import sys

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InlineExecutor(UniProcExecutor):
    """vLLM's single-process executor with all of the machine's cores.

    On CPU vLLM puts the worker in a process of its own and polls a shared-memory queue between the two. With one
    worker that costs a core that the target's forward pass could use.
    """

    def _init_executor(self) -> None:
        _die_with_parent()
        _take_all_cores()
        super()._init_executor()


def _take_all_cores() -> None:
    """Use every core that this process may use; of an engine core, every one that the front end may use.

    In a forked process Intel's OpenMP runtime binds the first thread to the first core, and all that follow inherit it.
    """
    if multiprocessing.parent_process() is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def _die_with_parent() -> None:
    """Ask the kernel to end this process when the front end dies, however it dies; nothing may be left behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
