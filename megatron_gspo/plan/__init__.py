"""Layouts and placements for a number of GPUs: which are legal, which fit, and how long a step would take.

Sums, and no measurement: ``rates`` has what they rest on, ``published`` how far they are from what others measured.
"""
