"""The commands of ``megatron-gspo``, a file each. Adding one is one file here and its name in ``GROUPS``.

A command's module (``compare_evals`` for ``compare-evals``) has ``SUMMARY`` (a phrase), ``EXAMPLE`` (a command line),
perhaps ``MORE`` (sentences for ``--help``) and ``DOCS`` (its page), ``add_arguments(parser)`` and ``run(options)``,
which returns the exit status. Heavy imports belong inside ``run``: every module here is imported to print the list of
commands.
"""

GROUPS = {
    "train and measure a policy": ("train", "serve", "eval", "compare-evals", "compare"),
    "look before, during and after a run": ("plan", "doctor", "explain", "parity", "status", "report"),
    "convert checkpoints": ("convert",),
    "run what models write": ("sandbox",),
    "measure this machine": ("bench",),
}
"""What commands are for, in the order in which ``--help`` lists them."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
