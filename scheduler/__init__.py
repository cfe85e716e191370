"""Deciding what the target verifies, and binding that decision to vLLM.

``options``, ``policy``, ``counters`` and ``noise`` are pure. Modules named ``vllm_*``, ``engine`` and ``answering`` are
the only ones, beside ``server.vllm_adapter``, that import vLLM.
"""
