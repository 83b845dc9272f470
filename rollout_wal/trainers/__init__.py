"""Adapters for trainers: leaves, each as thin as its trainer allows.

`ledger` is what they share: the agreement between a trainer's checkpoints and the log. `trl` is for TRL.
"""
