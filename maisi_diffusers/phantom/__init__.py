"""Digital anatomical phantoms: label maps in MAISI's vocabulary and the CTs that belong to them, from a seed."""

from .phantom import Phantom, make_phantom
from .sizes import SIZE_RANGES
from .subject import Subject
from .tumors import OrganOutOfViewError, names_of_tumors

__all__ = ["OrganOutOfViewError", "Phantom", "SIZE_RANGES", "Subject", "make_phantom", "names_of_tumors"]
