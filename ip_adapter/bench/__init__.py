"""What an image prompt costs, against the same work without it: ``python -m ip_adapter.bench``.

The room from the ground up:

    errors      what is refused                 estimates   ratios, slopes, exponents
    clocks      who is timed when               counting    work and memory, counted exactly
    models      base models and adapters        sampling    steps of several runs at once
    results     rows of figures, resumable      words       goals and remarks
    page        docs/performance.md             world       what all groups share

and one file for each group of rows: `steps`, `rival` (diffusers), `queueing`, `loading`,
`remembering` (memory), `scaling`, `training`.

All models have random weights: the arithmetic does not depend on what they say. Ratios only; a
second on one machine is no second on another.
"""

from __future__ import annotations
