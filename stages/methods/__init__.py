"""Tuning methods, one small module each, behind one explicit dict.

A method is a class with the interface of `Method`; adding one is one file and one entry.
"""

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.methods.base import Method
from sherl_pipe.stages.methods.consolidation import Consolidation
from sherl_pipe.stages.methods.dtl_encoder import Dtl, DtlPlus
from sherl_pipe.stages.methods.linear import Linear
from sherl_pipe.stages.methods.lst import Lst
from sherl_pipe.stages.methods.sherl import Sherl
from sherl_pipe.stages.methods.unipt_encoder import Unipt
from sherl_pipe.stages.methods.weighted import Weighted

METHODS: dict[str, type[Method]] = {
    "sherl": Sherl,
    "lst": Lst,
    "dtl": Dtl,
    "dtl+": DtlPlus,
    "unipt": Unipt,
    "weighted": Weighted,
    "linear": Linear,
}

__all__ = [
    "METHODS",
    "Consolidation",
    "Dtl",
    "DtlPlus",
    "Linear",
    "Lst",
    "Sherl",
    "Unipt",
    "Weighted",
    "find_method",
]


def find_method(name: str, *, dual: bool = False) -> type[Method]:
    """The method of a name, which has to have a form for dual encoders where one is wanted. Raises
    InputError listing the known ones."""
    known = {each: method for each, method in METHODS.items() if method.dual or not dual}
    if name not in known:
        what = "method on a dual encoder" if dual else "method"
        raise InputError(explain(what, expected=f"one of {sorted(known)}", found=name))
    return known[name]
