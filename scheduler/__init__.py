"""Deciding what the target verifies, and binding that decision to vLLM.

``policy`` says what a draft policy is; ``adaptive`` is the one that serves, made of ``acceptance``, ``cost`` and
``controller``, with ``health`` around it. ``repetition`` drafts from a request's own text, ``calibration`` says what a
first start runs, ``ledger`` and ``counters`` count, ``trace`` and ``recording`` write drafts down. All these are pure.
Modules named ``vllm_*``, ``engine`` and ``answering`` are the only ones, beside ``server.vllm_adapter``, that import
vLLM.
"""
