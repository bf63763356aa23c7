"""The words of the page and the goals: what is written by hand beside figures that are not.

A remark of a group says what its figures do not: what the time that is left is spent on (from a
profile), and what was tried. It is written after measuring, and checked with each new measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GOALS: Mapping[str, Mapping[Any, float]] = {
    # (device, adapters) -> the most that a step may take; "graph" is compiled or captured
    "step": {
        ("cpu", 1): 1.01,
        ("cpu", 3): 1.03,
        ("cuda", 1): 1.03,
        ("cuda", 3): 1.06,
        ("graph", 1): 1.01,
    },
    "loading": {"time": 1.2, "memory": 1.2},
    # extra peak / (keys, values and masks of the prompt), and bytes that stay after /free
    "memory": {"peak": 1.0, "stays": 0.0},
    "encodings": {"nothing": 0.0, "weight": 0.0, "reference": 1.0},
}
"""What issue 6 asks for."""

TITLES: Mapping[str, str] = {
    "steps": "A step with image prompts",
    "diffusers": "Beside diffusers",
    "queue": "From prompt to first step",
    "loading": "Loading an adapter",
    "memory": "Memory",
    "scaling": "Cost as work grows",
    "training": "Training",
}
"""Of the groups, in the order of the page."""

METHODS: Mapping[str, str] = {
    "steps": (
        "Whole steps of the host's sampler: guidance, wrappers, UNet. The control is the base "
        "model against itself: the noise that every other row has as well. On a CPU a second ratio "
        "stands beside it, of times within one step: the whole step by what is left of it without "
        "the time spent in the image prompts' own code. It holds what they add, not what they may "
        "do to the speed of the rest; noise slows both alike, so it is sharp. The second table "
        "counts what a step is made of; it holds for every machine."
    ),
    "diffusers": (
        "The same UNet weights in diffusers, without and with its own IP-Adapter processors, in "
        "the same rounds as ours. Overhead is what is over 1. The last figure is our overhead less "
        "a third of theirs, as difference: at most 0 is the goal."
    ),
    "queue": (
        "The host's own executor in this process, from the prompt to the first call of the UNet, "
        "against the same graph without image prompt. The seed changes in every prompt, for else "
        "the host does nothing at all."
    ),
    "loading": (
        "Our loader against safetensors' `load_file` of the same file; every tensor is then read "
        "once on both sides, because both map the file and read nothing by themselves. The file "
        "is in the system's cache."
    ),
    "memory": (
        "Peak: what a sampling run of two steps needs over the same run of the base model, divided "
        "by the size of the keys, values and masks that it cannot do without. Growth: after each "
        "prompt of a long queue in which reference, weight and adapter change at random, in the "
        "host's executor, without the first fifth; the goal is a slope of zero within its "
        "interval. The control is the same queue without image prompts and without the UNet: what "
        "the host itself gathers. It does not depend on the size of the picture, which is small."
    ),
    "scaling": (
        "The exponent p of cost = c * size ^ p, fitted over the sizes of a row. Steps are timed "
        "with and, where the base grows as well, without an adapter; added arithmetic is counted."
    ),
    "training": (
        "Steps of `ip_adapter.train` and of a plain loop over diffusers' UNet with the same "
        "weights, batch and optimizer, in turn. The ratio is of samples per second, theirs / ours, "
        "so that less is better here too."
    ),
}
"""What a group's figures are."""

REMARKS: Mapping[str, str] = {
    "steps": (
        "Steps of one model differ by up to a tenth on this machine, which does other work as "
        "well, so their ratio says little about a hundredth, and intervals of four rounds are "
        "too sure. Within a step the image prompts take 0.3 to 0.7 % with one adapter, 1.5 % "
        "with the 257 tokens of a full one, whose arithmetic alone is 1.5 % of the step's and "
        "misses the goal; about 1 % with three, 1.5 % with six: the attention of each layer to "
        "the image tokens, and one sum. Nothing else is left in a step: no product of keys and "
        "values, no reading of the schedule unless it changes, as the counts show. A weight "
        "that changes at every step costs the folding of it into the values. Smaller pictures "
        "than the published ones are no favour: the base model's self-attention shrinks faster "
        "than this."
    ),
    "diffusers": (
        "diffusers projects the features, and makes keys and values of the tokens, in every "
        "step; here both belong to the run. That is most of the arithmetic it adds. Times are "
        "open on this machine, whose noise is as large as what is compared; the counts are not. "
        "On a CPU operators alone are no fewer with one global adapter: each layer divides its "
        "query into heads once more, which costs views but no memory."
    ),
    "queue": (
        "Of the prompts before, everything is kept but what changed: a new weight is folded "
        "into values that are there, at a cost that is nothing beside a step, and only a new "
        "reference runs the encoder, once. That run is what a new reference costs: about a "
        "fifth of one step at 512 x 512, of the twenty or so that a picture takes."
    ),
    "loading": (
        "What is over a plain read is Python, 5 to 15 ms whatever the size of the file: telling "
        "what it is by names and shapes (a third), building the modules (a third), "
        "`load_state_dict` and a fingerprint of samples. A plain read of 45 MB from the "
        "system's cache takes 7 ms, so the goal is missed for small files and met, within "
        "noise, for large ones. Tried: the fingerprint read all bytes once more, and now reads "
        "samples; the shapes to check were built anew for each file, and now once for each "
        "kind."
    ),
    "memory": (
        "On a CPU keys and values are there one and a half times (twice with several prompts): "
        "they stay with their prompt, so that the next sampling need not compute them, and the "
        "run's own have the weights folded into the values and prompts of one length side by "
        "side. Where the host computes on a GPU those that stay lie in main memory, and the "
        "run's own alone on the device; there was no GPU to measure that. The adapter's weights "
        "are not resident. The queue grows while its caches fill, by 170 MB until some 150 "
        "prompts, of which the fit sees the end; over the last 300 it is 2.0 kB per prompt (1.5 "
        "to 2.6), or 0.5 MB in all. With the caches cut to 8 kB, so that they are full at once, "
        "2000 prompts of the small models grew by 0.5 kB each, where the host alone gathers "
        "0.3; of Python objects only those in the caches and the host's own became more "
        "(tracemalloc). The rest is taken to be the allocator's."
    ),
    "scaling": (
        "Added arithmetic grows as what is asked for, no faster, and a step hardly notices: its "
        "exponents are near 0, or those of the base model's own step. Added memory of several "
        "adapters or frames has an exponent over 1 because a single one needs no copy: several "
        "lie side by side, frames by row. At every resolution they need the same memory: keys "
        "and values do not depend on the size of the picture."
    ),
}
"""By group: where the remaining time goes, and what was tried."""
