"""What will not work, said before any training: one line a check, with what to change.

A check is a function of ``Facts`` that returns a ``Check`` (or several); adding one is the function and one entry in
``catalog.CHECKS``.
"""
