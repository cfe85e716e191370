"""The commands of ``slipstream``: each module has ``HOSTS_ENGINE``, ``add_arguments(parser)`` and ``run(args)``."""
