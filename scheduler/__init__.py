"""Deciding what the target verifies, and binding that decision to vLLM.

``options``, ``policy``, ``counters``, ``step_watch`` and the adaptive policy's parts (``acceptance``, ``cost``,
``controller``, ``adaptive``) are pure. Modules named ``vllm_*``, ``engine`` and ``answering`` are the only
ones, beside ``server.vllm_adapter``, that import vLLM.
"""
