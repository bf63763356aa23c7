"""Training: the paper's objective on a frozen base, run as ``python -m ip_adapter.train``.

`recipe` says what to do, `data` and `cache` bring the samples, `objective` is the loss, `loop` the
steps, `state` what is kept on disk, `watch` what the loss hides. Needs the extra ``train``.
"""
