"""The nodes: schemas and tooltips, one call of `ip_adapter.host` each; no arithmetic.

Node ids, input names and output order are permanent: saved workflows refer to them.
"""
