"""Tuning methods, one small module each, behind one explicit dict.

A method is a class with the interface of `Method`; adding one is one file and one entry.
"""

from sherl_pipe.stages.methods.sherl import Consolidation, Sherl

METHODS = {"sherl": Sherl}

__all__ = ["METHODS", "Consolidation", "Sherl"]
