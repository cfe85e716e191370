"""Deciding what the target verifies, and binding that decision to vLLM.

``options``, ``policy`` and ``counters`` are pure. Modules named ``vllm_*``, ``engine`` and ``answering`` are the only
ones, beside ``server.vllm_adapter``, that import vLLM.
"""
