"""The commands of ``megatron-gspo``, a file each. Adding one is a file here and its name in ``COMMANDS``.

A command's module has ``SUMMARY`` (a phrase), ``EXAMPLE`` (a command line), perhaps ``MORE`` (sentences for
``--help``), ``add_arguments(parser)`` and ``run(options) -> exit status``. Heavy imports belong inside ``run``:
every module here is imported to print the list of commands.
"""

COMMANDS = ("train", "compare", "eval", "doctor", "parity", "report", "status", "convert", "bench")
"""In the order in which ``--help`` lists them."""
