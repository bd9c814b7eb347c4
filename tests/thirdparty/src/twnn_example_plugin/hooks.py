"""What twnn_plugin calls when it loads this distribution."""

from twnn_plugin import hookimpl

from .policy import EvenRows
from .solver import Aitken


@hookimpl
def twnn_register_solvers(register):
    register("aitken", Aitken)


@hookimpl
def twnn_register_policies(register):
    register("even_rows", EvenRows)
